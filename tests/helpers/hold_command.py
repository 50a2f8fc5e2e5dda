"""Run a command that stops moving once it has drawn N responses, so that a test can kill it there.

A test starts it as ``hold_command.py N -m steerlm_megatron COMMAND ...``.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from steerlm_megatron.cli import main
from steerlm_megatron.generate.generator import Generator
from steerlm_megatron.stages.scoring import Scorer


def hold_after(responses: int) -> None:
    """From now on, this process hangs when it has drawn ``responses``, or when it is to score a second batch."""
    generate, score, scored = Generator.generate, Scorer.score, []

    def hold() -> None:
        while True:
            time.sleep(0.1)

    def draws(generator: Generator, requests: Any, progress: Any) -> Any:
        finished = []

        def held(result: Any) -> None:
            progress(result)
            finished.append(result)
            if len(finished) == responses:
                hold()

        return generate(generator, requests, held)

    def scores(scorer: Scorer, conversations: Any) -> Any:
        if scored:
            hold()
        scored.append(score(scorer, conversations))
        return scored[0]

    Generator.generate = draws  # type: ignore[method-assign]
    Scorer.score = scores  # type: ignore[method-assign]


if __name__ == "__main__":
    hold_after(int(sys.argv[1]))
    main(sys.argv[4:])
