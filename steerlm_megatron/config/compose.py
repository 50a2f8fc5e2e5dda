"""Command lines through Hydra: composing a configuration, and explaining what is wrong with an override.

Owns: finding ``conf/``, all use of Hydra. Does not own: the typed configuration and its rules (``load.py``), running
the command (``cli.py``). Invariant: wrong overrides are found before Hydra runs the command, and all of them are
reported at once, each with its remedy.
"""

from __future__ import annotations

import difflib
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steerlm_megatron.config.commands import COMMANDS, unread
from steerlm_megatron.config.load import renamed
from steerlm_megatron.config.schema import KEYS, Config
from steerlm_megatron.errors import UserError

_FORCED = (
    "hydra.run.dir=.",
    "hydra.sweep.dir=.",
    "hydra.sweep.subdir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
    "hydra.help.app_name=steerlm",
)
# The schema cannot know the keys of these mappings. Their content is checked later: a step's overrides against its
# configuration, names of attributes against the attribute schema in use.
_FREE = (
    "pipeline.", "train.label_weights", "attributes.best", "data.map.", "bootstrap.max_distance", "bootstrap.best_by",
    "evaluate.judge_attributes", "evaluate.llm_judge.answers", "cluster.steps.", "cluster.environment.",
    "cluster.nccl.",
)  # fmt: skip

_PATHS: dict[str, str] = {}  # override by the name of a user's file → override by its path, for other processes


def conf_dir() -> Path:
    """Return the Hydra configs: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / "train_sft.yaml").exists():
            return candidate
    raise UserError(
        f"no configuration files in {package / 'conf'} or {package.parent / 'conf'}; the installation is incomplete"
    )


def options(group: str) -> list[str]:
    """Return what ``group=`` can be: the names of the files in ``conf/group``."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean …?`` for the known word nearest to ``word``, or nothing."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


@contextmanager
def _hydra() -> Iterator[Callable[..., Any]]:
    """Yield Hydra's ``compose``, initialised with ``conf/`` and the schema."""
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield compose


def composed(command: str, overrides: list[str]) -> Any:
    """Return the configuration of a command as plain nested data, for showing it. The overrides have to be valid."""
    from omegaconf import OmegaConf

    with _hydra() as compose:
        return OmegaConf.to_container(compose(config_name=command, overrides=_marked(_take_files(overrides))))


def _marked(arguments: list[str]) -> list[str]:
    """Prefix keys of free mappings with ``+``, since Hydra adds a new key only when it is told to."""
    return [f"++{argument}" if argument.startswith(_FREE) else argument for argument in arguments]


def flags_of(arguments: list[str]) -> Any:
    """Parse Hydra's flags (``--cfg``, ``--multirun``, ...); the other arguments are in ``.overrides``."""
    from hydra._internal.utils import get_args_parser

    return get_args_parser().parse_intermixed_args(_marked(arguments))


def check(command: str, arguments: list[str], launched: bool = False) -> None:
    """Compose the configuration once before Hydra does, so that a wrong override gives one clear line and exit code 2.

    Args:
        launched: whether ``steerlm launch`` asks, which reads ``cluster.*`` itself and takes any command.

    Raises:
        UserError: with one line for each override that is wrong, or that the command does not read.
    """
    flags = flags_of(_take_files(arguments))
    if flags.hydra_help or flags.info or flags.shell_completion:
        return
    parsed = [_parsed(override, flags.multirun) for override in flags.overrides]
    keys = {override: one.key_or_group for override, one in zip(flags.overrides, parsed, strict=True)}
    misplaced = {override: said for override, key in keys.items() if (said := misplaced_key(command, key, launched))}
    rest = [(o, one) for o, one in zip(flags.overrides, parsed, strict=True) if o not in misplaced]
    overrides, more = _choices([one for _, one in rest]) if flags.multirun else ([o for o, _ in rest], [])
    wrong = _wrong(command, overrides, more)
    if found := list(dict.fromkeys([*misplaced.values(), *wrong])):
        raise UserError("\n".join(found))


