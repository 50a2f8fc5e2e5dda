"""``steerlm <command> [overrides]``: the only place that knows Hydra.

Owns: finding ``conf/``, composing and checking the configuration before anything expensive is imported, starting
ranks, exit codes.
Does not own: what commands do (``stages``). Exit codes: 0 done, 2 config or input error, 75 stopped by a signal after
saving what there was, else a fault.
"""

from __future__ import annotations

import ctypes
import difflib
import errno
import importlib
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from steerlm_megatron import __version__
from steerlm_megatron.config import load
from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import Interrupted, ReportedElsewhere, UserError
from steerlm_megatron.runtime import launcher
from steerlm_megatron.train import signals

# command → (module with run(config), what it does, whether it runs on the ranks that parallel.* asks for)
COMMANDS: dict[str, tuple[str, str, bool]] = {
    "preprocess": ("preprocess", "records or a corpus → indexed binary shards", False),
    "train_ap": ("train", "train the attribute-prediction model (step 1)", True),
    "annotate": ("annotate", "score every response of a record file (step 2)", True),
    "train_sft": ("train", "attribute-conditioned SFT, plain SFT with attributes=none (step 3)", True),
    "bootstrap": ("bootstrap", "sample at the best attribute values and score the responses (step 4)", True),
    "serve": ("serve", "OpenAI-compatible sampling server", True),
    "generate": ("generate", "sample responses for the prompts of a record file", True),
    "evaluate": ("evaluate", "attribute-prediction quality and steering curves", True),
    "export": ("export", "the model of a checkpoint alone, as a checkpoint", True),
    "report": ("report", "report.html and report.json from an evaluation", False),
    "run": ("pipeline", "all steps from one config", True),
}

_FORCED = (
    "hydra.run.dir=.",
    "hydra.sweep.dir=.",
    "hydra.sweep.subdir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
    "hydra.help.app_name=steerlm",
)
# Mappings whose keys no schema has. What is in them is checked later: a step's overrides against its configuration,
# names of attributes against the schema in use.
_FREE = ("pipeline.", "train.label_weights", "attributes.best", "data.map.")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
EXIT_USER_ERROR = 2
EXIT_REQUEUE = 75


def conf_dir() -> Path:
    """The Hydra configs: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / "train_sft.yaml").exists():
            return candidate
    raise UserError(
        f"no configuration files in {package / 'conf'} or {package.parent / 'conf'}; the installation is incomplete"
    )


def usage() -> str:
    """The text of ``steerlm --help``."""
    lines = [
        f"steerlm {__version__}: SteerLM on Megatron-Core",
        "",
        "usage: steerlm <command> [key=value ...]",
        "",
        "commands:",
    ]
    lines += [f"  {name:<11} {text}" for name, (_, text, _) in COMMANDS.items()]
    lines += [
        "",
        "steerlm <command> --help     the command's options and their defaults",
        "steerlm <command> --cfg job  the configuration that would run",
        "steerlm run experiment=quickstart     everything, on an embedded corpus",
    ]
    return "\n".join(lines)


def _nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def _register_schema() -> None:
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)


def _keys(node: Any, prefix: str = "") -> list[str]:
    from omegaconf import DictConfig

    keys: list[str] = []
    for key in node:
        name = f"{prefix}{key}"
        keys.append(name)
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            keys += _keys(child, f"{name}.")
    return keys


def _explain(error: Exception, command: str, conf: Path) -> str:
    """One line for a Hydra error: the key that is wrong, and the nearest right one."""
    from hydra import compose

    chain, text = error, str(error)
    while chain.__cause__ is not None:
        chain = chain.__cause__  # type: ignore[assignment]
        text = f"{text}\n{chain}"
    if match := re.search(r"Could not override '([^']+)'|Key '([^']+)' (?:is not in struct|not in)", text):
        key = match.group(1) or match.group(2)
        full = re.search(r"full_key: ([\w.]+)", text)
        if not match.group(1) and full:
            key = full.group(1)
        known = _keys(compose(config_name=command))
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        leaf = key.rsplit(".", 1)[-1]
        if not near:
            near = [k for k in known if k.rsplit(".", 1)[-1] == leaf][:1] or difflib.get_close_matches(
                leaf, known, n=1, cutoff=0.5
            )
        return f"{key}: no such key" + (f"; did you mean {near[0]}?" if near else f"; see steerlm {command} --help")
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, option = match.group(1).rpartition("/")
        options = sorted(p.stem for p in (conf / group).glob("*.yaml")) if group else []
        return f"{group}={option}: no such option; legal: {' '.join(options)}{_nearest(option, options)}"
    if match := re.search(r"Could not override '([^']+)'", text):
        return f"{match.group(1)}: no such group"
    full = re.search(r"full_key: ([\w.\[\]]+)", text)
    first = next((line for line in text.splitlines() if line.strip()), "invalid override")
    for line in text.splitlines():
        if "could not be converted" in line or "Invalid" in line or "mismatched" in line or "not assignable" in line:
            first = line
    return f"{full.group(1) + ': ' if full else ''}{first.strip()}"


def _check_overrides(command: str, overrides: list[str], conf: Path, sweep: bool) -> None:
    """Compose once ahead of Hydra, so that a wrong override is one clear line and exit code 2."""
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    for override in overrides:
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
    more: list[str] = []
    if sweep:  # values are lists to choose from: the first of each, and then each of the others
        parsed = OverridesParser.create().parse_overrides(overrides)
        overrides = []
        for one in parsed:
            values = list(one.sweep_string_iterator()) if one.is_sweep_override() else []
            choices = [f"{one.get_key_element()}={value}" for value in values] or [one.input_line or ""]
            overrides.append(choices[0])
            more += choices[1:]

    def problem(*chosen: str) -> str | None:
        try:
            compose(config_name=command, overrides=list(chosen))
        except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: experiment=null
            return _explain(error, command, conf)
        return None

    with initialize_config_dir(str(conf), version_base="1.3"):
        together, right, wrong = problem(*overrides), overrides, []
        if together is not None:
            # Hydra stops at the first: which others are wrong, too? A key may be there only with another's group.
            right = [one for one in overrides if problem(one) is None]
            wrong = [problem(*right, one) for one in overrides if one not in right]
        wrong += [problem(*right, one) for one in more]
    found = list(dict.fromkeys(text for text in wrong if text))
    if found or together:
        raise UserError("\n".join(found) or together)


def _flags(arguments: list[str]) -> Any:
    """Hydra's own flags (``--cfg``, ``--multirun``, ...) and, in ``.overrides``, what is left."""
    from hydra._internal.utils import get_args_parser

    return get_args_parser().parse_intermixed_args(arguments)


