"""Groups of responses with target weights, on which SteerLM 2.0 trains (arXiv 2406.08673 §4.5).

Owns: the fields that ``steerlm weigh`` adds to a record, reading them, the part of them that belongs to a micro-batch.
Does not own: computing the weights (``stages/weigh.py``), the loss (``train/group_objective.py``), packing
(``feed/packing.py``). Invariant: a micro-batch has a group completely or not at all, since its loss compares all of its
responses.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from steerlm_megatron.data.batch import RowBatch
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.records import expand_paths, read_json_lines

# The record's key for what is here, and the keys inside it.
TARGETS, GROUP, LOG_WEIGHT, LOGPROB = "steerlm2", "group", "log_weight", "logprob"


@dataclass(frozen=True)
class Groups:
    """The groups of a corpus. N responses, G groups.

    Args:
        names: id of a response to its number.
        group_N: int64, the group of each response.
        log_weight_N: float64, log w up to a constant of the group; -inf: weight 0.
        logprob_N: float64, log Q'(y | a, x) of the model that the response was drawn from.
        hash: SHA-256 of all of it.
        normalize: as ``steerlm2.normalize``.
    """

    names: Mapping[str, int]
    group_N: npt.NDArray[np.int64]
    log_weight_N: npt.NDArray[np.float64]
    logprob_N: npt.NDArray[np.float64]
    hash: str
    normalize: str = "none"

    def of(self, ids: Sequence[str], folder: Path) -> npt.NDArray[np.int64]:
        """Return the numbers of responses by their ids.

        Raises:
            UserError: an id that has no weight, or that occurs twice.
        """
        if lacking := [name for name in ids if name not in self.names]:
            raise UserError(
                f"data.targets: {len(lacking)} of the {len(ids)} conversations in {folder} have no weight there, the "
                f"first is {lacking[0]!r}; preprocess the file that data.targets names"
            )
        found = np.array([self.names[name] for name in ids], np.int64)
        if len(np.unique(found)) < len(found):
            raise UserError(f"{folder} has a conversation twice; preprocess it again with data.dedupe=false, once")
        return found

    @cached_property
    def count(self) -> int:
        """Number of groups."""
        return int(self.group_N.max()) + 1 if len(self.group_N) else 0

    def attach(self, batch: RowBatch) -> RowBatch:
        """Return a micro-batch of complete groups with what its loss needs, before a context-parallel rank takes its
        part.
        """
        bounds, target_K = batch.cu_seqlens.numpy(), batch.target_K.numpy()
        document_K = np.searchsorted(bounds, target_K, side="right") - 1
        documents, sample_K = np.unique(document_K, return_inverse=True)
        assert len(documents) == len(batch.sample_ids), "every sample has a token with loss"
        number_S = np.array([self.names[name] for name in batch.sample_ids], np.int64)
        groups, group_S = np.unique(self.group_N[number_S], return_inverse=True)
        scale_S = np.ones(len(number_S))
        if self.normalize == "tokens":
            tokens_S = np.bincount(sample_K, minlength=len(number_S))
            mean_G = np.bincount(group_S, tokens_S, len(groups)) / np.bincount(group_S, minlength=len(groups))
            scale_S = 1.0 / mean_G[group_S]
        return replace(
            batch,
            sample_K=torch.from_numpy(sample_K.astype(np.int64)),
            group_S=torch.from_numpy(group_S.astype(np.int64)),
            weight_S=torch.from_numpy(shares(self.log_weight_N[number_S], group_S, len(groups))),
            logprob_S=torch.from_numpy(self.logprob_N[number_S]),
            scale_S=torch.from_numpy(scale_S),
            groups=len(groups),
        )


def shares(
    log_weight_S: npt.NDArray[np.float64], group_S: npt.NDArray[np.int64], groups: int
) -> npt.NDArray[np.float64]:
    """Return w'_i = w_i / Σ_j w_j over the responses j of the group of i (arXiv 2406.08673, Eq. 7), float64 [S]. A
    group whose weights are all zero has equal shares.
    """
    most_G = np.full(groups, -np.inf)
    np.maximum.at(most_G, group_S, log_weight_S)
    nothing_G = np.isneginf(most_G)
    most_G[nothing_G] = 0.0
    raised_S = np.where(nothing_G[group_S], 1.0, np.exp(log_weight_S - most_G[group_S]))
    return raised_S / np.bincount(group_S, raised_S, groups)[group_S]


def read_groups(path: str, normalize: str = "none") -> Groups:
    """Read the groups of the record files that ``steerlm weigh`` wrote.

    Raises:
        UserError: a file that cannot be read, or a record whose fields are missing or wrong.
    """
    names: dict[str, int] = {}
    known: dict[str, int] = {}
    rows: list[tuple[int, float, float]] = []
    digest = hashlib.sha256()
    for file in expand_paths(path):
        for where, record in read_json_lines(file):
            name, found = record.get("id"), record.get(TARGETS)
            if not isinstance(name, str) or not isinstance(found, dict):
                raise UserError(f"{where}: no weights of this response ({TARGETS}); make the file with `steerlm weigh`")
            if name in names:
                raise UserError(f"{where}: the id {name!r} occurs a second time; a response has one weight")
            group, weight, logprob = found.get(GROUP), _number(found.get(LOG_WEIGHT)), _number(found.get(LOGPROB))
            if not isinstance(group, str) or math.isnan(weight) or weight == math.inf or not math.isfinite(logprob):
                raise UserError(f"{where}: {TARGETS}={json.dumps(found)} is not what `steerlm weigh` writes")
            names[name] = len(rows)
            rows.append((known.setdefault(group, len(known)), weight, logprob))
            digest.update(json.dumps([name, group, weight, logprob]).encode())
    table = np.array(rows, np.float64).reshape(-1, 3)
    return Groups(names, table[:, 0].astype(np.int64), table[:, 1], table[:, 2], digest.hexdigest(), normalize)


def _number(value: Any) -> float:
    """Return a number of a record: null is -inf, which JSON cannot write; NaN for anything else that is no number."""
    if value is None:
        return -math.inf
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