def _parsed(override: str, sweep: bool) -> Any:
    """Return an override as Hydra understands it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, _, value = override.partition("=")
    try:
        (one,) = OverridesParser.create().parse_overrides([override])
    except HydraException as error:
        reason = str(error).splitlines()[0].partition(": ")[0]
        in_list = value.startswith("[") and value.endswith("]")
        quoted = "[" + ",".join(f'"{item}"' for item in value[1:-1].split(",")) + "]" if in_list else f'"{value}"'
        raise UserError(
            f"{override}: Hydra cannot read the value ({reason}); quote it, in the shell's quotes: '{key}={quoted}'"
        ) from None
    if one.is_sweep_override() and not sweep:
        raise UserError(f"{override}: several values; write a list in brackets: '{key}=[{value}]'")
    return one


def quoted(text: str) -> str:
    """Return ``text`` as a value on a command line of Hydra, where some characters mean something."""
    # Only before a quotation mark is a backslash an escape.
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text) + "'"


def misplaced_key(command: str, key: str, launched: bool = False) -> str | None:
    """Return the error for a key that this command does not read, or that has another name now; None for others.
    ``launched`` as in :func:`check`.
    """
    if said := renamed(key):
        return said
    if launched and is_of_cluster(key):
        return None
    known = key in KEYS or any(name.startswith(f"{key}.") for name in KEYS) or key.startswith(_FREE)
    if not known:  # Hydra's own error explains a misspelt key; experiment= and hydra.* are no keys of ours
        return None
    return next(iter(unread(command, [key])), None)


def _choices(parsed: list[Any]) -> tuple[list[str], list[str]]:
    """Split overrides whose values are lists to choose from (``--multirun``) into the first of each and the others."""
    first, more = [], []
    for one in parsed:
        values = list(one.sweep_string_iterator()) if one.is_sweep_override() else []
        choices = [f"{one.get_key_element()}={value}" for value in values] or [one.input_line or ""]
        first.append(choices[0])
        more += choices[1:]
    return first, more


def _wrong(command: str, overrides: list[str], more: list[str]) -> list[str]:
    """Return what is wrong with ``overrides`` together, and with each of ``more`` in the place of the same key."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    with _hydra() as compose:

        def problem(*chosen: str) -> str | None:
            try:
                compose(config_name=command, overrides=list(chosen))
            except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: experiment=null
                return _explain(error, command)
            return None

        together, right, wrong = problem(*overrides), overrides, []
        if together is not None:
            # Hydra stops at the first error, so the others are looked for. A key may exist only with another override's
            # group.
            right = [one for one in overrides if problem(one) is None]
            wrong = [problem(*right, one) for one in overrides if one not in right]
        wrong += [problem(*right, one) for one in more]
    found = [text for text in wrong if text]
    return found or ([together] if together else [])


# The line of an error of Hydra or OmegaConf with one of these says what is wrong with a value.
_REASONS = ("could not be converted", "is not a valid", "Invalid", "mismatched", "not assignable")


def _explain(error: Exception, command: str) -> str:
    """Return one line for a Hydra error: the key that is wrong, and the nearest right one."""
    chain, text = error, str(error)
    while chain.__cause__ is not None:
        chain = chain.__cause__  # type: ignore[assignment]
        text = f"{text}\n{chain}"
    if match := re.search(r"Could not override '([^']+)'|Key '([^']+)' (?:is not in struct|not in)", text):
        key = match.group(1) or match.group(2)
        full = re.search(r"full_key: ([\w.]+)", text)
        if not match.group(1) and full:
            key = full.group(1)
        return renamed(key) or f"{key}: no such key{_nearest_key(key, command)}"
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, option = match.group(1).rpartition("/")
        legal = options(group) if group else []
        return f"{group}={option}: no such option; legal: {' '.join(legal)}{nearest(option, legal)}"
    full = re.search(r"full_key: ([\w.\[\]]+)", text)
    first = next((line for line in text.splitlines() if line.strip()), "invalid override")
    for line in text.splitlines():
        if any(words in line for words in _REASONS):
            first = line
    return f"{full.group(1) + ': ' if full else ''}{first.strip()}"


