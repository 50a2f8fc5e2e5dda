"""Samples of a shard folder: lengths and tokens through a view, and the packing plan.

Owns: computing lengths in bulk, the cache of plans beside the shards. Does not own: file formats (``data/shards.py``),
views (``data/views.py``). Invariant: ``lengths(view)[i]`` is the number of tokens of document i through that view,
uncut; 0 if it has no target there.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from steerlm_megatron.data.feed.packing import PackPlan, load_plan, pack, pack_groups, save_plan
from steerlm_megatron.data.groups import Groups
from steerlm_megatron.data.label_tokens import LabelTokens
from steerlm_megatron.data.shards import Shard, ShardReader
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.data.views import (
    ASSISTANT,
    OVERLONG,
    PREDICTION,
    VIEWS,
    Document,
    Overlong,
    Sample,
    View,
    make_sample,
)
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.templates import Template

_PLAN_RULES = 1  # increase it when packing or the over-long policy changes, so that plans stored before are not used


class ShardDataset:
    """The conversations of one shard folder. Opening takes the same time for any size."""

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader
        self.manifest: dict[str, Any] = reader.manifest

    @classmethod
    def open(cls, folder: str | Path, verify: bool = False) -> ShardDataset:
        """Open what ``preprocess`` wrote; ``verify`` compares checksums too. ``UserError`` if the folder is not
        complete.
        """
        return cls(ShardReader(folder, verify))

    def __len__(self) -> int:
        return len(self._reader)

    @property
    def folder(self) -> Path:
        return self._reader.folder

    @property
    def hash(self) -> str:
        """SHA-256 of the manifest, which holds the checksums of all other files."""
        return self._reader.hash

    @property
    def tokenizer(self) -> Tokenizer:
        return self._reader.tokenizer

    @property
    def schema(self) -> AttributeSchema | None:
        return self._reader.schema

    @property
    def template(self) -> Template:
        return self._reader.template

    def document(self, index: int) -> Document:
        """Return a stored document; its arrays are views of the memory-mapped files."""
        return self._reader.document(index)

    def lengths(self, view: View) -> npt.NDArray[np.int64]:
        """Return the length of every sample through ``view`` before the over-long policy; 0 without a target."""
        _check(view, VIEWS, "view")
        labels = self._label_tokens if view == "ap_text" else None
        parts = [_shard_lengths(shard, view, labels) for shard in self._reader.shards]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def sample(
        self, index: int, view: View, max_tokens: int | None = None, overlong: Overlong = "truncate_left_turns"
    ) -> Sample | None:
        """Return sample ``index`` through ``view``; None if it is dropped or has no target (never so in a plan)."""
        document = self._reader.document(index)
        labels = self._label_tokens if view == "ap_text" else None
        return make_sample(document, view, max_tokens, overlong, marker_id=self._marker_id, labels=labels)

    def label_mean(self) -> npt.NDArray[np.float32]:
        """Return float32 [A]: mean of each attribute over the labelled turns of weight 1; NaN where there is none.
        O(1).
        """
        count = np.array(self.manifest["labels"]["count"], np.float64)
        total = np.array(self.manifest["labels"]["sum"], np.float64)
        return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0).astype(np.float32)

    def plan(
        self, view: View, row_tokens: int, seed: int, overlong: str = "truncate_left_turns", cache: bool = True
    ) -> PackPlan:
        """Pack all samples into rows, or read the plan from the cache beside the shards.

        Raises ``UserError`` if no sample has a target (all tokens are masked), or if a sample is over-long and the
        policy is ``error``.
        """
        _check(view, VIEWS, "view")
        _check(overlong, OVERLONG, "data.overlong")
        if row_tokens < 2:
            raise UserError(f"train.row_tokens={row_tokens} must be at least 2")
        path = self._plan_path(view, row_tokens, seed, overlong)
        stored = load_plan(path, row_tokens, view, overlong) if cache else None
        if stored is not None and stored.total == len(self):
            return stored
        plan = self._make_plan(view, row_tokens, seed, cast(Overlong, overlong))
        if cache:
            save_plan(path, plan)
        return plan

    def ids(self) -> list[str]:
        """Return the ids of all documents in their order."""
        return [name for shard in self._reader.shards for name in shard.document_ids()]

    def group_plan(self, view: View, row_tokens: int, seed: int, overlong: str, groups: Groups) -> PackPlan:
        """Pack whole groups of samples into rows. It is not stored: it depends on the groups as well.

        Raises:
            UserError: a sample without a group; no group of two samples or more that fits a row; one that does not fit,
                with the policy ``error``.
        """
        _check(overlong, OVERLONG, "data.overlong")
        lengths = self.lengths(view)
        group_N = groups.group_N[groups.of(self.ids(), self.folder)]
        offsets, samples, too_long = pack_groups(lengths, group_N, row_tokens, seed)
        totals = np.bincount(group_N, lengths, groups.count).astype(np.int64)
        if len(too_long) and (overlong == "error" or not len(samples)):
            raise UserError(
                f"{self.folder}: {len(too_long)} groups of responses are longer than train.row_tokens={row_tokens}, "
                f"the longest has {int(totals[too_long].max())} tokens; a group has to fit a row: raise "
                "train.row_tokens (with parallel.context or engine.recompute), or draw fewer or shorter responses"
            )
        if not len(samples):
            raise UserError(f"{self.folder}: no group has two responses, so there is nothing to compare")
        return PackPlan(
            offsets, samples, row_tokens, view, overlong,
            useful_tokens=int(lengths[samples].sum()),
            total=len(self),
            overlong_dropped=int(np.isin(group_N, too_long).sum()),
            masked_dropped=len(self) - len(samples) - int(np.isin(group_N, too_long).sum()),
        )  # fmt: skip

    @cached_property
    def _marker_id(self) -> int:
        return int(self.manifest["label_marker_id"])

    @cached_property
    def _label_tokens(self) -> LabelTokens:
        if self.schema is None:
            raise UserError(f"{self.folder}: these shards have no attributes, and so no labels to predict")
        return LabelTokens.of(self.schema, self.tokenizer, self.template.label_marker)

    def _plan_path(self, view: str, row_tokens: int, seed: int, overlong: str) -> Path:
        key = f"{_PLAN_RULES} {self.hash} {view} {row_tokens} {seed} {overlong}"
        return self.folder / "plans" / f"plan-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"

    def _make_plan(self, view: View, row_tokens: int, seed: int, overlong: Overlong) -> PackPlan:
        lengths = self.lengths(view)
        masked = int(np.count_nonzero(lengths == 0))
        truncated = cut_tokens = dropped = 0
        for index in np.flatnonzero(lengths > row_tokens).tolist():
            sample = self.sample(index, view, row_tokens, overlong)
            if sample is None:
                dropped += 1
            else:
                truncated += 1
                cut_tokens += sample.cut_tokens
            lengths[index] = 0 if sample is None else len(sample.tokens_T)
        if not lengths.any():
            raise UserError(self._nothing_left(view, row_tokens, masked, dropped))
        offsets, samples = pack(lengths, row_tokens, seed)
        return PackPlan(
            offsets,
            samples,
            row_tokens,
            view,
            overlong,
            useful_tokens=int(lengths.sum()),
            total=len(self),
            truncated=truncated,
            cut_tokens=cut_tokens,
            overlong_dropped=dropped,
            masked_dropped=masked,
        )

    def _nothing_left(self, view: str, row_tokens: int, masked: int, dropped: int) -> str:
        if view in PREDICTION and masked == len(self):
            return (
                f"{self.folder}: all tokens are masked: no assistant turn of weight 1 has an attribute value to learn"
            )
        return (
            f"{self.folder}: all tokens are masked: of {len(self)} samples {masked} have no trained token, {dropped} "
            f"are longer than train.row_tokens={row_tokens} allows; raise train.row_tokens or see data.overlong"
        )


def _check(value: str, legal: tuple[str, ...], name: str) -> None:
    if value not in legal:
        raise UserError(f"{name}={value!r}; legal: {' '.join(legal)}")


def _shard_lengths(shard: Shard, view: View, label_tokens: LabelTokens | None = None) -> npt.NDArray[np.int64]:
    """Return ``ShardDataset.lengths`` of one shard, without a loop over documents."""
    lengths = shard.lengths.astype(np.int64)
    if view in ("acsft", "sft"):
        has_target = np.diff(shard.docs["spans"]) > 0
        if view == "acsft":
            return np.where(has_target, lengths, 0)
    turns, bounds = shard.turns, np.asarray(shard.docs["turns"])
    labels = np.concatenate(([0], np.cumsum(turns["label_end"].astype(np.int64) - turns["label_start"])))
    if view not in PREDICTION:
        lengths = lengths - (labels[bounds[1:]] - labels[bounds[:-1]])
        return np.where(lengths > 1 if view == "lm" else has_target, lengths, 0)
    assistant = turns["role"] == ASSISTANT
    values = np.asarray(shard.values)
    scored = np.flatnonzero(assistant & (turns["weight"] > 0) & ~np.isnan(values).all(axis=1))
    document = np.searchsorted(bounds, scored, side="right") - 1
    last = np.flatnonzero(np.diff(document, append=-1))  # index of each document's last scored turn
    turn, owner = scored[last], document[last]
    out = np.zeros(shard.documents, np.int64)
    put = assistant if label_tokens is None else np.where(assistant, label_tokens.sizes(values), 0)
    marks = np.concatenate(([0], np.cumsum(put)))
    removed, added = labels[turn + 1] - labels[bounds[owner]], marks[turn + 1] - marks[bounds[owner]]
    out[owner] = turns["mark"][turn] - removed + added
    return out