def _own_overrides() -> list[str]:
    """The overrides of this job alone: of a ``--multirun`` one value each."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task)


def _job(command: str) -> Callable[[Any], None]:
    def job(cfg: Any) -> None:
        config = load.from_container(cfg)
        world = launcher.world_size() if launcher.is_rank() else None
        load.finalize(config, world)
        needed = load.world_of(config)
        if world is None and needed > 1 and COMMANDS[command][2]:
            if config.run_dir is None:
                from steerlm_megatron.observe.runfolder import default_run_dir

                config.run_dir = str(default_run_dir(command))
            arguments = [command, *_own_overrides(), f"run_dir={config.run_dir}"]
            code = _launch_again(needed, arguments, config.train.max_restarts)
            if code:
                raise SystemExit(code)
            return
        module = importlib.import_module(f"steerlm_megatron.stages.{COMMANDS[command][0]}")
        module.run(config)
        if world is not None and "steerlm_megatron.runtime.parallel" in sys.modules:
            # A rank that just ends while another still waits for it makes that one abort.
            sys.modules["steerlm_megatron.runtime.parallel"].shutdown()

    return job


def _launch_again(ranks: int, arguments: list[str], max_restarts: int) -> int:
    """``_launch``, up to ``max_restarts`` times more after a fault: each starts from the run's last checkpoint. A stop
    (75), an input error (2) and a signal are no faults.
    """
    for restart in range(max_restarts + 1):
        code = _launch(ranks, arguments)
        if code in (0, EXIT_USER_ERROR, EXIT_REQUEUE) or code > 128 or restart == max_restarts:
            return code
        print(
            f"steerlm: starting all ranks again from the last checkpoint (train.max_restarts: {restart + 1} of "
            f"{max_restarts})",
            file=sys.stderr,
        )
    raise AssertionError("the loop returns")


_LAUNCHER = "STEERLM_LAUNCHER_PID"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _end_with_launcher() -> None:
    """A rank that steerlm started gets SIGTERM when its launcher is gone (kill -9): it saves and stops, as when asked.

    Without it, ranks would go on unseen, and hold what a new start needs.
    """
    launcher = os.environ.pop(_LAUNCHER, None)  # what this rank starts is not its launcher's
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(launcher):  # gone before that
        os.kill(os.getpid(), signal.SIGTERM)


def _launch(ranks: int, arguments: list[str]) -> int:
    """Start ``ranks`` processes of this command on this host with torchrun's agent. Returns the first failing rank's
    exit code.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def pass_on(number: int, _frame: Any) -> None:
        import psutil

        ranks = psutil.Process().children()
        if not ranks:
            raise Interrupted(signal.Signals(number).name)
        for rank in ranks:
            rank.send_signal(number)

    # How a rank ended is told by its own lines, the exit code and, after a fault, below.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    os.environ[_LAUNCHER] = str(os.getpid())
    # How long the agent waits after SIGTERM before it kills: ranks save first, which its 30 s may not be enough for.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(int(signals.SAVING_SEC)))
    signal.signal(signal.SIGUSR1, pass_on)  # SIGTERM and SIGINT are passed on by the agent itself
    if signals.asked():
        raise Interrupted
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=f"steerlm-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "steerlm_megatron", *arguments)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if EXIT_USER_ERROR in codes.values():
            return EXIT_USER_ERROR
        # Killed before they listened to signals, there was nothing to save. After a fault of one rank the agent stops
        # the others, which end with 75 then: that is not the run's.
        stopped = (EXIT_REQUEUE, -signal.SIGTERM, -signal.SIGUSR1)
        faults = {rank: code for rank, code in codes.items() if code not in stopped}
        if not faults:
            return EXIT_REQUEUE
        first, _ = error.get_first_failure()
        rank = first if first in faults else min(faults)
        print(f"steerlm: rank {rank} {_how_it_ended(faults[rank])}; its log is in run_dir/log", file=sys.stderr)
        return 1 if faults[rank] <= 0 else faults[rank]
    except SignalException as error:
        return EXIT_REQUEUE if error.sigval == signal.SIGTERM else 128 + int(error.sigval)
    finally:
        del os.environ[_LAUNCHER]
    return 0


