"""The part of ``vllm.sampling_params`` that is used, with vLLM's checks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


class VLLMValidationError(Exception):
    """What vLLM raises for a request that it refuses; it is no ValueError."""


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        rules = {
            "temperature must be in [0, 2]": 0 <= self.temperature <= 2,
            "top_p must be in (0, 1]": 0 < self.top_p <= 1,
            "top_k must be 0 (disable), or at least 1": self.top_k >= -1 and isinstance(self.top_k, int),
            "min_p must be in [0, 1]": 0 <= self.min_p <= 1,
            "repetition_penalty must be greater than zero": 0 < self.repetition_penalty < math.inf,
            "presence_penalty must be in [-2, 2]": -2 <= self.presence_penalty <= 2,
            "frequency_penalty must be in [-2, 2]": -2 <= self.frequency_penalty <= 2,
            "min_tokens must be less than or equal to max_tokens": self.min_tokens <= (self.max_tokens or 16),
            "allowed_token_ids cannot be empty": self.allowed_token_ids is None or len(self.allowed_token_ids) > 0,
            "stop strings need detokenize": not self.stop or self.detokenize,
        }
        for rule, holds in rules.items():
            if not holds:
                raise VLLMValidationError(rule)
