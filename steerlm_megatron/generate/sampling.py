"""Sample token ids from logits, reproducibly.

Owns: temperature, truncation (top-k, top-p, min-p), the random numbers, and log-probabilities. Does not own: which
tokens may appear at all (``banned_ids``), what changes logits before a token is drawn (``adjust.py``), the end of a
response. Invariants: the token drawn for a row depends on that row's logits and parameters, its sequence, and on (seed,
index of the token) only, never on the other rows of the batch; a row from which nothing can be drawn gets a negative
number in place of a token, and does not affect the others. Therefore one uniform number per token, a hash of (seed,
index), goes through the inverse of the truncated distribution; there is no generator state that the order of requests
could change.

The order of operations is that of vLLM (https://docs.vllm.ai/en/latest/api/vllm/v1/sample/sampler/): log-probabilities
are those of the logits as the model gave them; then come allowed ids, ``min_tokens``, ``logit_bias`` and penalties; a
greedy row takes the largest logit, another one is divided by its temperature and truncated by min-p, top-k and top-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from steerlm_megatron.generate.adjust import Adjustments, History
from steerlm_megatron.generate.drawn import NOT_DRAWN, NOT_FINITE
from steerlm_megatron.generate.protocol import MAX_TOP_LOGPROBS
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.runtime.device import to_device

log = get_logger(__name__)

# torch.topk is called with one of these sizes, chosen by the row's k alone, because its size could decide ties and must
# not depend on the batch.
_TOPK_SIZES = (64, 512, 4096)
# Below this temperature the most likely token is drawn, since dividing by it would overflow a float.
GREEDY_BELOW = 1e-5

LOWEST_LOGPROB = torch.finfo(torch.float32).min  # takes the place of -inf, which is not JSON
_PROMPT_ROWS = 256  # prompt positions whose log-probabilities are computed at a time, to bound float32 copies of logits


@dataclass(frozen=True)
class RowParams:
    """The sampling parameters of one row; ``seed`` is in [0, 2^63). ``protocol.SamplingParams`` says what each means.

    ``stop_ids`` are not drawn before ``min_tokens`` tokens are. ``history`` is what penalties look at: a row with a
    penalty must have one. ``prompt_logprobs`` is for whoever computes the prompt; the sampler does not read it.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    logprobs: bool = False
    top_logprobs: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    history: History | None = None
    prompt_logprobs: int | None = None

    def after(self, output_ids: Sequence[int]) -> RowParams:
        """Return the parameters of a sequence that comes back into the batch after these tokens of its response."""
        if self.history is None:
            return self
        return replace(self, history=replace(self.history, output_ids=tuple(output_ids)))


def uniforms(seeds_B: np.ndarray, indices_B: np.ndarray) -> np.ndarray:
    """Return the ``indices_B``-th number of each of the streams ``seeds_B`` (uint64 [B] each): float64 [B] in [0, 1),
    SplitMix64 over both, top 53 bits.
    """
    mixed_B = _mix64(_mix64(seeds_B) ^ _mix64(indices_B + np.uint64(0x632BE59BD9B4E019)))
    return (mixed_B >> np.uint64(11)) * 2.0**-53