def _how_it_ended(code: int) -> str:
    """Of a process that failed: ``code`` is its exit code, or minus the number of the signal that ended it."""
    if code >= 0:
        return f"failed with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    why = {
        "SIGKILL": " (perhaps for want of host memory: see dmesg)",
        "SIGBUS": " (perhaps a data file got shorter while it was read, or /dev/shm is full)",
    }
    return f"was killed by {name}{why.get(name, '')}"


def _prefix() -> str:
    rank = launcher.global_rank()
    return f"steerlm: rank {rank}: " if rank else "steerlm: "


def _is_first_to_say(text: str) -> bool:
    """What is wrong with an input is found by every rank, and said by one; before ranks know each other, by one of
    each host.
    """
    if "steerlm_megatron.runtime.parallel" not in sys.modules:
        return launcher.local_rank() == 0
    from steerlm_megatron.runtime.collectives import first_to_say

    return first_to_say(text)


def _print_error(error: UserError) -> None:
    if isinstance(error, ReportedElsewhere) or not _is_first_to_say(f"{error}"):
        return
    for line in str(error).splitlines():
        print(f"{_prefix()}error: {line}", file=sys.stderr)


def _hydra(command: str, arguments: list[str], conf: Path) -> None:
    import hydra

    overrides = _flags(arguments).overrides
    # argparse takes positional arguments in one piece: flags first, in whatever order they were typed.
    flags = [a for a in arguments if a not in overrides]
    header = f"steerlm {command} [key=value ...]: {COMMANDS[command][1]}"
    sys.argv = [f"steerlm {command}", *flags, *overrides, *_FORCED, f"hydra.help.header='{header}'"]
    # Hydra reports exceptions of the job in its own way; ours pass through it as SystemExit.
    inner = _job(command)

    def job(cfg: Any) -> None:
        sys.argv = ["steerlm", command, *arguments]  # what command.txt is to say
        try:
            inner(cfg)
        except UserError as error:
            _print_error(error)
            raise SystemExit(error.code) from None
        except OSError as error:
            if error.errno not in _NO_ROOM:
                traceback.print_exc()
                raise SystemExit(1) from None
            where = f"{error.filename}: " if error.filename else ""
            _print_error(UserError(f"{where}{error.strerror}; make room there, then start the same command again"))
            raise SystemExit(EXIT_USER_ERROR) from None
        except Exception as error:
            if signals.leaving():  # other ranks were quicker to leave
                raise Interrupted(f"a signal ({type(error).__name__} while leaving)") from None
            traceback.print_exc()
            raise SystemExit(1) from None

    hydra.main(version_base="1.3", config_path=str(conf), config_name=command)(job)()


def main(argv: list[str] | None = None) -> None:
    """Entry point of the ``steerlm`` script and of ``python -m steerlm_megatron``. Ends through ``SystemExit``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        raise SystemExit(0 if arguments else EXIT_USER_ERROR)
    if arguments[0] in ("--version", "-V"):
        print(__version__)
        raise SystemExit(0)
    try:
        if arguments[0] != "serve":  # which has an end of its own, and 0 for it
            signals.listen()
        _end_with_launcher()
        _command(arguments[0], arguments[1:])
    except Interrupted as stop:
        # One of many is enough; and a launcher stops the others in this way after an error of the main one.
        if stop.unsaid and launcher.global_rank() == 0:
            print(f"{_prefix()}stopped by {stop.unsaid}: start the same command again", file=sys.stderr)
        signals.settle()
        raise
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # `steerlm ... --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    raise SystemExit(0)


def _command(command: str, arguments: list[str]) -> None:
    rest = [f"++{a}" if a.startswith(_FREE) else a for a in arguments]
    try:
        if command not in COMMANDS:
            raise UserError(f"{command}: no such command{_nearest(command, COMMANDS)}\nlegal: {' '.join(COMMANDS)}")
        conf = conf_dir()
        _register_schema()
        flags = _flags(rest)
        if not (flags.help or flags.hydra_help or flags.info or flags.shell_completion):
            _check_overrides(command, flags.overrides, conf, sweep=flags.multirun)
    except UserError as error:
        _print_error(error)
        raise SystemExit(EXIT_USER_ERROR) from None
    _hydra(command, rest, conf)
