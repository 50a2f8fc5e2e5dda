"""Write ``docs/configuration.md`` from the declarations: ``python -m steerlm_megatron.config.document``.

Owns: the page. Does not own: the meaning of keys (``schema.py``) and commands (``commands.py``). Invariant: a test
compares the page in the repository with what this module makes.
"""

from __future__ import annotations

import dataclasses

from steerlm_megatron.config.commands import COMMANDS, readers
from steerlm_megatron.config.fields import Key
from steerlm_megatron.config.help import shown
from steerlm_megatron.config.schema import KEYS, RENAMED, Config

_HEAD = """# Configuration

This page is made by `python -m steerlm_megatron.config.document`; change the declarations in
`steerlm_megatron/config/` instead.

Keys are set on the command line (`optim.lr=1e-5`), by a file of a group (`model=tiny` takes `conf/model/tiny.yaml`), or
by a recipe (`experiment=quickstart`). The default of a key is what stands here unless a file of a group sets another;
`steerlm COMMAND --help` shows the values that a command would run with. A key on the command line that the command does
not read is an error that names a command that does.
"""


def page() -> str:
    """Return the page as Markdown."""
    lines = [_HEAD, "## Commands", "", "| command | what it does | what it needs |", "|---|---|---|"]
    for command in COMMANDS.values():
        needs = ", ".join(f"`{key}`" for key in command.needs) or "–"
        lines.append(f"| `{command.name}` | {_cell(command.help)} | {needs} |")
    for field in dataclasses.fields(Config):
        keys = [key for key in KEYS.values() if key.name.split(".")[0] == field.name]
        if keys[0].name == field.name:
            if field.name == "command":
                lines += ["", "## Keys outside of sections", *_table_head()]
            lines.append(_row(keys[0])) if field.name != "pipeline" else None
        else:
            said = " ".join((getattr(field.default_factory, "__doc__", None) or "").split())
            lines += ["", f"## {field.name}", "", said.replace("``", "`"), *_table_head(), *map(_row, keys)]
    lines += [
        "",
        "## pipeline",
        "",
        "Overrides of single steps of `run`, such as `pipeline.acsft.train.epochs=3`.",
    ]
    lines += ["", "## Names that have changed", "", "| was | is | why |", "|---|---|---|"]
    lines += [f"| `{old}` | `{new}` | {why} |" for old, (new, why) in RENAMED.items()]
    return "\n".join(lines) + "\n"


def _table_head() -> list[str]:
    return ["", "| key | default | what it means | read by |", "|---|---|---|---|"]


def _row(key: Key) -> str:
    rules = "; ".join(rule.words for rule in key.rules)
    meaning = f"{key.help} ({rules})" if rules else key.help
    who = readers(key.name)
    by = "all" if len(who) == len(COMMANDS) else ", ".join(who)
    return f"| `{key.name}` | `{_cell(shown(key.default))}` | {_cell(meaning)} | {by} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(page(), end="")
