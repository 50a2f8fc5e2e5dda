"""torch's profiler over a few training steps of some ranks.

Owns: when it runs and where its trace goes. Invariant: outside the steps asked for it costs nothing.
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
        """``steps``: first and last, or nothing. ``ranks``: those that write a trace."""
        self.first, self.last = (steps[0], steps[1]) if steps and rank in ranks else (0, -1)
        self.path = Path(run_dir) / "profile" / f"rank_{rank}.json"
        self._profile: Any = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step ``number``. The trace is written after the last one, or the last that was reached in time."""
        if not self.first <= number <= self.last:
            yield
            return
        if self._profile is None:
            import torch  # observe is light for those who only log

            self._profile = torch.profiler.profile()
            self._profile.start()
        yield
        self._profile.step()
        if number == self.last:
            self.close()

    def close(self) -> None:
        """Write what was profiled, if anything was."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        with atomic_path(self.path) as temporary:
            profile.export_chrome_trace(str(temporary))
        get_logger(__name__).info("profile of steps %d to %d at most: %s", self.first, self.last, self.path)
