"""The packed rows that a run trains on, of one corpus or of several in given proportions, and their order.

Owns: the check that corpora fit together, the share of each, the order of rows. Does not own: packing (``packing.py``),
distributing rows to steps and ranks (``loader.py``). Invariants: the order is a function of (seed, epoch) and of the
plans; over all epochs, the rows of a corpus are drawn in complete passes, each in a new order, and none is skipped.

An epoch is as many rows as all corpora have together. Without weights it holds each of them once. With weights w, the
corpus c gets the share w_c / Σ w of an epoch's rows: a small one comes several times in an epoch, a large one takes
several epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from steerlm_megatron.data.feed.dataset import ShardDataset
from steerlm_megatron.data.feed.packing import PackPlan
from steerlm_megatron.data.groups import Groups
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.data.views import Overlong, Sample, View
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.templates import Template

Int64 = npt.NDArray[np.int64]


class Corpora:
    """Shard folders that were preprocessed in the same way. ``key`` names them in errors (``data.train``)."""

    def __init__(self, datasets: Sequence[ShardDataset], key: str = "data.train") -> None:
        assert datasets
        self.datasets = list(datasets)
        first = self.datasets[0]
        for other in self.datasets[1:]:
            for what, a, b in (
                ("tokenizer", first.tokenizer.hash, other.tokenizer.hash),
                ("template", first.template.to_dict(), other.template.to_dict()),
                ("attributes", _described(first.schema), _described(other.schema)),
            ):
                if a != b:
                    raise UserError(
                        f"{key}: {other.folder} was preprocessed with another {what} than {first.folder}; "
                        "preprocess them alike"
                    )

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets)

    @property
    def name(self) -> str:
        """The folders' names for messages."""
        return ", ".join(str(dataset.folder) for dataset in self.datasets)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.datasets[0].tokenizer

    @property
    def schema(self) -> AttributeSchema | None:
        return self.datasets[0].schema

    @property
    def template(self) -> Template:
        return self.datasets[0].template

    @property
    def num_attributes(self) -> int:
        return len(self.datasets[0].manifest["labels"]["count"])

    def label_counts(self) -> dict[str, int]:
        """Count the labelled turns of weight 1 of each attribute in all corpora; empty without attributes."""
        if self.schema is None:
            return {}
        counts = np.array([dataset.manifest["labels"]["count"] for dataset in self.datasets], np.int64).sum(axis=0)
        return dict(zip(self.schema.names, counts.tolist(), strict=True))

    def label_mean(self) -> npt.NDArray[np.float32]:
        """Return float32 [A]: each attribute's mean over labelled turns of all corpora; NaN without any."""
        labels = [dataset.manifest["labels"] for dataset in self.datasets]
        count = np.sum([part["count"] for part in labels], axis=0, dtype=np.float64)
        total = np.sum([part["sum"] for part in labels], axis=0, dtype=np.float64)
        return np.divide(total, count, out=np.full(self.num_attributes, np.nan), where=count > 0).astype(np.float32)

    def rows(
        self,
        view: View,
        row_tokens: int,
        seed: int,
        overlong: str = "truncate_left_turns",
        weights: Sequence[float] = (),
        store: bool = True,
        groups: Groups | None = None,
    ) -> Rows:
        """Pack every corpus (``ShardDataset.plan``) and blend them. ``store``: keep the plans beside the shards.
        ``groups``: samples that have to share a row.
        """
        if groups is not None:
            whole = [dataset.group_plan(view, row_tokens, seed, overlong, groups) for dataset in self.datasets]
            return Rows(self, whole, seed, weights, groups)
        plans = [dataset.plan(view, row_tokens, seed, overlong, cache=store) for dataset in self.datasets]
        return Rows(self, plans, seed, weights)


