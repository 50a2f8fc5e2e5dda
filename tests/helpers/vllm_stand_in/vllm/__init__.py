"""A stand-in for vLLM, which is too large to be installed for tests: the names and behaviour of vLLM 0.32 that
``generate/vllm_engine.py`` relies on, and nothing else. It refuses what vLLM refuses, and names that it does not know.

Each token is drawn from logits of the whole sequence, so that it shares no code with what it is compared with.
``benchmarks/vllm_peer.py`` compares with the real vLLM.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from vllm.sampling_params import RequestOutputKind, SamplingParams, VLLMValidationError

__all__ = ["EngineArgs", "LLMEngine", "SamplingParams"]

# Tests set these: the model, in place of that of the folder; tokens that a step gives; what a step waits for.
MODEL: Callable[[torch.Tensor], torch.Tensor] | None = None
TOKENS_A_STEP = 1
GO = threading.Event()
GO.set()


class EngineDeadError(Exception):
    """vLLM's engine has said that it ends."""


@dataclass
class EngineArgs:
    model: str
    skip_tokenizer_init: bool = False
    generation_config: str = "auto"
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    enable_chunked_prefill: bool | None = None
    enable_prefix_caching: bool | None = None
    max_logprobs: int = 20
    enforce_eager: bool = False
    disable_log_stats: bool = True
    distributed_executor_backend: str | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9


@dataclass
class _Request:
    id: str
    prompt: list[int]
    params: SamplingParams
    drawn: list[int] = field(default_factory=list)
    generator: torch.Generator | None = None


class LLMEngine:
    started: list[LLMEngine] = []

    def __init__(self, args: EngineArgs) -> None:
        if args.kv_cache_memory_bytes is not None and args.kv_cache_memory_bytes < 1000:
            raise RuntimeError("Engine core initialization failed. See root cause above.")
        self.args, self.requests, self.dead, self.aborted = args, {}, False, []  # type: ignore[var-annotated]
        self.requests: dict[str, _Request] = {}
        if MODEL is not None:
            self.logits, rows = MODEL, int(MODEL(torch.tensor([1])).shape[1])
        else:
            import transformers

            model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
            model.eval()
            self.logits, rows = lambda ids_T: model(ids_T[None]).logits[0], model.config.vocab_size
        self.vllm_config = SimpleNamespace(
            cache_config=SimpleNamespace(num_gpu_blocks=64, block_size=16),
            model_config=SimpleNamespace(get_vocab_size=lambda: rows),
        )
        self.rows = rows
        self.engine_core = SimpleNamespace(shutdown=self._shutdown)
        LLMEngine.started.append(self)

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLMEngine:
        return cls(engine_args)

    def _shutdown(self) -> None:
        self.dead = True

    def add_request(self, request_id: str, prompt: dict[str, list[int]], params: SamplingParams) -> str:
        ids = prompt["prompt_token_ids"]
        assert set(prompt) == {"prompt_token_ids"} and ids and request_id not in self.requests
        assert not isinstance(params.stop, list) or not params.stop or params.detokenize
        assert len(ids) + (params.max_tokens or 16) <= (self.args.max_model_len or math.inf)
        for named in (params.logit_bias or {}, params.allowed_token_ids or (), params.stop_token_ids or ()):
            if any(not 0 <= i < self.rows for i in named):
                raise VLLMValidationError("token_id(s) out of the vocabulary")
        seed = params.seed
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.requests[request_id] = _Request(request_id, list(ids), params, [], generator)
        return request_id

    def abort_request(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.aborted.append(request_id)
            self.requests.pop(request_id, None)

    def get_metrics(self) -> list[Any]:
        assert not self.args.disable_log_stats
        return [
            SimpleNamespace(name="vllm:prefix_cache_hits", value=3),
            SimpleNamespace(name="vllm:kv_cache_usage_perc", value=0.25),
            SimpleNamespace(name="vllm:some_histogram", buckets={}),
        ]

    @torch.no_grad()
    def step(self) -> list[Any]:
        assert GO.wait(60)
        if self.dead:
            raise EngineDeadError("EngineCore encountered an issue. See stack trace (above) for the root cause.")
        assert self.requests, "vLLM would wait for ever"
        running = list(self.requests.values())[: self.args.max_num_seqs]
        return [self._advance(request) for request in running]

    def _advance(self, request: _Request) -> Any:
        params, new, logprobs, reason = request.params, [], [], None
        prompt_logprobs = None
        while len(new) < TOKENS_A_STEP and reason is None:
            ids = torch.tensor(request.prompt + request.drawn)
            logits_TV = self.logits(ids).float()
            raw_TV = logits_TV.log_softmax(1)
            if params.prompt_logprobs is not None and not request.drawn:
                prompt_logprobs = [None] + [
                    _entry(raw_TV[i], request.prompt[i + 1], params.prompt_logprobs)
                    for i in range(len(request.prompt) - 1)
                ]
            token = _draw(logits_TV[-1].clone(), request)
            request.drawn.append(token)
            new.append(token)
            if params.logprobs is not None:
                logprobs.append(_entry(raw_TV[-1], token, params.logprobs))
            if token in (params.stop_token_ids or ()) and len(request.drawn) > params.min_tokens:
                reason = "stop"
            elif len(request.drawn) >= (params.max_tokens or 16):
                reason = "length"
        if reason is not None:
            del self.requests[request.id]
        assert params.output_kind is RequestOutputKind.DELTA
        completion = SimpleNamespace(
            token_ids=new, logprobs=logprobs if params.logprobs is not None else None, finish_reason=reason
        )
        return SimpleNamespace(
            request_id=request.id, outputs=[completion], finished=reason is not None, prompt_logprobs=prompt_logprobs
        )


def _entry(row_V: torch.Tensor, token: int, count: int) -> dict[int, Any]:
    """The chosen token, and the ``count`` most likely ones, with their ranks."""
    rank = int((row_V > row_V[token]).sum()) + 1
    found = {token: SimpleNamespace(logprob=row_V[token].item(), rank=rank, decoded_token=None)}
    values, ids = row_V.topk(count)
    for place, (value, i) in enumerate(zip(values.tolist(), ids.tolist(), strict=True), 1):
        found[i] = SimpleNamespace(logprob=value, rank=place, decoded_token=None)
    return found


def _draw(logits_V: torch.Tensor, request: _Request) -> int:
    params, drawn = request.params, request.drawn
    if params.allowed_token_ids is not None:
        mask_V = torch.ones_like(logits_V, dtype=torch.bool)
        mask_V[params.allowed_token_ids] = False
        logits_V[mask_V] = -math.inf
    for i, bias in (params.logit_bias or {}).items():
        logits_V[i] += bias
    if len(drawn) < params.min_tokens:
        logits_V[params.stop_token_ids] = -math.inf
    for i in {*request.prompt, *drawn}:
        p = params.repetition_penalty
        logits_V[i] = logits_V[i] / p if logits_V[i] > 0 else logits_V[i] * p
    for i in set(drawn):
        logits_V[i] -= params.presence_penalty + drawn.count(i) * params.frequency_penalty
    if params.temperature < 1e-5:
        return int(logits_V.argmax())
    logits_V = logits_V / params.temperature
    if params.top_k > 0:
        logits_V[logits_V < logits_V.topk(min(params.top_k, len(logits_V)))[0][-1]] = -math.inf
    return int(torch.multinomial(logits_V.softmax(0), 1, generator=request.generator))
