"""The engine that draws by vLLM (https://docs.vllm.ai).

Owns: the translation of requests and outputs, which requests vLLM has. Does not own: requests and responses
(``engine.py``), vLLM's processes (``vllm_process.py``), the folder and the memory that it gets (``stages/vllm.py``).
Invariants: greedy tokens are those of ``generator.py`` as far as logits are the same; a seeded response is a function
of its request, though with other tokens than those of ``generator.py``, since vLLM draws differently; the text and the
end of a response are found here and not by vLLM, so that one API has one behaviour.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.drawn import Drawn
from steerlm_megatron.generate.engine import Engine
from steerlm_megatron.generate.group import ModelGroup
from steerlm_megatron.generate.job import Job, resolve
from steerlm_megatron.generate.protocol import (
    Limits,
    Request,
    RequestFailed,
    SamplingParams,
    Top,
)
from steerlm_megatron.generate.sampling import GREEDY_BELOW, LOWEST_LOGPROB
from steerlm_megatron.generate.scheduler import StepPlan
from steerlm_megatron.generate.vllm_process import Vllm
from steerlm_megatron.generate.vocabulary import TemplateLike, TokenizerLike
from steerlm_megatron.observe.log import get_logger

log = get_logger(__name__)

_AHEAD = 8  # requests beyond its rows that vLLM has, so that a row that gets free is taken in the same step
_METRICS = {
    "vllm:prefix_cache_queries": "prefix_asked_tokens_total",
    "vllm:prefix_cache_hits": "prefix_hit_tokens_total",
    "vllm:num_preemptions": "preemptions_total",
}


class VllmEngine(Engine):
    """Answers requests by vLLM. Only the leader of a replica has vLLM; the other ranks lend it their GPUs."""

    waits_for_others = True

    def __init__(
        self,
        vllm: Vllm | None,
        tokenizer: TokenizerLike,
        template: TemplateLike,
        limits: Limits,
        group: ModelGroup | None = None,
        timeout_sec: float = 600.0,
    ) -> None:
        """``vllm`` is what ``start_vllm`` returned on the leader of the replica, and None on its other ranks. A step
        that takes longer than ``timeout_sec`` (``engine.timeout_sec``) ends the engine.
        """
        super().__init__(tokenizer, template, limits, group)
        self._waiting: deque[Job] = deque()
        self._inside: dict[str, Job] = {}  # what vLLM has
        self._banned: dict[int, float] = {i: float("-inf") for i in self.vocabulary.banned_ids}
        self._vllm, self._timeout_sec = vllm, timeout_sec
        if vllm is None:
            return
        # Rows that pad the table of embeddings are no tokens.
        self._banned.update((i, float("-inf")) for i in range(self.vocabulary.size, vllm.rows))
        longest = limits.max_sequence_tokens
        log.info(
            "vLLM has %d blocks of %d tokens; they hold %d sequences of %d tokens",
            vllm.blocks, vllm.block_tokens, vllm.blocks * vllm.block_tokens // longest, longest,
        )  # fmt: skip

    @property
    def waiting(self) -> deque[Job]:
        """Jobs that vLLM has not got yet."""
        return self._waiting

    @property
    def running(self) -> int:
        """Number of rows that are taken."""
        return min(len(self._inside), self.limits.max_batch)

    def counters(self) -> dict[str, float]:
        """Return the engine's numbers for metrics; some are vLLM's. Any thread may call it."""
        numbers: dict[str, float] = {
            "running": self.running,
            "waiting": len(self._waiting) + len(self._inside) - self.running,
            "steps_total": self.steps,
            "sampled_tokens_total": self.sampled_tokens,
        }
        vllm = self._vllm
        if self.error is None and vllm is not None:
            numbers["cache_blocks"] = vllm.blocks
            for metric in vllm.metrics():
                if metric.name in _METRICS:
                    numbers[_METRICS[metric.name]] = metric.value
                elif metric.name == "vllm:kv_cache_usage_perc":
                    numbers["cache_blocks_used"] = round(metric.value * vllm.blocks)
                    numbers["cache_tokens"] = numbers["cache_blocks_used"] * vllm.block_tokens
        return numbers

    def _check(self, requests: Sequence[Request]) -> None:
        super()._check(requests)
        assert self._vllm is not None
        for request in requests:  # vLLM has bounds of its own, such as temperatures up to 2
            params = request.params
            try:
                self._vllm.make_params(**vllm_params(params, frozenset(params.stop_token_ids), self._banned))
            except Exception as e:  # which kind it is depends on vLLM's version
                raise UserError(f"request {request.id}: vLLM (generation.engine=vllm) refuses it: {e}") from e

    def _step(self) -> bool:
        assert self._vllm is not None
        with self._lock:
            ended = [i for i, job in self._inside.items() if job.reason is not None]
            for i in ended:
                del self._inside[i]
            new: list[Job] = []
            while self._waiting and len(self._inside) < self.limits.max_batch + _AHEAD:
                job = self._waiting.popleft()
                job.planned = 1
                self._inside[job.request.id] = job
                new.append(job)
        if ended:
            self._vllm.abort(ended)
        for job in new:
            self._add(job)
        if not self._inside:
            return False
        outputs = self._vllm.step(self._timeout_sec)
        self._send(StepPlan("idle"))
        self._read(outputs)
        return True

    def _send(self, plan: StepPlan) -> None:
        """Send what the other ranks have to know, which is only that the leader lives, and when to leave."""
        often = time.monotonic() - self._last_message_sec < self.group.heartbeat_sec
        if plan.kind == "idle" and often:
            return
        super()._send(plan)

    def _add(self, job: Job) -> None:
        """Give a request to vLLM. One that it refuses ends alone."""
        assert self._vllm is not None
        job.handle.times.began = time.monotonic()
        try:
            params = self._vllm.make_params(**vllm_params(job.request.params, job.stop_ids, self._banned))
            self._vllm.add(job.request.id, job.prompt_ids, params)
        except Exception as e:  # of one request; if vLLM itself is at its end, the step says so
            self._inside.pop(job.request.id)
            self._end(job, f"vLLM refuses the request: {e}")

    def _end(self, job: Job, message: str) -> None:
        with self._lock:
            if job.reason is not None:
                return
            job.reason = "cancelled"
            self.jobs.pop(job.request.id, None)
        log.error("request %s ends: %s", job.request.id, message)
        resolve(job, RequestFailed(message))

    def _read(self, outputs: Sequence[Any]) -> None:
        """Take the tokens of a step of vLLM, which may be several of a request: the first of each, then the second."""
        taken: list[tuple[Job, Any]] = []
        over: list[tuple[Job, str | None]] = []
        for output in outputs:
            job = self._inside.get(output.request_id)
            if job is None:  # it has ended here, and vLLM has not heard of that yet
                continue
            taken.append((job, output))
            if output.finished:
                del self._inside[output.request_id]
                over.append((job, output.outputs[0].finish_reason))
        most = max((len(output.outputs[0].token_ids) for _, output in taken), default=0)
        for at in range(most):
            here = [(job, output) for job, output in taken if at < len(output.outputs[0].token_ids)]
            self._take([job for job, _ in here], _drawn(here, at))
        for job, reason in over:  # with its last token the response has ended here, too, unless vLLM gave it up
            self._end(job, f"vLLM has ended the request: {reason}")

    def close(self) -> None:
        """End vLLM's processes, which gives their memory back."""
        super().close()
        vllm, self._vllm = self._vllm, None
        if vllm is not None:
            vllm.close()


