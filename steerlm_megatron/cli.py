"""``steerlm <command> [overrides]``: from a command line to a running command and its exit code.

Owns: the order of things (say what is wrong, start ranks, run), exit codes, who prints an error. Does not own: what
commands there are (``config/commands.py``), configurations (``config/compose.py``), ranks (``launch/local.py``), what
commands do (``stages``). Exit codes: 0 done, 2 config or input error, 75 stopped by a signal after saving what there
was, else a fault. What a help text does not need is imported where it is used: it takes seconds.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from steerlm_megatron import __version__
from steerlm_megatron.config.commands import COMMANDS
from steerlm_megatron.config.help import show
from steerlm_megatron.errors import Interrupted, ReportedElsewhere, UserError
from steerlm_megatron.runtime import launcher

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the ``steerlm`` script and of ``python -m steerlm_megatron``. Ends through ``SystemExit``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if not show(arguments, __version__):
            _command(arguments[0], arguments[1:])
    except UserError as error:
        _print_error(error)
        raise SystemExit(error.code) from None
    except Interrupted as stop:
        from steerlm_megatron.runtime import signals

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
    from steerlm_megatron.config import compose
    from steerlm_megatron.launch import local
    from steerlm_megatron.runtime import signals

    if command != "serve":  # which has an end of its own, and 0 for it
        signals.listen()
    local.end_with_launcher()
    compose.check(command, arguments)

    def job(cfg: Any) -> None:  # Hydra reports exceptions in its own way; ours pass through it as SystemExit
        sys.argv = ["steerlm", command, *arguments]  # what command.txt is to say
        _guarded(lambda: _job(command, cfg))

    compose.run(command, arguments, job)


def _job(command: str, cfg: Any) -> None:
    """Run a command here, or on the ranks that its configuration asks for."""
    from steerlm_megatron.config import compose, load
    from steerlm_megatron.launch import local

    config = load.from_container(cfg)
    world = launcher.world_size() if launcher.is_rank() else None
    load.finalize(config, world, alone=True)
    ranks = load.world_of(config)
    if world is None and ranks > 1 and COMMANDS[command].ranks:
        if config.run_dir is None:
            from steerlm_megatron.observe.runfolder import default_run_dir

            config.run_dir = str(default_run_dir(command))
        arguments = [command, *compose.own_overrides(), f"run_dir={config.run_dir}"]
        code = local.run_ranks(ranks, arguments, config.train.max_restarts if COMMANDS[command].trains else 0)
        if code:
            raise SystemExit(code)
        return
    importlib.import_module(f"steerlm_megatron.stages.{COMMANDS[command].module}").run(config)
    if world is not None and "steerlm_megatron.runtime.parallel" in sys.modules:
        # A rank that just ends while another still waits for it makes that one abort.
        sys.modules["steerlm_megatron.runtime.parallel"].shutdown()


def _guarded(run: Callable[[], None]) -> None:
    """``run()``, with what it raises turned into a message and an exit code."""
    from steerlm_megatron.runtime import signals

    try:
        run()
    except UserError as error:
        _print_error(error)
        raise SystemExit(error.code) from None
    except OSError as error:
        if error.errno not in _NO_ROOM:
            traceback.print_exc()
            raise SystemExit(1) from None
        where = f"{error.filename}: " if error.filename else ""
        _print_error(UserError(f"{where}{error.strerror}; make room there, then start the same command again"))
        raise SystemExit(UserError.code) from None
    except Exception as error:
        if signals.leaving():  # other ranks were quicker to leave
            raise Interrupted(f"a signal ({type(error).__name__} while leaving)") from None
        traceback.print_exc()
        raise SystemExit(1) from None


def _prefix() -> str:
    rank = launcher.global_rank()
    return f"steerlm: rank {rank}: " if rank else "steerlm: "


def _is_first_to_report(text: str) -> bool:
    """What is wrong with an input is found by every rank, and said by one; before ranks know each other, by one of each
    host.
    """
    if "steerlm_megatron.runtime.parallel" not in sys.modules:
        return launcher.local_rank() == 0
    from steerlm_megatron.runtime.collectives import first_to_report

    return first_to_report(text)


def _print_error(error: UserError) -> None:
    if not isinstance(error, ReportedElsewhere) and _is_first_to_report(f"{error}"):
        for line in str(error).splitlines():
            print(f"{_prefix()}error: {line}", file=sys.stderr)
