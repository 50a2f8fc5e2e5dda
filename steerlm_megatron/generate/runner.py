"""One generation step on one rank: from a plan to sampled ids.

Owns: the model's inputs, passing hidden states between stages, the cache and the sampler of this rank. Does not own:
the plan (``scheduler.py``). Invariant: the state is a function of the sequence of plans alone, so that ranks with the
same plans hold the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.group import ModelGroup
from steerlm_megatron.generate.kv_cache import KVCache
from steerlm_megatron.generate.protocol import MAX_TOP_LOGPROBS, Top
from steerlm_megatron.generate.sampling import BatchSampler, RowParams, prompt_logprobs
from steerlm_megatron.generate.scheduler import StepPlan
from steerlm_megatron.model.packed_tokens import PackedTokens
from steerlm_megatron.observe.log import get_logger

log = get_logger(__name__)


@dataclass
class Drawn:
    """What a step gives: one token for each row, and what rows asked to know of it.

    ``top``: per row the most likely tokens, as many as it asked for. ``prompts``: for each row whose prompt was
    computed and that asked, the log-probability of each token of the prompt but the first, and the most likely tokens
    in its place.
    """

    ids: list[int]
    logprobs: list[float]
    top: list[Top] = field(default_factory=list)
    prompts: dict[int, tuple[list[float], list[Top]]] = field(default_factory=dict)


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
        self.vocab_size = vocab_size
        self.cache = KVCache(self.device)
        self.sampler = BatchSampler(vocab_size, banned_ids, self.device)
        self._hidden_size: int = getattr(config, "hidden_size", 0)
        self._rows: list[RowParams] = []

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Drawn:
        """Return one token for each row of the plan. Collective over the replica.

        A row from which no token can be drawn gets a negative id (``sampling.NOT_FINITE``, ``NOT_DRAWN``), and is wiped
        from the cache."""
        for source, target, length in plan.moves:
            self.cache.move(source, target, length)
        self.cache.resize(*plan.cache_shape, plan.lengths)
        if plan.params is not None:
            self._rows = plan.params
        scored = self._scored_prompts(plan)
        logits_KV = self._forward(plan, scored)
        decoding = len(plan.tokens)
        for i, first in enumerate(plan.duplicate_of):
            if first != i:
                self.cache.move(decoding + first, decoding + i, len(plan.prompts[i]))
        count = min(MAX_TOP_LOGPROBS, self.vocab_size) if any(row.top_logprobs for row in self._rows) else 0
        # Ids are exact in float64. Each row has its id, log-probability, the most likely ids, and theirs.
        sampled_KX = torch.zeros((plan.size, 2 + 2 * count), dtype=torch.float64)
        if self.group.is_sampler:
            assert logits_KV is not None
            rows_KV = logits_KV[: plan.size]
            top = self.sampler.most_likely(rows_KV) if count else ()
            ids_K, logprobs_K = self._sample(rows_KV, plan.drawn)
            columns = [ids_K, ids_K if logprobs_K is None else logprobs_K]
            columns_KX = torch.stack([column.double().to(ids_K.device) for column in columns], 1)
            # host sync: the scheduler needs the tokens
            sampled_KX = torch.cat([columns_KX, *(part.double() for part in top)], 1).cpu()
        found = self.group.broadcast_sampled(sampled_KX.contiguous()).tolist()
        ids = [int(row[0]) for row in found]
        for row, i in enumerate(ids):
            if i < 0:
                self.cache.wipe(row)
        wanted = [params.top_logprobs for params in self._rows]
        top_K = [_top(row[2:], n) for row, n in zip(found, wanted, strict=True)] if count else []
        prompts = self._score_prompts(plan, scored, None if logits_KV is None else logits_KV[plan.size :])
        return Drawn(ids, [row[1] for row in found], top_K, prompts)

    def _scored_prompts(self, plan: StepPlan) -> list[int]:
        """Return the prompts of this step, each the first of its equals, whose log-probabilities some row asks for."""
        decoding = len(plan.tokens)
        asked = {
            first for i, first in enumerate(plan.duplicate_of) if self._rows[decoding + i].prompt_logprobs is not None
        }
        return sorted(i for i in asked if len(plan.prompts[i]) > 1)

    def _score_prompts(
        self, plan: StepPlan, scored: Sequence[int], logits_TV: torch.Tensor | None
    ) -> dict[int, tuple[list[float], list[Top]]]:
        """Return ``Drawn.prompts``; ``logits_TV`` are those of the scored prompts, end to end, without their last ones.
        Collective over the replica.
        """
        decoding = len(plan.tokens)
        of_prompt: dict[int, list[list[float]]] = {i: [] for i in range(len(plan.prompts))}
        if scored:
            targets = [token for i in scored for token in plan.prompts[i][1:]]
            count = min(MAX_TOP_LOGPROBS, self.vocab_size)
            found_TX = torch.zeros((len(targets), 1 + 2 * count), dtype=torch.float64)
            if self.group.is_sampler:
                assert logits_TV is not None
                targets_T = torch.tensor(targets, dtype=torch.int64).to(logits_TV.device)
                chosen_T, ids_TN, top_TN = prompt_logprobs(logits_TV, targets_T, self.vocab_size)
                found_TX = torch.cat([chosen_T.unsqueeze(1).double(), ids_TN.double(), top_TN.double()], 1).cpu()
            found = self.group.broadcast_sampled(found_TX.contiguous()).tolist()
            for i in scored:
                of_prompt[i], found = found[: len(plan.prompts[i]) - 1], found[len(plan.prompts[i]) - 1 :]
        prompts: dict[int, tuple[list[float], list[Top]]] = {}
        for i, first in enumerate(plan.duplicate_of):
            wanted = self._rows[decoding + i].prompt_logprobs
            if wanted is not None:
                tokens = of_prompt[first]
                prompts[decoding + i] = [token[0] for token in tokens], [_top(token[1:], wanted) for token in tokens]
        return prompts

    def _sample(self, logits_KV: torch.Tensor, drawn: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        try:
            self.sampler.set_rows(self._rows)
            return self.sampler.sample(logits_KV, drawn)
        except Exception:
            log.exception("drawing tokens for a batch raised; each row is drawn on its own")
        return self.sampler.sample_each(self._rows, logits_KV, drawn)

    def _forward(self, plan: StepPlan, scored: Sequence[int]) -> torch.Tensor | None:
        """Return the logits [rows, V] of each row's last token, and after them those of all tokens but the last of the
        ``scored`` prompts; None on all stages but the last.
        """
        decoding = len(plan.tokens)
        tokens, last, prefill = list(plan.tokens), list(range(decoding)), []
        ends: list[int] = []
        for i, (prompt, first) in enumerate(zip(plan.prompts, plan.duplicate_of, strict=True)):
            if first == i:
                prefill.append((decoding + i, len(prompt)))
                tokens.extend(prompt)
            ends.append(len(tokens) - 1 if first == i else ends[first])
        last.extend(ends)
        for i in scored:
            last.extend(range(ends[i] + 1 - len(plan.prompts[i]), ends[i]))
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


def _top(values: Sequence[float], count: int) -> Top:
    """Return the first ``count`` pairs of as many ids as log-probabilities, which ``values`` holds in this order."""
    half = len(values) // 2
    return tuple((int(i), value) for i, value in zip(values[:count], values[half : half + count], strict=True))
