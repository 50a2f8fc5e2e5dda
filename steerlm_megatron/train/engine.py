"""What the training loop asks of an engine.

Owns: the interface. Invariant: after N steps on the same data from the same seed, every engine at every layout holds
the same parameters, up to rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from steerlm_megatron.data.batch import RowBatch
from steerlm_megatron.runtime.parallel import Layout

# Micro-batches, per pipeline stage, between two questions whether to stop: so many that filling and draining the
# pipeline once more costs little, so few that a signal is obeyed within a minute or so.
_UNTIL_ASKED = 32


def pieces(batches: Sequence[RowBatch], stages: int) -> list[Sequence[RowBatch]]:
    """``batches`` in pieces of some ``_UNTIL_ASKED`` micro-batches a stage; all in one piece if there are few more."""
    size = _UNTIL_ASKED * stages
    count = max(1, len(batches) // size)
    cuts = [size * number for number in range(count)]
    return [batches[start:end] for start, end in zip(cuts, [*cuts[1:], len(batches)], strict=True)]


class StepGivenUp(Exception):
    """A step ended between two micro-batches because the run is to stop; nothing was updated."""


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
    # seconds on this rank: ``forward_backward`` (with the reduction of gradients; on a GPU of its stream) and
    # ``optimizer``, the rest of the step; ``own``: of the device, until it first waited for other replicas
    seconds: dict[str, float] = field(default_factory=dict, compare=False)


class Engine(ABC):
    """A model with its optimizer, spread over ranks. Every method is collective over the world."""

    layout: Layout

    @abstractmethod
    def train_step(self, batches: Sequence[RowBatch], stopping: Callable[[], bool] | None = None) -> StepResult:
        """Forward, backward and update on this data-parallel rank's micro-batches of one global batch.

        ``stopping`` is asked now and then within a step of many micro-batches, by all ranks at the same places; it
        has to answer all of them alike.

        Raises:
            StepGivenUp: ``stopping`` said yes. Parameters, optimizer, schedule and generators are as before the step;
                the engine can be saved, but trains no more.
        """

    @abstractmethod
    def evaluate(self, steps: Iterable[Sequence[RowBatch]]) -> dict[str, float]:
        """Metrics over all of ``steps`` (each a list of micro-batches), without gradients."""

    @abstractmethod
    def checkpoint_state(self) -> dict[str, Any]:
        """Model, optimizer, schedule and RNG states as a sharded state dict of Megatron-Core."""

    @abstractmethod
    def live_tensors(self) -> Iterable[torch.Tensor]:
        """The tensors that training changes, some of which :meth:`checkpoint_state` may hand out as they are."""

    @abstractmethod
    def fill(self, weights: Iterable[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
        """Take values of parameters, each this rank's part of one in float32: rounded into what the model computes
        with, unrounded into the main weights that are updated.

        A parameter that is neither filled nor loaded has no defined values. They come one by one, so that none but
        the current one takes memory twice.
        """

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Restore a saved :meth:`checkpoint_state`, of this or another layout and engine."""

    @abstractmethod
    def close(self) -> None:
        """Undo what would keep the engine, its tensors and its groups of ranks alive when nobody refers to them any
        more. It trains no more.
        """

    @abstractmethod
    def load_model(self, folder: Path) -> None:
        """Take the model's weights alone from a checkpoint; a head that it lacks keeps what it was filled with."""
