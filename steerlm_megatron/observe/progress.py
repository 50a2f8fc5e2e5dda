"""Progress of a long job: a bar with rate and ETA on a terminal, plain log lines elsewhere.

Owns: how progress is shown. Does not own: what is counted. Invariant: progress is shown only where ``enabled`` (rank
0), and a job that raises leaves the terminal clean.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rich.console import RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.rule import Rule
from rich.text import Text

from steerlm_megatron.observe.log import console, get_logger

MIN_INTERVAL_SEC = 5.0  # plain lines are at least this far apart
MAX_INTERVAL_SEC = 60.0  # and at most this far, however slowly the job moves
_STEP: ContextVar[str] = ContextVar("pipeline_step", default="")


@contextmanager
def pipeline_step(number: int, count: int, name: str) -> Iterator[None]:
    """Announce a step of a pipeline: print a header, mark every bar inside with ``3/9 train_ap``, print the time."""
    title = f"step {number}/{count} {name}"
    if console().is_terminal:
        console().print(Rule(title, align="left"))
    else:
        get_logger().info("== %s", title)
    token = _STEP.set(f"{number}/{count} {name}")
    start = time.monotonic()
    try:
        yield
    finally:
        _STEP.reset(token)
    get_logger().info("%s done in %s", title, format_seconds(time.monotonic() - start))


class _Bar(RichProgress):
    """A bar with its numbers on a second line, as 80 columns leave no room for the remaining time beside it."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(f"  {task.fields['info']}", no_wrap=True, overflow="ellipsis")


class Progress:
    """Count ``total`` units of work and show them.

    with Progress(total=500, label="train", unit="step") as bar:
        bar.advance(1, loss=2.31, fill=0.98)

    Without a terminal a line appears when 10 % more is done, but not within 5 s of the last line, and at least once a
    minute. A job of any length ends with one line.
    """

    def __init__(
        self,
        total: int | None,
        label: str,
        unit: str = "step",
        *,
        initial: int = 0,
        enabled: bool = True,
        terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``initial`` units were done before a resume; the bar includes them, the rate does not. ``total`` may be
        unknown.
        """
        self.total = total
        self.completed = initial
        self.unit = unit
        step = _STEP.get()
        # A bar labelled "train_ap" inside the pipeline step "3/9 train_ap" does not repeat the name.
        self.label = label if not step else (step if step.endswith(f" {label}") else f"{step} · {label}")
        self._initial = initial
        self._enabled = enabled
        self._clock = clock
        self._terminal = console().is_terminal if terminal is None else terminal
        self._fields: dict[str, Any] = {}
        self.bar: RichProgress | None = None
        self._start = self._last_time = clock()
        self._last_completed = initial

    def __enter__(self) -> Progress:
        self._start = self._last_time = self._clock()
        if self._enabled and self._terminal:
            self.bar = _Bar(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console(),
            )
            self.bar.start()
            self._task = self.bar.add_task(self.label, total=self.total, completed=self.completed, info="")
        return self

    def advance(self, units: int = 1, **fields: Any) -> None:
        """Add ``units`` that are done. ``fields`` (loss, tokens_per_sec, …) are shown until they are replaced."""
        self.set(self.completed + units, **fields)

    def set(self, completed: int, **fields: Any) -> None:
        """Set the number of units that are done in total."""
        self.completed = completed
        self._fields.update(fields)
        if self.bar is not None:
            self.bar.update(self._task, completed=completed, info=" ".join(self._info()))
        elif self._enabled and self._line_is_due():
            self._line()

    def _line_is_due(self) -> bool:
        if self.total is not None and self.completed >= self.total:
            return False  # the closing line reports the end
        waited = self._clock() - self._last_time
        if waited < MIN_INTERVAL_SEC:
            return False
        moved = self.completed - self._last_completed
        return waited >= MAX_INTERVAL_SEC or (self.total is not None and moved >= 0.1 * self.total)

    def _line(self, ended: bool = False) -> None:
        now = self._clock()
        parts = [f"{self.completed:,}/{self.total:,}" if self.total is not None else f"{self.completed:,}", self.unit]
        if self.total:
            parts.append(f"({100 * self.completed / self.total:.0f} %)")
        parts += self._info()
        parts.append(f"elapsed {format_seconds(now - self._start)}")
        left = self._seconds_left(now)
        if left is not None and not ended:
            parts.append(f"left {format_seconds(left)}")
        get_logger().info("%s: %s", self.label, " ".join(parts))
        self._last_time, self._last_completed = now, self.completed

    def _rate(self, now: float) -> float:
        seconds = now - self._start
        return (self.completed - self._initial) / seconds if seconds > 0 else 0.0

    def _seconds_left(self, now: float) -> float | None:
        rate = self._rate(now)
        return (self.total - self.completed) / rate if self.total is not None and rate > 0 else None

    def _info(self) -> list[str]:
        rate = self._rate(self._clock())
        shown = [f"{_number(rate)} {self.unit}/s"] if rate >= 1 else []
        if 0 < rate < 1:
            shown = [f"{_number(1 / rate)} s/{self.unit}"]
        return shown + [f"{name}={_number(value)}" for name, value in self._fields.items()]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        elif self._enabled:
            self._line(ended=True)


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def format_seconds(seconds: float) -> str:
    """Write seconds as ``8.3 s``, ``4:07`` or ``2:04:07``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