def vllm_params(p: SamplingParams, stop_ids: frozenset[int], banned: Mapping[int, float]) -> dict[str, Any]:
    """Return the arguments of ``vllm.SamplingParams`` for a request. Their meanings are ours (``SamplingParams``).

    What ends a response is given as token ids (``stop_ids``); strings are looked for here. ``banned`` has the bias -inf
    for each token that is no text.
    """
    greedy = p.temperature < GREEDY_BELOW
    named: dict[str, Any] = {
        "temperature": 0.0 if greedy else p.temperature,
        "top_k": 0 if greedy else p.top_k,
        "top_p": 1.0 if greedy else p.top_p,
        "min_p": 0.0 if greedy else p.min_p,
        "seed": None if greedy else p.seed,
        "repetition_penalty": p.repetition_penalty,
        "presence_penalty": p.presence_penalty,
        "frequency_penalty": p.frequency_penalty,
        "max_tokens": p.max_tokens,
        "min_tokens": p.min_tokens,
        "stop_token_ids": sorted(stop_ids),
        "ignore_eos": True,  # the folder's generation_config.json names stop tokens too
        "detokenize": False,
    }
    bias = {i: added for i, added in p.logit_bias if i not in banned}
    if p.allowed_token_ids is None:
        bias.update(banned)
    else:
        named["allowed_token_ids"] = sorted(set(p.allowed_token_ids) - set(banned))
    if bias:
        named["logit_bias"] = bias
    if p.logprobs or p.top_logprobs:
        named["logprobs"] = p.top_logprobs
    if p.prompt_logprobs is not None:
        named["prompt_logprobs"] = p.prompt_logprobs
    return named


def _drawn(taken: Sequence[tuple[Job, Any]], at: int) -> Drawn:
    """Return the ``at``-th token of each output."""
    drawn = Drawn([], [], [], {})
    for number, (job, output) in enumerate(taken):
        completion, row = output.outputs[0], job.row_params
        token = int(completion.token_ids[at])
        drawn.ids.append(token)
        found = completion.logprobs[at] if completion.logprobs else {}
        drawn.logprobs.append(_number(found[token].logprob) if found else 0.0)
        drawn.top.append(_top(found, row.top_logprobs))
        if at == 0 and row.prompt_logprobs is not None and output.prompt_logprobs:
            after_first = output.prompt_logprobs[1:]
            chosen = [_number(e[i].logprob) for e, i in zip(after_first, job.prompt_ids[1:], strict=True)]
            drawn.prompts[number] = chosen, [_top(entry, row.prompt_logprobs) for entry in after_first]
    return drawn


def _top(found: Mapping[int, Any], count: int) -> Top:
    """Return the ``count`` most likely tokens of an entry, which has the chosen token as well."""
    ranked = sorted(found.items(), key=lambda entry: entry[1].rank)
    return tuple((int(i), _number(entry.logprob)) for i, entry in ranked[:count])


def _number(logprob: float) -> float:
    return max(float(logprob), LOWEST_LOGPROB)
