"""Texts about commands and keys: ``steerlm --help``, ``steerlm COMMAND --help``, shell completion.

Owns: the texts and their layout. Does not own: what a key means (``schema.py``), who reads it (``commands.py``).
Invariant: every line fits into :data:`WIDTH` columns.
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from steerlm_megatron.config.commands import COMMANDS, TOOLS
from steerlm_megatron.errors import UserError

WIDTH = 100
_NAME_WIDTH = 30  # width of a key with its value; longer ones have a line of their own


def show(arguments: Sequence[str], version: str) -> bool:
    """Print the text that a command line asks for. Return whether it asked for a text instead of a run.

    Raises:
        UserError: an unknown command or shell, or overrides that are wrong. SystemExit: nothing was asked for.
    """
    if not arguments:
        print(usage(version))
        raise SystemExit(UserError.code)
    first, *rest = arguments
    if first in ("-h", "--help", "help"):
        print(usage(version))
    elif first in ("--version", "-V"):
        print(version)
    elif first == "--completion":
        print(_completion(rest))
    elif first in TOOLS:
        if first != "plan" or not {"-h", "--help"} & set(rest):
            return False
        print(plan_help())
    elif first not in COMMANDS:
        from steerlm_megatron.config.compose import nearest

        known = [*COMMANDS, *TOOLS]
        raise UserError(f"{first}: no such command{nearest(first, known)}\nlegal: {' '.join(known)}")
    elif "-h" in rest or "--help" in rest:
        from steerlm_megatron.config import compose

        others = [argument for argument in rest if argument not in ("-h", "--help")]
        compose.check(first, others)
        values = compose.composed(first, compose.flags_of(others).overrides)
        print(command_help(first, values, compose.options))
    else:
        return False
    return True


def _completion(arguments: Sequence[str]) -> str:
    from steerlm_megatron.config.compose import options

    script = completion(arguments[0] if arguments else "", options)
    if script is None:
        raise UserError("--completion: name the shell; legal: bash zsh")
    return script


def usage(version: str) -> str:
    """Return the text of ``steerlm --help``."""
    lines = [
        f"steerlm {version}: SteerLM on Megatron-Core",
        "",
        "usage: steerlm <command> [key=value ...]",
        "",
        "commands:",
        *(f"  {command.name:<11} {command.help}" for command in (*COMMANDS.values(), TOOLS["plan"])),
        "",
        "on a cluster:",
        *(f"  {tool.name:<11} {tool.help}" for tool in TOOLS.values() if tool.name != "plan"),
        "",
        "steerlm <command> --help     the command's keys, what they mean and their values",
        "steerlm <command> --cfg job  the configuration that would run",
        "steerlm --completion bash    completion of commands and keys, for bash or zsh",
        "steerlm run experiment=quickstart     everything, on an embedded corpus",
    ]
    return "\n".join(lines)


def command_help(command: str, values: Mapping[str, Any], groups: Callable[[str], list[str]]) -> str:
    """Return the keys of one command in groups, each with its value in ``values`` (nested), its rule and its meaning.

    ``groups`` gives the options of a configuration group.
    """
    from steerlm_megatron.config.schema import KEYS, Config

    about = COMMANDS[command]
    lines = textwrap.wrap(f"steerlm {command} [key=value ...]: {about.help}", WIDTH)
    if about.needs:
        lines += ["", "It needs:", *_wrapped((f"{key}", f"{what}") for key, what in about.needs.items())]
    recipes = "experiment=" + "|".join(groups("experiment")) + " sets many keys at once (conf/experiment)."
    lines += ["", *textwrap.wrap(recipes, WIDTH)]
    sections = {field.name: field for field in dataclasses.fields(Config)}
    for name, field in sections.items():
        keys = [k for k in KEYS.values() if k.name.split(".")[0] == name and about.reads_key(k.name)]
        keys = [k for k in keys if k.name != "command"]
        if not keys:
            continue
        if keys[0].name != name:  # a section, and not a key that stands alone
            said = getattr(field.default_factory, "__doc__", "") or ""
            lines += ["", *textwrap.wrap(f"{name}: {said.strip().splitlines()[0]}", WIDTH)]
            if choices := groups(name):
                lines += textwrap.wrap(f"{name}=" + "|".join(choices), WIDTH, initial_indent="  ")
        elif name == "run_dir":
            lines += ["", "The run:"]
        lines += _wrapped((f"{k.name}={shown(_at(values, k.name))}", _meaning(k)) for k in keys)
    lines += ["", "--cfg job prints the whole configuration, --multirun runs all combinations of listed values."]
    return "\n".join(lines)


def plan_help() -> str:
    """Return the text of ``steerlm plan --help``."""
    from steerlm_megatron.config.schema import KEYS

    lines = ["steerlm plan COMMAND [key=value ...]", "", TOOLS["plan"].help, ""]
    keys = [key for key in KEYS.values() if key.name.startswith("plan.")]
    return "\n".join([*lines, *_wrapped((f"{key.name}={shown(key.default)}", _meaning(key)) for key in keys)])


def launch_help(groups: Callable[[str], list[str]]) -> str:
    """Return the text of ``steerlm launch --help``; ``groups`` gives the options of a configuration group."""
    from steerlm_megatron.config.schema import KEYS

    lines = textwrap.wrap("steerlm launch COMMAND cluster=NAME [key=value ...] [--multirun] [--dry-run]", WIDTH)
    lines += ["", *textwrap.wrap(
        f"Submits {TOOLS['launch'].help}, after all checks of the configuration. cluster=NAME is one of "
        f"{' '.join(groups('cluster'))}, or the path of a file of your own with keys of cluster.", WIDTH
    )]  # fmt: skip
    lines += ["", *textwrap.wrap(
        "--multirun makes one job array of all combinations of listed values, --dry-run prints the script.", WIDTH
    ), ""]  # fmt: skip
    keys = [key for key in KEYS.values() if key.name.startswith("cluster.")]
    lines += _wrapped((f"{key.name}={shown(key.default)}", _meaning(key)) for key in keys)
    return "\n".join(lines)


def _meaning(key: Any) -> str:
    rules = "; ".join(rule.words for rule in key.rules)
    return f"{key.help} ({rules})" if rules else key.help


def _at(values: Mapping[str, Any], key: str) -> Any:
    found: Any = values
    for part in key.split("."):
        found = found[part]
    return found


def shown(value: Any) -> str:
    """Return a value as a user writes it on the command line."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value if value.isprintable() and len(value) <= 24 and value else json.dumps(value)[:24]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


