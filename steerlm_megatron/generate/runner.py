"""One generation step on one rank: from a plan to sampled ids.

Owns: the model's inputs, passing hidden states between stages, the cache and the sampler of this rank. Does not own:
the plan (``scheduler.py``). Invariant: the state is a function of the sequence of plans alone, so that ranks with the
same plans hold the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.group import ModelGroup
from steerlm_megatron.generate.kv_cache import KVCache
from steerlm_megatron.generate.sampling import BatchSampler, RowParams
from steerlm_megatron.generate.scheduler import StepPlan
from steerlm_megatron.model.packed_tokens import PackedTokens
from steerlm_megatron.observe.log import get_logger

log = get_logger(__name__)


class StepRunner:
    """Runs plans on this rank's part of the model. Every rank of the replica calls :meth:`run` with the same plan."""

    def __init__(self, model: torch.nn.Module, group: ModelGroup, vocab_size: int, banned_ids: Sequence[int]) -> None:
        config = getattr(model, "config", None)
        if getattr(config, "sequence_parallel", False):
            raise UserError(
                "parallel.sequence=true cannot generate: a step has one token per sequence; use parallel.sequence=false"
            )
        parameter = next(model.parameters())
        self.model = model.eval()
        self.device, self.dtype = parameter.device, parameter.dtype
        self.group = group
        self.cache = KVCache(self.device)
        self.sampler = BatchSampler(vocab_size, banned_ids, self.device)
        self._hidden_size: int = getattr(config, "hidden_size", 0)
        self._rows: list[RowParams] = []

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> tuple[list[int], list[float] | None]:
        """Return one token for each row of the plan: ids and, where any row asked, log-probabilities. Collective over
        the replica.

        A row from which no token can be drawn gets a negative id (``sampling.NOT_FINITE``, ``NOT_DRAWN``), and is wiped
        from the cache."""
        for source, target, length in plan.moves:
            self.cache.move(source, target, length)
        self.cache.resize(*plan.cache_shape, plan.lengths)
        if plan.params is not None:
            self._rows = plan.params
        logits_KV = self._forward(plan)
        decoding = len(plan.tokens)
        for i, first in enumerate(plan.duplicate_of):
            if first != i:
                self.cache.move(decoding + first, decoding + i, len(plan.prompts[i]))
        sampled_2K = torch.zeros((2, plan.size), dtype=torch.float64)  # ids are exact in float64
        if self.group.is_sampler:
            assert logits_KV is not None
            ids_K, logprobs_K = self._sample(logits_KV, plan.drawn)
            both = [ids_K.double(), ids_K.double() if logprobs_K is None else logprobs_K.double()]
            sampled_2K = torch.stack(both).cpu()  # host sync: the scheduler needs the tokens
        ids, logprobs = self.group.broadcast_sampled(sampled_2K).tolist()
        for row, i in enumerate(ids):
            if i < 0:
                self.cache.wipe(row)
        return [int(i) for i in ids], logprobs

    def _sample(self, logits_KV: torch.Tensor, drawn: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        try:
            self.sampler.set_rows(self._rows)
            return self.sampler.sample(logits_KV, drawn)
        except Exception:
            log.exception("drawing tokens for a batch raised; each row is drawn on its own")
        return self.sampler.sample_each(self._rows, logits_KV, drawn)

    def _forward(self, plan: StepPlan) -> torch.Tensor | None:
        """Return the logits [rows, V] of each row's last token; None on all stages but the last."""
        decoding = len(plan.tokens)
        tokens, last, prefill = list(plan.tokens), list(range(decoding)), []
        ends: list[int] = []
        for i, (prompt, first) in enumerate(zip(plan.prompts, plan.duplicate_of, strict=True)):
            if first == i:
                prefill.append((decoding + i, len(prompt)))
                tokens.extend(prompt)
            ends.append(len(tokens) - 1 if first == i else ends[first])
        last.extend(ends)
        positions_T = self.cache.begin(plan.lengths, prefill)
        every_token = last == list(range(len(tokens)))
        packed = PackedTokens(
            positions_T=positions_T,
            kv=self.cache,
            output_index_K=None if every_token else torch.tensor(last, dtype=torch.int64).to(self.device),
        )
        if not self.group.is_first_stage:
            shape = (len(tokens), 1, self._hidden_size)
            model: Any = self.model
            model.set_input_tensor(self.group.receive_hidden(shape, self.dtype, self.device))
        output = self.model(
            input_ids=torch.tensor([tokens], dtype=torch.int64).to(self.device),
            position_ids=positions_T.unsqueeze(0),
            attention_mask=None,
            labels=None,
            packed_seq_params=packed,
        )
        if not self.group.is_last_stage:
            self.group.send_hidden(output)
            return None
        return output[0]
