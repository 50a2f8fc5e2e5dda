"""Run a training command that kills itself with SIGKILL when a step begins, as a failing machine would.

A test starts it as ``kill_command.py STEP -m steerlm_megatron COMMAND ...``.
"""

from __future__ import annotations

import os
import signal
import sys

from steerlm_megatron.cli import main
from steerlm_megatron.runtime.watch import Watch


def kill_at(step: int) -> None:
    """From now on, this process ends with SIGKILL as soon as training step ``step`` begins."""
    beat = Watch.beat

    def killed(watch: Watch, now: int, doing: str) -> None:
        if (now, doing) == (step, "computing"):
            os.kill(os.getpid(), signal.SIGKILL)
        beat(watch, now, doing)

    Watch.beat = killed  # type: ignore[method-assign]


if __name__ == "__main__":
    kill_at(int(sys.argv[1]))
    main(sys.argv[4:])
