"""One generation step on one rank: from a plan to sampled ids.

Owns: the model's inputs, passing hidden states between stages, the cache and the sampler of this rank. Does not own:
the plan (``scheduler.py``). Invariant: the state is a function of the sequence of plans and of sampled tokens alone, so
that ranks with the same plans hold the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.group import ModelGroup
from steerlm_megatron.generate.kv_cache import BlockTables, KVCache, Span
from steerlm_megatron.generate.protocol import Limits
from steerlm_megatron.generate.sampling import BatchSampler, RowParams
from steerlm_megatron.generate.scheduler import NewRow, StepPlan
from steerlm_megatron.model.inference import InferencePath
from steerlm_megatron.model.packed_tokens import CacheShape, PackedTokens
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.runtime.device import to_device

log = get_logger(__name__)


@dataclass
class _Row:
    """What this rank knows of a row."""

    params: RowParams
    tokens: tuple[int, ...]  # of the prompt, not fed yet
    length: int  # tokens in the cache
    drawn: int  # tokens sampled
    copy_of: int | None = None  # the row after whose logits this one is sampled in its first step
    last: int = 0  # the token sampled last


class StepRunner:
    """Runs plans on this rank's part of the model. Every rank of the replica calls :meth:`run` with the same plan."""

    def __init__(
        self, model: torch.nn.Module, group: ModelGroup, vocab_size: int, banned_ids: Sequence[int], limits: Limits
    ) -> None:
        """``model`` says by ``cache_shape()`` what its keys and values take; the cache is allocated here."""
        config = getattr(model, "config", None)
        if getattr(config, "sequence_parallel", False):
            raise UserError(
                "parallel.sequence=true cannot generate: a step has one token per sequence; use parallel.sequence=false"
            )
        self.model = cast(Any, model)
        self.model.eval()
        shape: CacheShape = self.model.cache_shape()
        self.device, self.dtype = next(model.parameters()).device, shape.dtype
        self.group = group
        self._path = InferencePath(model) if InferencePath.takes(model) else None
        self.cache = KVCache(shape, limits.blocks, limits.block_tokens, self.device)
        self.sampler = BatchSampler(vocab_size, banned_ids, self.device)
        self._hidden_size: int = getattr(config, "hidden_size", 0)
        self._rows: list[_Row] = []
        self._tables = BlockTables(limits.max_batch, limits.blocks_for(limits.max_sequence_tokens))

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> tuple[list[int], list[float] | None]:
        """Return a token for each row whose tokens have all been fed, in order: ids and, where any row asked,
        log-probabilities. Collective over the replica.

        A row from which no token can be drawn gets a negative id (``sampling.NOT_FINITE``, ``NOT_DRAWN``).
        """
        self._change_rows(plan)
        logits_KV, sampled = self._forward(dict(plan.chunks))
        sampled_2K = torch.zeros((2, len(sampled)), dtype=torch.float64)  # ids are exact in float64
        if sampled and self.group.is_sampler:
            assert logits_KV is not None
            ids_K, logprobs_K = self._sample(logits_KV, sampled)
            both = [ids_K.double(), ids_K.double() if logprobs_K is None else logprobs_K.double()]
            sampled_2K = torch.stack(both).cpu()  # host sync: the scheduler needs the tokens
        if sampled:
            sampled_2K = self.group.broadcast_sampled(sampled_2K)
        if plan.copies:
            self.cache.copy(plan.copies)
        ids, logprobs = sampled_2K.tolist()
        for row, token in zip(sampled, ids, strict=True):
            row.last, row.drawn = max(int(token), 0), row.drawn + 1
        return [int(i) for i in ids], logprobs

    def _change_rows(self, plan: StepPlan) -> None:
        if plan.wipe:
            self.cache.wipe(plan.wipe)
        if plan.keep is not None:
            self._rows = [self._rows[i] for i in plan.keep]
            self._tables.keep(plan.keep)
        for new in plan.new:
            self._rows.append(_row(new))
            self._tables.add(new.blocks)
        for number, block in plan.blocks:
            self._tables.append(number, block)

    def _sample(self, logits_KV: torch.Tensor, rows: Sequence[_Row]) -> tuple[torch.Tensor, torch.Tensor | None]:
        params, drawn = [row.params for row in rows], [row.drawn for row in rows]
        try:
            self.sampler.set_rows(params)
            return self.sampler.sample(logits_KV, drawn)
        except Exception:
            log.exception("drawing tokens for a batch raised; each row is drawn on its own")
        return self.sampler.sample_each(params, logits_KV, drawn)

    def _forward(self, chunks: dict[int, int]) -> tuple[torch.Tensor | None, list[_Row]]:
        """Feed each row its tokens. Return the logits [rows, V] after those rows that have been fed all of theirs (None
        on all stages but the last), and these rows.
        """
        singles: list[tuple[Span, Sequence[int]]] = []
        longer: list[tuple[Span, Sequence[int]]] = []
        for number, row in enumerate(self._rows):
            count = chunks.get(number, 1)
            tokens = row.tokens[:count] if number in chunks else (row.last,)
            row.tokens = row.tokens[count:]
            if count:
                (singles if count == 1 else longer).append((Span(number, row.length, count), tokens))
            row.length += count
        fed = [*singles, *longer]
        ids_T = np.fromiter((token for _, tokens in fed for token in tokens), np.int64)
        positions_T = self.cache.begin(self._tables, [span for span, _ in singles], [span for span, _ in longer])
        end_of = dict(zip((span.row for span, _ in fed), np.cumsum([span.count for span, _ in fed]) - 1, strict=True))
        for number, row in enumerate(self._rows):
            if row.copy_of is not None:
                end_of[number], row.copy_of = end_of[row.copy_of], None
        numbers = [number for number, row in enumerate(self._rows) if not row.tokens and number in end_of]
        last_K = np.array([end_of[number] for number in numbers], np.int64)
        every_token = np.array_equal(last_K, np.arange(len(ids_T)))
        packed = PackedTokens(
            positions_T=positions_T,
            kv=self.cache,
            output_index_K=None if every_token else to_device(last_K, self.device),
        )
        hidden_T1D = None
        if not self.group.is_first_stage:
            hidden_T1D = self.group.receive_hidden((len(ids_T), 1, self._hidden_size), self.dtype, self.device)
        output = self._compute(to_device(ids_T, self.device), packed, hidden_T1D)
        rows = [self._rows[number] for number in numbers]
        if not self.group.is_last_stage:
            self.group.send_hidden(output)
            return None, rows
        return output, rows

    def _compute(self, ids_T: torch.Tensor, packed: PackedTokens, hidden_T1D: torch.Tensor | None) -> torch.Tensor:
        """Logits [K, V] on the last stage, hidden states [T, 1, D] on the others."""
        if self._path is not None:
            return self._path(ids_T, packed, hidden_T1D)
        if hidden_T1D is not None:
            self.model.set_input_tensor(hidden_T1D)
        assert packed.positions_T is not None
        output: torch.Tensor = self.model(
            input_ids=ids_T[None],
            position_ids=packed.positions_T[None],
            attention_mask=None,
            labels=None,
            packed_seq_params=packed,
        )
        return output[0] if self.group.is_last_stage else output


def _row(new: NewRow) -> _Row:
    return _Row(new.params, new.tokens, new.start, new.drawn, new.copy_of)