def _wrapped(rows: Iterable[tuple[str, str]]) -> list[str]:
    lines = []
    for name, text in rows:
        if len(name) > _NAME_WIDTH:
            lines += textwrap.wrap(name, WIDTH, initial_indent="  ", subsequent_indent="    ")
            first = " " * (_NAME_WIDTH + 4)
        else:
            first = f"  {name:<{_NAME_WIDTH}}  "
        lines += textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * (_NAME_WIDTH + 4))
    return lines


def completion(shell: str, groups: Callable[[str], list[str]]) -> str | None:
    """Return a script that completes commands, keys and their choices; None for a shell that is not supported."""
    from steerlm_megatron.config.schema import KEYS

    if shell not in ("bash", "zsh"):
        return None
    cases = []
    for command in COMMANDS.values():
        words = [f"experiment={option}" for option in groups("experiment")]
        for key in KEYS.values():
            if key.name == "command" or not command.reads_key(key.name):
                continue
            choices = key.choices or (("true", "false") if key.type == "bool" else ())
            words += [f"{key.name}={choice}" for choice in choices] or [f"{key.name}="]
        for section in dict.fromkeys(key.split(".")[0] for key in KEYS):
            if command.reads_key(section):
                words += [f"{section}={option}" for option in groups(section)]
        cases.append(f"    {command.name}) words='{' '.join([*words, '--help', '--cfg', '--multirun'])}' ;;")
    script = f"""_steerlm() {{
  local words line="${{COMP_LINE:0:COMP_POINT}}"
  local word="${{line##* }}"
  if [ "$COMP_CWORD" -le 1 ]; then words='{" ".join([*COMMANDS, *TOOLS])} --help --version --completion'
  else case "${{COMP_WORDS[1]}}" in
{chr(10).join(cases)}
  esac; fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  [[ "${{COMPREPLY[0]}}" == *= ]] && compopt -o nospace 2>/dev/null
  # The shell splits words at =: what it holds already is not put in again.
  if [[ "$word" == *=* && "$COMP_WORDBREAKS" == *=* ]]; then
    local kept="${{word%"${{word##*=}}"}}"
    COMPREPLY=("${{COMPREPLY[@]#"$kept"}}")
  fi
}}
complete -F _steerlm steerlm
"""
    return script if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{script}"
