"""Sample token ids from logits, reproducibly.

Owns: temperature, top-k and top-p truncation, the random numbers, and log-probabilities. Does not own: which tokens may
appear at all (``banned_ids``), the end of a response. Invariants: the token drawn for a row depends on that row's
logits and parameters and on (seed, index of the token) only, never on the other rows of the batch; a row from which
nothing can be drawn gets a negative number in place of a token, and does not affect the others. Therefore one uniform
number per token, a hash of (seed, index), goes through the inverse of the truncated distribution; there is no generator
state that the order of requests could change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from steerlm_megatron.generate.protocol import mix64
from steerlm_megatron.observe.log import get_logger

log = get_logger(__name__)

# torch.topk is called with one of these sizes, chosen by the row's k alone, because its size could decide ties and must
# not depend on the batch.
_TOPK_SIZES = (64, 512, 4096)
# Below this temperature the most likely token is drawn, since dividing by it would overflow a float.
GREEDY_BELOW = 1e-5

# These numbers take the place of a token in a row that has none:
NOT_FINITE = -1  # the row's largest logit is NaN or infinite
NOT_DRAWN = -2  # drawing from the row raised an exception


@dataclass(frozen=True)
class RowParams:
    """The sampling parameters of one row; ``seed`` is in [0, 2^63)."""

    temperature: float
    top_k: int
    top_p: float
    seed: int
    logprobs: bool = False


def uniform(seed: int, index: int) -> float:
    """Return a number in [0, 1), the ``index``-th of stream ``seed``: SplitMix64 over both, top 53 bits."""
    return (mix64(mix64(seed) ^ mix64(index + 0x632BE59BD9B4E019)) >> 11) * 2.0**-53


@dataclass
class _Group:
    """Rows of a batch that go through the same torch calls."""

    rows: list[int]
    method: tuple[str, int]
    index_B: torch.Tensor | None  # None stands for all rows in order
    temperature_B1: torch.Tensor
    top_k_B1: torch.Tensor
    top_p_B1: torch.Tensor
    truncates: bool


class BatchSampler:
    """Samples for a batch whose membership changes seldom: :meth:`set_rows` on change, :meth:`sample` every step."""

    def __init__(self, vocab_size: int, banned_ids: Sequence[int], device: torch.device) -> None:
        """Ids from ``vocab_size`` on are padding of the embedding and never drawn, nor is any of ``banned_ids``."""
        self.vocab_size = vocab_size
        self.device = device
        banned = sorted({i for i in banned_ids if 0 <= i < vocab_size})
        self._banned = torch.tensor(banned, dtype=torch.int64, device=device)
        self.rows: list[RowParams] = []
        self._groups: list[_Group] = []
        self._wants_logprobs = False

    def _method(self, row: RowParams) -> tuple[str, int]:
        if row.temperature < GREEDY_BELOW or row.top_k == 1:
            return ("greedy", 0)
        if row.top_k == 0 or row.top_k >= self.vocab_size:
            return ("full", 0) if row.top_p >= 1.0 else ("topk", self.vocab_size)
        return ("topk", min([size for size in _TOPK_SIZES if size >= row.top_k] + [self.vocab_size]))

    def set_rows(self, rows: Sequence[RowParams]) -> None:
        """Set the parameters of the batch's rows, in order."""
        if list(rows) == self.rows:
            return
        self._groups = []  # if making the groups fails, none are left that belong to other rows
        self.rows = list(rows)
        self._wants_logprobs = any(row.logprobs for row in rows)
        by_method: dict[tuple[str, int], list[int]] = {}
        for i, row in enumerate(rows):
            by_method.setdefault(self._method(row), []).append(i)
        self._groups = [self._make_group(method, members) for method, members in sorted(by_method.items())]

    def _make_group(self, method: tuple[str, int], members: list[int]) -> _Group:
        rows = [self.rows[i] for i in members]

        def column(values: list[float], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype).unsqueeze(1).to(self.device)

        all_rows = len(members) == len(self.rows)
        size = min(method[1], self.vocab_size)
        return _Group(
            rows=members,
            method=(method[0], size),
            index_B=None if all_rows else torch.tensor(members, dtype=torch.int64).to(self.device),
            temperature_B1=column([row.temperature for row in rows], torch.float64),
            top_k_B1=column([min(row.top_k or size, size) for row in rows], torch.int64),
            top_p_B1=column([row.top_p for row in rows], torch.float64),
            truncates=any(row.top_p < 1.0 for row in rows),
        )

    def sample(self, logits_BV: torch.Tensor, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draw one id per row; ``indices``: how many tokens each row has drawn before.

        ``logits_BV`` may be overwritten. Returns ids int64 [B] (``NOT_FINITE`` for a row without a distribution) and,
        if any row asked, log-probabilities float32 [B] (at least float32's lowest number), both on the logits' device.
        No host synchronisation.
        """
        logits_BV = logits_BV[:, : self.vocab_size].float()
        if self._banned.numel():
            logits_BV.index_fill_(1, self._banned, float("-inf"))
        ids_B: torch.Tensor | None = None
        for group in self._groups:
            part_BV = logits_BV if group.index_B is None else logits_BV.index_select(0, group.index_B)
            drawn_B = self.draw(part_BV, group, indices)
            if group.index_B is None:
                ids_B = drawn_B
            else:
                if ids_B is None:
                    ids_B = torch.empty(logits_BV.shape[0], dtype=torch.int64, device=logits_BV.device)
                ids_B.index_copy_(0, group.index_B, drawn_B)
        assert ids_B is not None, "set_rows() before sample()"
        if not self._wants_logprobs:
            return ids_B, None
        chosen_B = logits_BV.gather(1, ids_B.clamp(min=0).unsqueeze(1)).squeeze(1)
        # A high temperature may draw a token whose log-probability is below float32's range; -inf is not JSON.
        return ids_B, (chosen_B - logits_BV.logsumexp(1)).clamp(min=torch.finfo(torch.float32).min)

    def sample_each(
        self, rows: Sequence[RowParams], logits_BV: torch.Tensor, indices: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do :meth:`set_rows` and :meth:`sample` row by row. It is slow, for a batch in which drawing raised.

        A row whose drawing raises gets ``NOT_DRAWN``, and the others get the same tokens as in one batch.
        """
        ids: list[int] = []
        logprobs: list[float] = []
        for i, row in enumerate(rows):
            try:
                self.set_rows([row])
                id_1, logprob_1 = self.sample(logits_BV[i : i + 1], [indices[i]])
                ids.append(int(id_1.item()))
                logprobs.append(0.0 if logprob_1 is None else float(logprob_1.item()))
            except Exception:
                log.exception("drawing a token raised for %s", row)
                ids.append(NOT_DRAWN)
                logprobs.append(0.0)
        return torch.tensor(ids, dtype=torch.int64), torch.tensor(logprobs, dtype=torch.float32)

    def draw(self, logits_BV: torch.Tensor, group: _Group, indices: Sequence[int]) -> torch.Tensor:
        name, size = group.method
        if name == "greedy":
            top_B, ids_B = logits_BV.max(1)  # the maximum of a row with a NaN is NaN
            return torch.where(top_B.isfinite(), ids_B, NOT_FINITE)
        u_B1 = (
            torch.tensor([uniform(self.rows[i].seed, indices[i]) for i in group.rows], dtype=torch.float64)
            .unsqueeze(1)
            .to(logits_BV.device, non_blocking=True)
        )
        if name == "full":
            probs_BV = torch.softmax(logits_BV.double() / group.temperature_B1, 1)
            return _invert(probs_BV, u_B1).squeeze(1)
        # The most likely tokens come first, so that truncation by rank and by cumulated probability both keep a prefix.
        top_BK, ids_BK = torch.topk(logits_BV, size, dim=1)
        scaled_BK = top_BK.double() / group.temperature_B1
        rank_K = torch.arange(size, device=logits_BV.device)
        scaled_BK.masked_fill_(rank_K >= group.top_k_B1, float("-inf"))
        probs_BK = torch.softmax(scaled_BK, 1)
        if group.truncates:
            before_BK = probs_BK.cumsum(1) - probs_BK
            # The smallest prefix that reaches top_p is kept, and always the first token.
            probs_BK = torch.where((before_BK < group.top_p_B1) | (rank_K == 0), probs_BK, 0.0)
        index_B1 = _invert(probs_BK, u_B1)
        drawn_B1 = ids_BK.gather(1, index_B1.clamp(min=0))
        return torch.where(index_B1 >= 0, drawn_B1, NOT_FINITE).squeeze(1)


def _invert(probs_BK: torch.Tensor, u_B1: torch.Tensor) -> torch.Tensor:
    """Return the first index where the cumulated (unnormalised) probability exceeds u × total; it is never one of
    probability 0.

    The result is ``NOT_FINITE`` where a probability is NaN, as in all rows whose largest logit is NaN or infinite."""
    cdf_BK = probs_BK.cumsum(1)
    total_B1 = cdf_BK[:, -1:].contiguous()
    index_B1 = torch.searchsorted(cdf_BK, u_B1 * total_B1, right=True)
    # If u × total rounds up to the total, the last index of positive probability is right.
    last_B1 = torch.searchsorted(cdf_BK, total_B1)
    return torch.where(total_B1.isfinite(), torch.minimum(index_B1, last_B1), NOT_FINITE)
