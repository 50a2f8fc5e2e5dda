"""``steerlm <command> [overrides]``: from a command line to a running command and its exit code.

Owns: the order of work (report errors, start ranks, run). Does not own: which commands there are
(``config/commands.py``), configurations (``config/compose.py``), ranks (``launch/local.py``), how errors are said
(``runtime/reporting.py``), what commands do (``stages``). Exit codes: 0 means done, 2 a configuration or input error,
75 that a signal stopped the command after it had saved, any other a fault. Modules that a help text does not need are
imported where they are used, because importing torch takes seconds.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from steerlm_megatron import __version__
from steerlm_megatron.config.commands import COMMANDS, TOOLS
from steerlm_megatron.config.help import show
from steerlm_megatron.errors import Interrupted, UserError
from steerlm_megatron.runtime import launcher, reporting, signals


def main(argv: list[str] | None = None) -> None:
    """Run the ``steerlm`` script, or ``python -m steerlm_megatron``. It ends by raising ``SystemExit``."""
    try:
        _main(list(sys.argv[1:] if argv is None else argv))
    except SystemExit as end:
        launcher.note_exit(end.code)
        raise


def _main(arguments: list[str]) -> None:
    try:
        if not show(arguments, __version__):
            if arguments[0] in TOOLS:
                _tool(arguments[0], arguments[1:])
            else:
                _command(arguments[0], arguments[1:])
    except UserError as error:
        reporting.print_error(error)
        raise SystemExit(error.code) from None
    except Interrupted as stop:
        # One rank of many reports the stop. A launcher also stops the other ranks in this way after an error of rank 0.
        if stop.unsaid and launcher.global_rank() == 0:
            print(f"{reporting.prefix()}stopped by {stop.unsaid}: start the same command again", file=sys.stderr)
        signals.settle()
        raise
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of a pipe has ended: `steerlm ... --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    raise SystemExit(0)


def _tool(tool: str, arguments: list[str]) -> None:
    """Run a tool about runs and jobs; it prints, and its exit code is 0 unless it raises."""
    module = importlib.import_module(f"steerlm_megatron.{TOOLS[tool].module}")
    getattr(module, tool)(arguments)


def _command(command: str, arguments: list[str]) -> None:
    from steerlm_megatron.config import compose
    from steerlm_megatron.launch import local

    if command != "serve":  # the server handles signals by itself and exits with 0
        signals.listen()
    local.end_with_launcher()
    compose.check(command, arguments)

    def job(cfg: Any) -> None:  # Hydra would report our exceptions its way; SystemExit passes through it
        sys.argv = ["steerlm", command, *arguments]  # command.txt is written from it
        reporting.guarded(lambda: _job(command, cfg))

    compose.run(command, arguments, job)


def _job(command: str, cfg: Any) -> None:
    """Run a command in this process, or on the ranks that its configuration asks for."""
    import psutil

    from steerlm_megatron.config import compose, load
    from steerlm_megatron.launch import local
    from steerlm_megatron.observe import cost
    from steerlm_megatron.stages import hub

    config = load.from_container(cfg)
    hub.resolve(config)
    os.environ.update(hub.environment())  # for the ranks that this process starts
    if config.init_from is not None:
        from steerlm_megatron.stages.base import adopt_shape

        adopt_shape(config, compose.job_overrides())
    agent = launcher.ranks_of_agent()
    world = launcher.world_size() if launcher.is_rank() or agent is not None else None
    # The ranks of a job of some steps are for the layouts of these steps, which the pipeline checks.
    load.finalize(config, None if config.steps else world, alone=True)
    ranks = load.world_of(config)
    if world is None and ranks > 1 and COMMANDS[command].ranks:
        if config.run_dir is None:
            from steerlm_megatron.observe.runfolder import default_run_dir

            config.run_dir = str(default_run_dir(command))
        arguments = [command, *compose.job_overrides(), f"run_dir={config.run_dir}"]
        code = local.run_ranks(ranks, arguments, config.train.max_restarts if COMMANDS[command].trains else 0)
        if code:
            raise SystemExit(code)
        return
    if agent is not None:
        code = local.run_ranks(agent, [command, *compose.job_overrides()], 0)
        if code:
            raise SystemExit(code)
        return
    cost.process_began(psutil.Process().create_time())
    importlib.import_module(f"steerlm_megatron.stages.{COMMANDS[command].module}").run(config)
    if "steerlm_megatron.runtime.parallel" in sys.modules:
        # A rank that ends while another one still waits for it would make the other one abort, and NCCL warns of groups
        # that are left open, those of one rank too.
        sys.modules["steerlm_megatron.runtime.parallel"].shutdown()