class Rows:
    """The rows of all corpora, numbered consecutively, and the order of each epoch.

    Args:
        weights: each corpus's share of an epoch's rows, on any positive scale; if empty, every row occurs once.
        groups: what a loss that compares samples has to know of them.
    """

    def __init__(
        self,
        corpora: Corpora,
        plans: Sequence[PackPlan],
        seed: int,
        weights: Sequence[float] = (),
        groups: Groups | None = None,
    ) -> None:
        assert len(plans) == len(corpora.datasets) and len(weights) in (0, len(plans)) and all(len(p) for p in plans)
        self.corpora, self.plans, self.weights = corpora, list(plans), list(weights)
        self.row_tokens, self.view = plans[0].row_tokens, plans[0].view
        self._seed, self.groups = seed, groups
        self._firsts = np.cumsum([0, *(len(plan) for plan in plans)])
        self._sizes = np.concatenate([np.diff(plan.offsets) for plan in plans])
        self.shares = self._shares()  # number of rows of each corpus in an epoch

    def __len__(self) -> int:
        """Return the number of rows of an epoch."""
        return int(self._firsts[-1])

    @property
    def samples(self) -> int:
        """Number of samples of all corpora, each counted once."""
        return int(self._sizes.sum())

    def _shares(self) -> Int64:
        """Return the weights as whole numbers of rows (largest remainder); they sum to ``len(self)``."""
        if not self.weights:
            return np.diff(self._firsts)
        exact = np.array(self.weights, np.float64) / np.sum(self.weights) * len(self)
        shares = np.floor(exact).astype(np.int64)
        shares[np.argsort(shares - exact, kind="stable")[: len(self) - int(shares.sum())]] += 1
        if not shares.all():
            left_out = self.corpora.datasets[int(np.argmin(shares))].folder
            raise UserError(
                f"data.weights={self.weights} gives {left_out} not one of an epoch's {len(self)} rows; "
                "raise its weight, or leave it out of data.train"
            )
        return shares

    @property
    def samples_per_row(self) -> float:
        """Expected number of samples in a row, over an epoch."""
        means = np.array([len(plan.samples) / len(plan) for plan in self.plans])
        return float((means * self.shares).sum() / len(self))

    def order(self, epoch: int) -> Int64:
        """Return the rows of ``epoch``, int64 [len(self)]."""
        if not self.weights:
            return self._permutation(len(self), epoch)
        which = np.repeat(np.arange(len(self.plans)), self.shares)[self._permutation(len(self), epoch)]
        out = np.empty(len(self), np.int64)
        for corpus, share in enumerate(self.shares.tolist()):
            out[which == corpus] = self._firsts[corpus] + self._drawn(corpus, epoch * share, (epoch + 1) * share)
        return out

    def sample_counts(self, rows: Int64) -> Int64:
        """Return the number of samples in each of ``rows``."""
        return self._sizes[rows]

    def samples_of(self, row: int) -> list[Sample]:
        """Return the samples of a row."""
        corpus = int(np.searchsorted(self._firsts, row, side="right")) - 1
        plan, dataset = self.plans[corpus], self.corpora.datasets[corpus]
        samples = []
        for index in plan.row(row - int(self._firsts[corpus])).tolist():
            sample = dataset.sample(index, cast(View, self.view), self.row_tokens, cast(Overlong, plan.overlong))
            assert sample is not None, f"the plan has sample {index}, which the {self.view} view drops"
            samples.append(sample)
        return samples

    def report(self) -> dict[str, Any]:
        """Return plain numbers for the run's summary: those of the packing, summed over corpora; and each corpus's
        share.
        """
        parts = [plan.report() for plan in self.plans]
        if len(parts) == 1:
            return parts[0]
        summed = ("rows", "samples", "samples_total", "truncated", "cut_tokens", "dropped_overlong", "dropped_masked")
        out: dict[str, Any] = {key: sum(part[key] for part in parts) for key in summed}
        out["row_tokens"] = self.row_tokens
        out["fill"] = round(sum(part["fill"] * part["rows"] for part in parts) / out["rows"], 6)
        out["samples_per_row"] = round(self.samples_per_row, 3)
        out["corpora"] = {
            str(dataset.folder): {**part, "rows_per_epoch": share}
            for dataset, part, share in zip(self.corpora.datasets, parts, self.shares.tolist(), strict=True)
        }
        return out

    def _drawn(self, corpus: int, start: int, stop: int) -> Int64:
        """Return rows ``start … stop`` of the sequence of all passes through a corpus."""
        size = len(self.plans[corpus])
        parts = [np.zeros(0, np.int64)]
        for turn in range(start // size, -(-stop // size)):
            order = self._permutation(size, turn, corpus + 1)
            parts.append(order[max(0, start - turn * size) : stop - turn * size])
        return np.concatenate(parts)

    def _permutation(self, size: int, *key: int) -> Int64:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, *key]))).permutation(size)


def _described(schema: AttributeSchema | None) -> tuple[object, ...] | None:
    return None if schema is None else (schema.names, schema.max_level)
