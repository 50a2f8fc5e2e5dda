"""What is minimised: language modelling on masked tokens, or regression of attribute values.

Owns: which positions of a row produce output, the sums of losses over them, and their counts. Does not own: scaling; an
objective returns sums and only engines divide, once, by the count of the whole global batch (DESIGN invariant 2).
Batches are taken where they are, and nothing but :meth:`Objective.terms` reads a value on the host.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from steerlm_megatron.data.batch import RowBatch


class Objective(ABC):
    """A loss that is a sum over terms. ``metric_names`` name the float64 vector of sums that :meth:`loss` returns."""

    metric_names: tuple[str, ...]

    @abstractmethod
    def output_index(self, batch: RowBatch) -> torch.Tensor:
        """int64 [K], K ≥ 1: the positions whose output is needed (a row without any asks for position 0 and ignores
        it).
        """

    @abstractmethod
    def labels(self, batch: RowBatch) -> torch.Tensor | None:
        """int64 [1, K] next tokens, or None where the model returns values instead of losses."""

    @abstractmethod
    def terms(self, batch: RowBatch) -> int:
        """How many terms the sum has: what the global batch's sum is divided by. Of a batch on the host."""

    @abstractmethod
    def loss(self, output: torch.Tensor, batch: RowBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(scalar sum of losses, float64 sums [M] in the order of ``metric_names``) from the model's output for K
        positions.
        """

    @abstractmethod
    def means(self, sums_M: Sequence[float]) -> dict[str, float]:
        """The logged metrics of summed sums. ``loss`` is always among them."""


def _at_least_one(index_K: torch.Tensor) -> torch.Tensor:
    return index_K if index_K.numel() else index_K.new_zeros(1)


class TokenObjective(Objective):
    """Cross-entropy of the next token where ``loss_mask_T`` says so: -log P(y_t | v, x, y_<t)  (SteerLM,
    arXiv 2310.05344 §3.3).
    """

    metric_names: tuple[str, ...] = ("loss", "tokens")

    def output_index(self, batch: RowBatch) -> torch.Tensor:
        return _at_least_one(batch.target_K)

    def labels(self, batch: RowBatch) -> torch.Tensor | None:
        return batch.labels_T.index_select(0, self.output_index(batch))[None]

    def terms(self, batch: RowBatch) -> int:
        return batch.target_K.numel()

    def loss(self, output: torch.Tensor, batch: RowBatch) -> tuple[torch.Tensor, torch.Tensor]:
        terms = self.terms(batch)
        total = output.float().sum() if terms else output.float().sum() * 0.0
        count = torch.full((), float(terms), dtype=torch.float64, device=total.device)
        return total, torch.stack([total.detach().double(), count])

    def means(self, sums_M: Sequence[float]) -> dict[str, float]:
        return {"loss": sums_M[0] / max(sums_M[1], 1.0)}


class RegressionObjective(Objective):
    """Masked mean squared error over the labels that are present: Σ w_a m (p - v)² / Σ m  (arXiv 2311.09528).

    ``weights``: w_a per attribute, 1 where absent. Values are on the schema's scale. The count Σ m is of labels, not of
    samples, and over the whole global batch (the reference normalises per micro-batch). ``constant_A``: the prediction
    that a model has to be better than (the training labels' mean), whose error is measured on the same labels.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: Mapping[str, float] | None = None,
        constant_A: torch.Tensor | None = None,
    ) -> None:
        self.names = tuple(names)
        self.weights_A = torch.tensor([float((weights or {}).get(name, 1.0)) for name in self.names])
        self.constant_A = torch.full((len(self.names),), torch.nan) if constant_A is None else constant_A.float()
        self._has_constant = [not math.isnan(value) for value in self.constant_A.tolist()]
        self.metric_names = ("loss", "labels") + tuple(
            f"{kind}/{n}" for kind in ("sq", "abs", "count", "constant") for n in self.names
        )

    def output_index(self, batch: RowBatch) -> torch.Tensor:
        return _at_least_one(batch.pool_P)

    def labels(self, batch: RowBatch) -> torch.Tensor | None:
        return None

    def terms(self, batch: RowBatch) -> int:
        return int(np.count_nonzero(~np.isnan(batch.values_PA.numpy())))

    def loss(self, output: torch.Tensor, batch: RowBatch) -> tuple[torch.Tensor, torch.Tensor]:
        predicted_PA = output.float().squeeze(0)
        if batch.pool_P.numel() == 0:
            empty_M = torch.zeros(len(self.metric_names), dtype=torch.float64, device=predicted_PA.device)
            return predicted_PA.sum() * 0.0, empty_M
        self.weights_A = self.weights_A.to(predicted_PA.device)  # once: it stays there
        self.constant_A = self.constant_A.to(predicted_PA.device)
        present_PA = ~batch.values_PA.isnan()
        error_PA = torch.where(present_PA, predicted_PA - batch.values_PA.nan_to_num(), 0.0)
        total = (error_PA.square() * self.weights_A).sum()
        detached = error_PA.detach().double()
        count_A = present_PA.sum(0, dtype=torch.float64)
        beside_PA = torch.where(present_PA, self.constant_A.nan_to_num() - batch.values_PA.nan_to_num(), 0.0).double()
        head = torch.stack([total.detach().double(), count_A.sum()])
        parts = (detached.square().sum(0), detached.abs().sum(0), count_A, beside_PA.square().sum(0))
        return total, torch.cat([head, *parts])

    def means(self, sums_M: Sequence[float]) -> dict[str, float]:
        named = dict(zip(self.metric_names, sums_M, strict=True))
        known = dict(zip(self.names, self._has_constant, strict=True))
        means = {"loss": named["loss"] / max(named["labels"], 1.0)}
        for name in self.names:
            if count := named[f"count/{name}"]:
                means[f"mse/{name}"] = named[f"sq/{name}"] / count
                means[f"mae/{name}"] = named[f"abs/{name}"] / count
                if known[name]:
                    means[f"constant_mse/{name}"] = named[f"constant/{name}"] / count
        return means
