"""One generation step on one rank: from a plan to sampled ids.

Owns: the model's inputs, the cache and the sampler of this rank. Does not own: the plan (``scheduler.py``), the forward
pass (``forward.py``). Invariant: the state is a function of the sequence of plans and of sampled tokens alone, so
that ranks with the same plans hold the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from steerlm_megatron.generate.cuda_graphs import DecodeGraphs
from steerlm_megatron.generate.drawn import Drawn
from steerlm_megatron.generate.forward import CachedForward
from steerlm_megatron.generate.group import ModelGroup
from steerlm_megatron.generate.kv_cache import BlockTables, KVCache, Span
from steerlm_megatron.generate.protocol import MAX_TOP_LOGPROBS, Limits, Top
from steerlm_megatron.generate.sampling import BatchSampler, RowParams, prompt_logprobs
from steerlm_megatron.generate.scheduler import NewRow, StepPlan
from steerlm_megatron.generate.vocabulary import Vocabulary
from steerlm_megatron.model.packed_tokens import PackedTokens
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.runtime.device import HostCopy, to_device

log = get_logger(__name__)


@dataclass
class _Row:
    """What this rank knows of a row."""

    params: RowParams
    tokens: tuple[int, ...]  # of the prompt, not fed yet
    length: int  # tokens in the cache
    drawn: int  # tokens sampled
    copy_of: int | None = None  # the row after whose logits this one is sampled in its first step
    scores: list[list[float]] = field(default_factory=list)  # of each token of the prompt so far, but the first

    @property
    def scored(self) -> bool:
        """Whether log-probabilities of its prompt are asked for and still to come."""
        return self.params.prompt_logprobs is not None and not self.drawn


@dataclass
class _Fed:
    """What a forward pass leaves: ``logits_KV`` (None on all stages but the last) has a row for each of ``rows``, which
    are sampled, and then one before each of ``targets``, the tokens of prompts that rows have ``scores`` of.
    """

    logits_KV: torch.Tensor | None
    rows: list[_Row]
    targets: list[int]
    scores: list[tuple[_Row, int]]  # (row, number of targets that are its)


class Launched:
    """A step whose computation is queued; the host waits for it in :meth:`read`. Steps are read in their order."""

    def __init__(
        self, rows: Sequence[_Row], found: torch.Tensor, scores: Sequence[tuple[_Row, int]], scored: torch.Tensor | None
    ) -> None:
        """``found`` [rows, X] and ``scored`` [targets, X], float64, are what ``StepRunner`` makes of logits."""
        self._found, self._scored = HostCopy(found), None if scored is None else HostCopy(scored)
        self._rows, self._scores = [(row, row.params, row.scored) for row in rows], scores

    def read(self) -> Drawn:
        """Return what the step gave."""
        scores = [] if self._scored is None else self._scored.tolist()
        for row, count in self._scores:
            row.scores += scores[:count]
            del scores[:count]
        found = self._found.tolist()
        drawn = Drawn([int(token[0]) for token in found], [token[1] for token in found])
        if found and len(found[0]) > 2:
            drawn.top = [_top(token[2:], row[1].top_logprobs) for token, row in zip(found, self._rows, strict=True)]
        for number, (row, params, scored) in enumerate(self._rows):
            if scored:
                count = params.prompt_logprobs or 0
                drawn.prompts[number] = [s[0] for s in row.scores], [_top(s[1:], count) for s in row.scores]
        return drawn


class StepRunner:
    """Runs plans on this rank's part of the model. Every rank of the replica calls :meth:`launch` with equal plans."""

    def __init__(self, model: torch.nn.Module, group: ModelGroup, vocabulary: Vocabulary, limits: Limits) -> None:
        """``model`` says by ``cache_shape()`` what its keys and values take; the cache is allocated here."""
        self._compute = CachedForward(model, group)
        self.model, self.device, self.group = self._compute.model, self._compute.device, group
        self.vocab_size = vocabulary.size
        self.cache = KVCache(self._compute.shape, limits.blocks, limits.block_tokens, self.device)
        self.sampler = BatchSampler(vocabulary.size, sorted(vocabulary.banned_ids), self.device)
        self._rows: list[_Row] = []
        self._last_R = torch.zeros(0, dtype=torch.int64, device=self.device)  # the token that each row got last
        longest = limits.blocks_for(limits.max_sequence_tokens)
        self._tables = BlockTables(limits.max_batch, longest)
        self._graphs: DecodeGraphs | None = None
        lacking = self._lacks_for_graphs()
        if limits.cuda_graphs and lacking is None:
            self._graphs = DecodeGraphs(self._decode, self.cache, limits.max_batch, longest)
        elif limits.cuda_graphs and self.device.type == "cuda":
            log.info("steps that decode are launched kernel by kernel, not as CUDA graphs: %s", lacking)

    def _lacks_for_graphs(self) -> str | None:
        """Return why steps cannot be recorded, or None."""
        if self.cache.kernels is None:
            return "kernels need Triton, a C compiler and a GPU of compute capability 8.0 or more"
        if not self._compute.bound:
            return "adapters are not merged, or tensor-parallel ranks share a key/value head"
        # Messages between ranks are no part of a graph.
        return None if self.group.size == 1 else f"the replica has {self.group.size} ranks"

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Queue a step. It gives a token for each row whose tokens have all been fed, in order; a row from which no
        token can be drawn gets a negative id (``drawn.NOT_FINITE``, ``NOT_DRAWN``). The next step may be queued
        before this one is read. Collective over the replica.
        """
        self._change_rows(plan)
        fed = self._forward(dict(plan.chunks))
        scored_TX = self._score_prompts(fed) if fed.scores else None
        found_KX = self._draw(fed) if fed.rows else torch.zeros((0, 2), dtype=torch.float64)
        if plan.copies:
            self.cache.copy(plan.copies)
        launched = Launched(fed.rows, found_KX, fed.scores, scored_TX)
        if fed.rows:
            ids_K = found_KX[:, 0].to(self.device, torch.int64).clamp(min=0)
            if len(fed.rows) == len(self._rows):
                self._last_R = ids_K
            else:
                sampled = {id(row) for row in fed.rows}
                numbers = [number for number, row in enumerate(self._rows) if id(row) in sampled]
                self._last_R = self._last_R.index_copy(0, to_device(np.array(numbers), self.device), ids_K)
        for row in fed.rows:
            row.drawn += 1
        return launched

    def _draw(self, fed: _Fed) -> torch.Tensor:
        """Return float64 [rows, X]: each row's token, its log-probability and, where some row asked, the most likely
        ids and their log-probabilities. (Ids are exact in float64.) Collective over the replica.
        """
        asked = any(row.params.top_logprobs for row in fed.rows)
        count = min(MAX_TOP_LOGPROBS, self.vocab_size) if asked else 0
        sampled_KX = torch.zeros((len(fed.rows), 2 + 2 * count), dtype=torch.float64)
        if self.group.is_sampler:
            assert fed.logits_KV is not None
            rows_KV = fed.logits_KV[: len(fed.rows)]
            params, drawn = [row.params for row in fed.rows], [row.drawn for row in fed.rows]
            top = self.sampler.most_likely(rows_KV) if count else None
            ids_K, logprobs_K = self._sample(rows_KV, params, drawn)
            columns = [ids_K, ids_K if logprobs_K is None else logprobs_K]
            sampled_KX = torch.stack([column.double().to(ids_K.device) for column in columns], 1)
            if top is not None:
                sampled_KX = torch.cat([sampled_KX, *(part.double().to(ids_K.device) for part in top)], 1)
        return self._of_all_ranks(sampled_KX)

    def _score_prompts(self, fed: _Fed) -> torch.Tensor:
        """Return float64 [targets, X]: each target's log-probability, and the most likely ids in its place with theirs.
        Collective over the replica.
        """
        found_TX = torch.zeros((len(fed.targets), 1 + 2 * min(MAX_TOP_LOGPROBS, self.vocab_size)), dtype=torch.float64)
        if self.group.is_sampler:
            assert fed.logits_KV is not None
            targets_T = to_device(np.array(fed.targets, np.int64), fed.logits_KV.device)
            chosen_T, ids_TN, top_TN = prompt_logprobs(fed.logits_KV[len(fed.rows) :], targets_T, self.vocab_size)
            found_TX = torch.cat([chosen_T.unsqueeze(1).double(), ids_TN.double(), top_TN.double()], 1)
        return self._of_all_ranks(found_TX)

    def _of_all_ranks(self, found: torch.Tensor) -> torch.Tensor:
        """Return what the sampling rank has found: on the device, or on the CPU where it had to be sent."""
        return found if self.group.size == 1 else self.group.broadcast_sampled(found.cpu().contiguous())

    def _change_rows(self, plan: StepPlan) -> None:
        if plan.wipe:
            self.cache.wipe(plan.wipe)
        if plan.keep is not None:
            self._rows = [self._rows[i] for i in plan.keep]
            self._tables.keep(plan.keep)
            self._last_R = self._last_R.index_select(0, to_device(np.array(plan.keep, np.int64), self.device))
        for new in plan.new:
            self._rows.append(_row(new))
            self._tables.add(new.blocks)
        if plan.new:
            self._last_R = torch.cat([self._last_R, self._last_R.new_zeros(len(plan.new))])
        for number, block in plan.blocks:
            self._tables.append(number, block)

    def _sample(
        self, logits_KV: torch.Tensor, params: Sequence[RowParams], drawn: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        try:
            self.sampler.set_rows(params)
            return self.sampler.sample(logits_KV, drawn)
        except Exception:
            log.exception("drawing tokens for a batch raised; each row is drawn on its own")
        return self.sampler.sample_each(params, logits_KV, drawn)

    def _forward(self, chunks: dict[int, int]) -> _Fed:
        """Feed each row its tokens: by a graph those that get one, and after them, since prompts may share blocks that
        they fill, the others.
        """
        decoding = [] if self._graphs is None else [n for n in range(len(self._rows)) if n not in chunks]
        if not decoding:
            return self._feed(chunks, range(len(self._rows)))[0]
        logits_BV = self._feed_by_graph(decoding)
        if not chunks:
            return _Fed(logits_BV, list(self._rows), [], [])
        fed, numbers = self._feed(chunks, sorted(chunks))
        assert fed.logits_KV is not None
        fed.logits_KV = torch.cat([logits_BV, fed.logits_KV])
        both = [*decoding, *numbers]
        if both != sorted(both):
            order = np.concatenate([np.argsort(both), np.arange(len(both), len(fed.logits_KV))])
            fed.logits_KV = fed.logits_KV.index_select(0, to_device(order, self.device))
        fed.rows = [self._rows[number] for number in sorted(both)]
        return fed

    def _feed_by_graph(self, numbers: list[int]) -> torch.Tensor:
        """Feed rows the tokens that they got last; return the logits after them, [B, V]."""
        assert self._graphs is not None
        rows = [self._rows[number] for number in numbers]
        ids_B = self._last_R
        if len(rows) < len(self._rows):
            ids_B = self._last_R.index_select(0, to_device(np.array(numbers), self.device))
        positions_B = np.array([row.length for row in rows])
        for row in rows:
            row.length += 1
        return self._graphs(ids_B, self._tables, np.array(numbers), positions_B)

    def _decode(self, ids_B: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, V] after a token of each sequence that the cache has been told of."""
        logits_BV = self._compute(ids_B, PackedTokens(positions_T=positions_B, kv=self.cache, recorded=True))
        assert logits_BV is not None
        return logits_BV

    def _feed(self, chunks: dict[int, int], rows: Sequence[int]) -> tuple[_Fed, list[int]]:
        """Feed each of ``rows`` its tokens; return also the numbers of those that are sampled."""
        singles: list[tuple[Span, tuple[int, ...]]] = []  # 0 stands for a token that is on the device
        longer: list[tuple[Span, tuple[int, ...]]] = []
        following: dict[int, int] = {}  # the token after those that a scored row is fed
        for number in rows:
            row, count = self._rows[number], chunks.get(number, 1)
            tokens: tuple[int, ...] = row.tokens[:count] if number in chunks else (0,)
            row.tokens = row.tokens[count:]
            if row.scored and row.tokens:
                following[number] = row.tokens[0]
            if count:
                (singles if count == 1 else longer).append((Span(number, row.length, count), tokens))
            row.length += count
        fed = [*singles, *longer]
        ids_T = self._ids(fed, chunks)
        positions_T = self.cache.begin(self._tables, [span for span, _ in singles], [span for span, _ in longer])
        end_of = dict(zip((span.row for span, _ in fed), np.cumsum([span.count for span, _ in fed]) - 1, strict=True))
        for number in rows:
            row = self._rows[number]
            if row.copy_of is not None:
                end_of[number], row.copy_of = end_of[row.copy_of], None
        numbers = [number for number in rows if not self._rows[number].tokens and number in end_of]
        wanted, done = [end_of[number] for number in numbers], _Fed(None, [self._rows[i] for i in numbers], [], [])
        for span, ids in fed:
            if self._rows[span.row].scored:
                targets = [*ids[1:], *([following[span.row]] if span.row in following else [])]
                first = end_of[span.row] + 1 - span.count
                wanted += range(first, first + len(targets))
                done.targets += targets
                done.scores.append((self._rows[span.row], len(targets)))
        wanted_K = np.array(wanted, np.int64)
        every_token = np.array_equal(wanted_K, np.arange(len(ids_T)))
        packed = PackedTokens(
            positions_T=positions_T,
            kv=self.cache,
            output_index_K=None if every_token else to_device(wanted_K, self.device),
        )
        done.logits_KV = self._compute(ids_T, packed)
        return done, numbers

    def _ids(self, fed: Sequence[tuple[Span, tuple[int, ...]]], chunks: dict[int, int]) -> torch.Tensor:
        """Token ids of a step, int64 [T]: those of prompts, and those that rows got last, which stay on the device."""
        if not chunks:
            return self._last_R
        ids_T = to_device(np.fromiter((token for _, tokens in fed for token in tokens), np.int64), self.device)
        decoding = [(at, span.row) for at, (span, _) in enumerate(fed) if span.row not in chunks]  # among single tokens
        if decoding:
            at_D, row_D = to_device(np.array(decoding, np.int64).T.copy(), self.device)
            ids_T.index_copy_(0, at_D, self._last_R.index_select(0, row_D))
        return ids_T


def _row(new: NewRow) -> _Row:
    return _Row(new.params, new.tokens, new.start, new.drawn, new.copy_of)


def _top(values: Sequence[float], count: int) -> Top:
    """Return the first ``count`` pairs of as many ids as log-probabilities, which ``values`` holds in this order."""
    half = len(values) // 2
    return tuple((int(i), value) for i, value in zip(values[:count], values[half : half + count], strict=True))