def _nearest_key(key: str, command: str) -> str:
    """Return the key that was probably meant, by its full name or last part; keys that the command reads come first."""
    leaf = key.rsplit(".", 1)[-1]
    section = [k for k in KEYS if k.startswith("cluster.")] if is_of_cluster(key) else []
    for known in (section, [k for k in KEYS if COMMANDS[command].reads_key(k)], list(KEYS)):
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        near = near or [k for k in known if k.rsplit(".", 1)[-1] == leaf][:1]
        near = near or difflib.get_close_matches(leaf, known, n=1, cutoff=0.5)
        if near:
            return f"; did you mean {near[0]}?"
    return f"; see steerlm {command} --help"


def is_of_cluster(override: str) -> bool:
    """Return whether an override or key is about the cluster (``cluster=NAME``, ``cluster.nodes=2``)."""
    return override.lstrip("+~").partition("=")[0].split(".")[0] == "cluster"


def _file_of(override: str) -> tuple[str, str] | None:
    """Return group and path of an override that names a file of the user's for a group, such as
    ``attributes=/path/mine.yaml``; None for others.
    """
    group, _, path = override.partition("=")
    if not group.isidentifier() or not path.endswith((".yaml", ".yml")) or not (conf_dir() / group).is_dir():
        return None
    return group, path


def absolute_files(overrides: list[str]) -> list[str]:
    """Return ``overrides`` with absolute paths of files for groups, for a process that starts in another folder."""
    found = {one: _file_of(one) for one in overrides}
    return [
        override if file is None else f"{file[0]}={Path(file[1]).expanduser().absolute()}"
        for override, file in found.items()
    ]


def _take_files(arguments: list[str]) -> list[str]:
    """Return ``arguments`` in which a file for a group (``attributes=/path/mine.yaml``) is replaced by a name by which
    Hydra finds the file's content. As in files of ``conf/``, a first line ``# @package _global_`` lets it set keys of
    other sections, which an experiment does.

    Raises:
        UserError: a file cannot be read, or is no mapping.
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import DictConfig, OmegaConf
    from yaml import YAMLError

    found = []
    for argument in arguments:
        file = _file_of(argument)
        if file is None:
            found.append(argument)
            continue
        group, path = file
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
            content = OmegaConf.create(text)
        except (OSError, ValueError, YAMLError) as error:
            raise UserError(f"{group}={path} cannot be read: {' '.join(str(error).split())}") from None
        if not isinstance(content, DictConfig) or not content:
            raise UserError(f"{group}={path} has no keys; write them as the files in conf/{group} do, one a line")
        name = f"file_{re.sub(r'[^A-Za-z0-9_]', '_', Path(path).stem)}"
        header = re.search(r"^# *@package +(\S+)", text, re.MULTILINE)
        ConfigStore.instance().store(group=group, name=name, node=content, package=header.group(1) if header else None)
        _PATHS[f"{group}={name}"] = f"{group}={Path(path).expanduser().absolute()}"
        found.append(f"{group}={name}")
    return found


def sweep(arguments: list[str]) -> list[list[str]]:
    """Return the overrides of each job of a ``--multirun``: all combinations of the values that are listed. Without
    that flag there is one job.
    """
    flags = flags_of(arguments)
    choices = []
    for override in flags.overrides:
        one = _parsed(override.lstrip("+"), flags.multirun)
        values = list(one.sweep_string_iterator()) if one.is_sweep_override() else []
        choices.append([f"{one.get_key_element()}={value}" for value in values] or [override.lstrip("+")])
    return [list(jobs) for jobs in itertools.product(*choices)]


def job_overrides() -> list[str]:
    """Return the overrides of this job; in a ``--multirun`` each key has one value here."""
    from hydra.core.hydra_config import HydraConfig

    return [_PATHS.get(override, override) for override in HydraConfig.get().overrides.task]


def run(command: str, arguments: list[str], job: Callable[[Any], None]) -> None:
    """Let Hydra compose the configuration and call ``job`` with it, once per job of a ``--multirun``."""
    import hydra
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)
    arguments = _take_files(arguments)
    marked = _marked(arguments)
    overrides = flags_of(arguments).overrides
    # argparse accepts positional arguments in one run only, so flags go first, in whatever order they were typed.
    flags = [argument for argument in marked if argument not in overrides]
    sys.argv = [f"steerlm {command}", *flags, *overrides, *_FORCED]
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=command)(job)()