def _mix64(x: np.ndarray) -> np.ndarray:
    """Do :func:`steerlm_megatron.generate.protocol.mix64` of uint64 numbers, which overflow as they should."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass
class _Group:
    """Rows of a batch that go through the same torch calls."""

    rows: list[int]
    method: tuple[str, int]
    seeds_B: np.ndarray  # uint64
    index_B: torch.Tensor | None  # None stands for all rows in order
    temperature_B1: torch.Tensor
    top_k_B1: torch.Tensor
    top_p_B1: torch.Tensor
    truncates: bool
    min_p_B1: torch.Tensor | None  # None where no row of the group has one


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
        self._adjustments = Adjustments(vocab_size, device)
        self._wants_logprobs = False

    def _method(self, row: RowParams) -> tuple[str, int]:
        if row.temperature < GREEDY_BELOW or row.top_k == 1:
            return ("greedy", 0)
        if row.top_k == 0 or row.top_k >= self.vocab_size:
            return ("full", 0) if row.top_p >= 1.0 else ("topk", self.vocab_size)
        return ("topk", min([size for size in _TOPK_SIZES if size >= row.top_k] + [self.vocab_size]))

    def set_rows(self, rows: Sequence[RowParams]) -> None:
        """Set the parameters of the batch's rows, in order. What was drawn from a row with a history is remembered as
        long as rows have that history's key.
        """
        if list(rows) == self.rows:
            return
        self._adjustments.remember([row.history for row in rows if row.history is not None])
        self._group(rows)

    def _group(self, rows: Sequence[RowParams]) -> None:
        self._groups = []  # if making the groups fails, none are left that belong to other rows
        self.rows = list(rows)
        self._wants_logprobs = any(row.logprobs for row in rows)
        self._adjustments.set_rows(rows)
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
            seeds_B=np.array([row.seed for row in rows], np.uint64),
            index_B=None if all_rows else torch.tensor(members, dtype=torch.int64).to(self.device),
            temperature_B1=column([row.temperature for row in rows], torch.float64),
            top_k_B1=column([min(row.top_k or size, size) for row in rows], torch.int64),
            top_p_B1=column([row.top_p for row in rows], torch.float64),
            truncates=any(row.top_p < 1.0 for row in rows),
            min_p_B1=column([row.min_p for row in rows], torch.float64) if any(row.min_p for row in rows) else None,
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
        model_BV = logits_BV
        if self._adjustments:
            if self._wants_logprobs:
                model_BV = logits_BV.clone()
            self._adjustments.apply(logits_BV, indices)
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
        self._adjustments.count(ids_B)
        if not self._wants_logprobs:
            return ids_B, None
        chosen_B = model_BV.gather(1, ids_B.clamp(min=0).unsqueeze(1)).squeeze(1)
        # A high temperature may draw a token whose log-probability is below float32's range; -inf is not JSON.
        return ids_B, (chosen_B - model_BV.logsumexp(1)).clamp(min=LOWEST_LOGPROB)

    def most_likely(self, logits_BV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ids int64 [B, N] and log-probabilities float32 [B, N] of each row's N most likely tokens under the
        model itself, most likely first. To be called before :meth:`sample`, which overwrites logits.

        N is ``MAX_TOP_LOGPROBS`` or the size of the vocabulary, whatever the rows ask for, since the number asked of
        ``torch.topk`` could decide ties.
        """
        logits_BV = logits_BV[:, : self.vocab_size].float()
        if self._banned.numel():
            logits_BV.index_fill_(1, self._banned, float("-inf"))
        top_BN, ids_BN = torch.topk(logits_BV, min(MAX_TOP_LOGPROBS, self.vocab_size), dim=1)
        logprobs_BN = (top_BN - logits_BV.logsumexp(1, keepdim=True)).nan_to_num(nan=LOWEST_LOGPROB)
        return ids_BN, logprobs_BN.clamp(min=LOWEST_LOGPROB)

    def sample_each(
        self, rows: Sequence[RowParams], logits_BV: torch.Tensor, indices: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do :meth:`set_rows` and :meth:`sample` row by row. It is slow, for a batch in which drawing raised.

        A row whose drawing raises gets ``NOT_DRAWN``, and the others get the same tokens as in one batch.
        """
        ids: list[int] = []
        logprobs: list[float] = []
        self._adjustments.remember([row.history for row in rows if row.history is not None])
        for i, row in enumerate(rows):
            try:
                self._group([row])
                id_1, logprob_1 = self.sample(logits_BV[i : i + 1], [indices[i]])
                ids.append(int(id_1.item()))
                logprobs.append(0.0 if logprob_1 is None else float(logprob_1.item()))
            except Exception:
                log.exception("drawing a token raised for %s", row)
                ids.append(NOT_DRAWN)
                logprobs.append(0.0)
        return torch.tensor(ids, dtype=torch.int64), torch.tensor(logprobs, dtype=torch.float32)

    def draw(self, logits_BV: torch.Tensor, group: _Group, indices: Sequence[int]) -> torch.Tensor:
        """Return one id for each row of ``group``, whose logits these are."""
        if group.method[0] == "greedy":
            top_B, ids_B = logits_BV.max(1)  # the maximum of a row with a NaN is NaN
            return torch.where(top_B.isfinite(), ids_B, NOT_FINITE)
        indices_B = np.array([indices[i] for i in group.rows], np.uint64)
        numbers_B = uniforms(group.seeds_B, indices_B)
        # By pinned memory, since a copy of other memory may wait for the device.
        u_B1 = to_device(numbers_B[:, None], logits_BV.device)
        probs_BK, ids_BK = distribution(logits_BV, group)
        index_B1 = _invert(probs_BK, u_B1)
        if ids_BK is None:
            return index_B1.squeeze(1)
        drawn_B1 = ids_BK.gather(1, index_B1.clamp(min=0))
        return torch.where(index_B1 >= 0, drawn_B1, NOT_FINITE).squeeze(1)


def distribution(logits_BV: torch.Tensor, group: _Group) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what a group that is not greedy draws from: probabilities float64 [B, K], which need not add up to 1, and
    the ids int64 [B, K] that they belong to; None stands for all ids in order.

    Truncation follows vLLM (https://docs.vllm.ai/en/latest/api/vllm/sampling_params/): ``min_p`` drops tokens less
    likely than ``min_p`` times the most likely one (arXiv 2407.01082), ``top_k`` all but the k most likely, ``top_p``
    all but the smallest set of the most likely that reaches top_p of what the other two have left (arXiv 1904.09751).
    """
    name, size = group.method
    if name == "full":
        probs_BV = torch.softmax(logits_BV.double() / group.temperature_B1, 1)
        if group.min_p_B1 is not None:
            probs_BV = torch.where(probs_BV < group.min_p_B1 * probs_BV.amax(1, keepdim=True), 0.0, probs_BV)
        return probs_BV, None
    # The most likely tokens come first, so that truncation by rank and by cumulated probability both keep a prefix.
    top_BK, ids_BK = torch.topk(logits_BV, size, dim=1)
    scaled_BK = top_BK.double() / group.temperature_B1
    rank_K = torch.arange(size, device=logits_BV.device)
    scaled_BK.masked_fill_(rank_K >= group.top_k_B1, float("-inf"))
    if group.min_p_B1 is not None:
        scaled_BK.masked_fill_((scaled_BK - scaled_BK[:, :1]).exp() < group.min_p_B1, float("-inf"))
    probs_BK = torch.softmax(scaled_BK, 1)
    if group.truncates:
        before_BK = probs_BK.cumsum(1) - probs_BK
        # The smallest prefix that reaches top_p is kept, and always the first token.
        probs_BK = torch.where((before_BK < group.top_p_B1) | (rank_K == 0), probs_BK, 0.0)
    return probs_BK, ids_BK


def prompt_logprobs(
    logits_TV: torch.Tensor, ids_T: torch.Tensor, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what the model says of the tokens that follow T positions of a prompt: the log-probability float32 [T] of
    ``ids_T`` int64 [T], and the ids int64 [T, N] and log-probabilities float32 [T, N] of the most likely tokens, N =
    ``MAX_TOP_LOGPROBS`` or the size of the vocabulary.

    A prompt may hold tokens that no response does (a template's control tokens), so these log-probabilities are over
    all ids below ``vocab_size``, and those of drawn tokens over the ones that may be drawn.
    """
    parts = []
    count = min(MAX_TOP_LOGPROBS, vocab_size)
    for part_TV, part_T in zip(logits_TV.split(_PROMPT_ROWS), ids_T.split(_PROMPT_ROWS), strict=True):
        part_TV = part_TV[:, :vocab_size].float()
        total_T1 = part_TV.logsumexp(1, keepdim=True)
        chosen_T1 = part_TV.gather(1, part_T.unsqueeze(1))
        top_TN, top_ids_TN = torch.topk(part_TV, count, dim=1)
        parts.append(((chosen_T1 - total_T1).squeeze(1), top_ids_TN, top_TN - total_T1))
    chosen_T, top_ids_TN, top_TN = (torch.cat(column) for column in zip(*parts, strict=True))
    return chosen_T.clamp(min=LOWEST_LOGPROB), top_ids_TN, top_TN.clamp(min=LOWEST_LOGPROB)


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
