"""Requests and results of generation: plain data that the in-process generator, the server and the client share.

Owns: :class:`SamplingParams`, :class:`Request`, :class:`Result`, and the exceptions between a generator and its
callers.
Invariant: a result is a function of (model, prompt ids, sampling parameters), whatever else was running at the time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from steerlm_megatron.errors import UserError

FinishReason = Literal["stop", "length", "cancelled"]
Progress = Callable[["Result"], None]  # called once per finished request, in the order in which they finish

MAX_SEED = 2**63 - 1
MAX_TOP_LOGPROBS = 20  # as OpenAI's and vLLM's servers allow
MIN_REPETITION = 1e-4  # a repetition penalty beyond this range could make logits overflow

Top = tuple[tuple[int, float], ...]  # ids of the most likely tokens and their log-probabilities, most likely first


@dataclass(frozen=True)
class SamplingParams:
    """How one response is drawn. Names and meanings are those of vLLM
    (https://docs.vllm.ai/en/latest/api/vllm/sampling_params/), where vLLM has the parameter.

    ``temperature`` 0 (or below ``sampling.GREEDY_BELOW``) is greedy. ``top_k`` 0 is off, and so is one as large as the
    vocabulary. ``min_p`` drops tokens less likely than ``min_p`` times the most likely one; 0 is off. ``seed`` in
    [0, 2^63).

    ``repetition_penalty`` p divides a positive logit by p and multiplies another one by p, for tokens of the prompt and
    of the response so far; 1 is off. ``presence_penalty`` is subtracted from the logits of tokens that the response
    has, ``frequency_penalty`` as often as the response has them; 0 is off. ``logit_bias``, pairs of id and number, is
    added to logits. ``allowed_token_ids``: no other token is drawn; None allows all.

    ``stop`` are strings that end the response besides those of the template; they are not part of its text, unless
    ``include_stop_str_in_output``. ``stop_token_ids`` are tokens that do. With ``ignore_eos`` the template's stop
    tokens end nothing and are left out of the text. Before ``min_tokens`` tokens are drawn, nothing ends the response:
    stop tokens are not drawn, and stop strings not looked at.

    ``logprobs``: report the log-probability of each chosen token under the model itself (temperature 1, no truncation,
    no penalties). ``top_logprobs``: report also those of this many most likely tokens. ``prompt_logprobs``: report for
    each token of the prompt but the first its log-probability after those before it, and those of this many most likely
    tokens there; None reports none.
    """

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    prompt_logprobs: int | None = None

    @classmethod
    def from_config(cls, cfg: Any, **changes: Any) -> SamplingParams:
        """Make parameters from a ``SamplingConfig``; ``changes`` override its values."""
        values = {name: getattr(cfg, name) for name in ("temperature", "top_k", "top_p", "max_tokens", "seed")}
        return cls(**{**values, **changes}).checked()

    def checked(self) -> SamplingParams:
        """Return self, or raise UserError naming the first parameter out of range."""
        rules: list[tuple[str, bool, str]] = [
            ("temperature", 0 <= self.temperature <= sys.float_info.max, "finite and >= 0 (0 is greedy)"),
            ("top_k", self.top_k >= 0, ">= 0 (0 is off)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("max_tokens", self.max_tokens >= 1, ">= 1"),
            ("seed", 0 <= self.seed <= MAX_SEED, f"in [0, {MAX_SEED}]"),
            ("stop", all(self.stop), "non-empty strings"),
            ("top_logprobs", 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS, f"in [0, {MAX_TOP_LOGPROBS}]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1] (0 is off)"),
            (
                "repetition_penalty",
                MIN_REPETITION <= self.repetition_penalty <= 1 / MIN_REPETITION,
                f"in [{MIN_REPETITION:g}, {1 / MIN_REPETITION:g}] (1 is off)",
            ),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "in [-2, 2] (0 is off)"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "in [-2, 2] (0 is off)"),
            ("logit_bias", all(-100 <= bias <= 100 for _, bias in self.logit_bias), "numbers in [-100, 100]"),
            ("logit_bias", len(dict(self.logit_bias)) == len(self.logit_bias), "one number for each id"),
            ("allowed_token_ids", self.allowed_token_ids is None or len(self.allowed_token_ids) > 0, "at least one id"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"in [0, max_tokens={self.max_tokens}]"),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MAX_TOP_LOGPROBS,
                f"in [0, {MAX_TOP_LOGPROBS}]",
            ),
        ]
        for name, fine, rule in rules:
            if not fine:
                raise UserError(f"sampling.{name}={getattr(self, name)!r} must be {rule}")
        return self

    @property
    def penalises(self) -> bool:
        """Whether what was drawn before changes the logits."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


@dataclass(frozen=True)
class Request:
    """A request for one response. The caller chooses ``id``, which is unique among the requests in flight.

    ``text_prefix`` is removed from the start of the response's text, if it is there (``Template.response_prefix``).
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    text_prefix: str = ""


@dataclass(frozen=True)
class Result:
    """One response.

    ``token_ids``: every sampled token, a final stop token included. ``text``: without the stop string, and where a
    control token ended it, without the template's newline before that token. ``completion_tokens`` = len(token_ids);
    ``logprobs`` and ``top_logprobs``, where asked for, have the same length.

    ``stop_reason``: the stop string or the one of ``stop_token_ids`` that ended it; None if a stop token of the
    template or the length did. ``prompt_logprobs`` and ``prompt_top_logprobs``, where asked for, have an entry for each
    token of the prompt; that of the first token, which nothing precedes, is None.

    ``seconds``: from when the engine took the request in (or, from a server, from when it was sent) to its end; None
    where nobody measured. Two results are equal whatever their seconds are.
    """

    id: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[Top, ...] | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[float | None, ...] | None = None
    prompt_top_logprobs: tuple[Top | None, ...] | None = None
    seconds: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Delta:
    """A piece of a response that will not change any more.

    ``token_ids`` are the tokens drawn since the last delta, and ``logprobs`` and ``top_logprobs``, where asked for,
    theirs. ``whole``: the text of all tokens so far has been given, so none of it is held back.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[Top, ...] | None = None
    whole: bool = True


class Sampler(Protocol):
    """The interface that ``Engine`` and ``SamplingClient`` share, so that generate and bootstrap take either."""

    def generate(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Result]:
        """Return results in the order of ``requests``."""
        ...


@dataclass(frozen=True)
class Limits:
    """The limits of an engine: ``generation.*``, and for a server ``server.max_queue``."""

    max_batch: int
    max_sequence_tokens: int
    max_cache_tokens: int  # slots of the key/value cache, all of which are allocated at the start
    max_queue: int = 2**31  # choices that may wait for a row; without a server there is no bound
    block_tokens: int = 16
    chunk_tokens: int = 256  # tokens of prompts that a step takes beside the sequences that decode
    reserve: bool = False  # a sequence is admitted only with room for all of its tokens
    overlap: bool = False  # a step is queued before the tokens of the step before it are read
    cuda_graphs: bool = True  # on a GPU, a step that decodes is recorded once for a size of batch

    def checked(self) -> Limits:
        """Return self, or raise UserError if no request could ever run."""
        for name in (
            "max_queue", "max_batch", "max_sequence_tokens", "max_cache_tokens", "block_tokens", "chunk_tokens",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                section = "server" if name == "max_queue" else "generation"
                raise UserError(f"{section}.{name}={getattr(self, name)} must be at least 1")
        if self.blocks < self.blocks_for(self.max_sequence_tokens):
            raise UserError(
                f"generation.max_cache_tokens={self.max_cache_tokens} is less than generation.max_sequence_tokens="
                f"{self.max_sequence_tokens}: the longest sequence would never fit; raise the one or lower the other"
            )
        return self

    @property
    def blocks(self) -> int:
        """Number of blocks of the key/value cache."""
        return self.max_cache_tokens // self.block_tokens

    def blocks_for(self, tokens: int) -> int:
        """Number of blocks that hold ``tokens`` tokens."""
        return -(-tokens // self.block_tokens)


class QueueFull(Exception):
    """More requests wait than ``server.max_queue`` allows. ``retry_after_sec`` estimates when there will be room."""

    def __init__(self, waiting: int, retry_after_sec: int) -> None:
        super().__init__(f"{waiting} requests are waiting, as many as server.max_queue allows")
        self.retry_after_sec = retry_after_sec


class RequestFailed(RuntimeError):
    """An error of one request ended it; the engine goes on with the others."""


class EngineDead(RuntimeError):
    """The engine stopped on an error; no request will be answered any more."""


class ShuttingDown(EngineDead):
    """The engine takes no requests any more, since its server is being stopped; another server can answer them."""


def derive_seed(seed: int, index: int) -> int:
    """Return the seed of choice ``index`` of a request for several (index 0 keeps the seed itself)."""
    if index == 0:
        return seed
    return mix64(mix64(seed) + index) >> 1


def mix64(x: int) -> int:
    """Apply the finaliser of SplitMix64, which turns 64 bits into 64 well-mixed bits."""
    mask = 0xFFFFFFFFFFFFFFFF
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)
