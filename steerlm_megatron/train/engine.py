"""What the training loop asks of an engine.

Owns: the interface. Invariant: after N steps on the same data from the same seed, every engine at every layout holds
the same
parameters, up to rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from steerlm_megatron.data.collate import RowBatch
from steerlm_megatron.runtime.parallel import Layout


@dataclass
class StepResult:
    """One optimizer step. ``loss`` is the global batch's.

    ``skipped``: loss or gradients were not finite; parameters, optimizer state and schedule are as they were.
    ``bad_batches``: then, this data-parallel rank's micro-batches whose own loss was not (known on the last stage).
    """

    loss: float
    grad_norm: float
    lr: float
    skipped: bool = False
    bad_batches: list[int] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    # seconds on this rank: ``forward_backward`` (with the reduction of gradients) and ``optimizer``; both end with a
    # host sync
    seconds: dict[str, float] = field(default_factory=dict, compare=False)


class Engine(ABC):
    """A model with its optimizer, spread over ranks. Every method is collective over the world."""

    layout: Layout

    @abstractmethod
    def train_step(self, batches: Sequence[RowBatch]) -> StepResult:
        """Forward, backward and update on this data-parallel rank's micro-batches of one global batch."""

    @abstractmethod
    def evaluate(self, steps: Iterable[Sequence[RowBatch]]) -> dict[str, float]:
        """Metrics over all of ``steps`` (each a list of micro-batches), without gradients."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write model, optimizer, schedule and RNG states into an existing, uncommitted folder."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Restore what :meth:`save` wrote, at this or another layout."""

    @abstractmethod
    def load_model(self, folder: Path) -> None:
        """Take the model's weights alone from a checkpoint; a head that it lacks keeps its initial weights."""
