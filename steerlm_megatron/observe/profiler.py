"""Run torch's profiler over a few training steps on some ranks.

Owns: when the profiler runs, and the path of its trace. Invariant: it costs nothing outside the requested steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steerlm_megatron.files import atomic_path
from steerlm_megatron.observe.log import get_logger


class StepProfiler:
    """Profiles steps ``first … last`` into ``run_dir/profile/rank_R.json``, a Chrome trace (Perfetto opens it)."""

    def __init__(self, run_dir: str | Path, steps: Sequence[int], rank: int, ranks: Sequence[int] = (0,)) -> None:
        """``steps`` has the first and the last step, or is empty. ``ranks`` are those that write a trace."""
        self.first, self.last = (steps[0], steps[1]) if steps and rank in ranks else (0, -1)
        self.path = Path(run_dir) / "profile" / f"rank_{rank}.json"
        self._profile: Any = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Wrap step ``number``. The trace is written after the last profiled step, or after the last one of the run."""
        if not self.first <= number <= self.last:
            yield
            return
        if self._profile is None:
            import torch  # imported here, so that modules that only log do not load torch

            self._profile = torch.profiler.profile()
            self._profile.start()
        yield
        self._profile.step()
        if number == self.last:
            self.close()

    def close(self) -> None:
        """Write the trace, if any step was profiled."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        with atomic_path(self.path) as temporary:
            profile.export_chrome_trace(str(temporary))
        get_logger(__name__).info("profile of steps %d to %d at most: %s", self.first, self.last, self.path)
