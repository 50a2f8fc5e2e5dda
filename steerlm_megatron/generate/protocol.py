"""Requests and results of generation: plain data that the in-process generator, the server and the client share.

Owns: :class:`SamplingParams`, :class:`Request`, :class:`Result`, and the exceptions between a generator and its
callers.
Invariant: a result is a function of (model, prompt ids, sampling parameters), whatever else was running at the time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from steerlm_megatron.errors import UserError

FinishReason = Literal["stop", "length", "cancelled"]
Progress = Callable[["Result"], None]  # called once per finished request, in the order in which they finish

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How one response is drawn.

    ``temperature`` 0 (or below ``sampling.GREEDY_BELOW``) is greedy. ``top_k`` 0 is off, and so is one as large as the
    vocabulary. ``seed`` in [0, 2^63). ``stop`` are strings that end the response besides those of the template; they
    are not part of its text. ``logprobs``: report the log-probability of each chosen token under the model itself
    (temperature 1, no truncation).
    """

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: bool = False

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
        ]
        for name, fine, rule in rules:
            if not fine:
                raise UserError(f"sampling.{name}={getattr(self, name)!r} must be {rule}")
        return self


@dataclass(frozen=True)
class Request:
    """A request for one response. The caller chooses ``id``, which is unique among the requests in flight."""

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams = SamplingParams()


@dataclass(frozen=True)
class Result:
    """One response.

    ``token_ids``: every sampled token, a final stop token included. ``text``: without the stop string, and where a
    control token ended it, without the template's newline before that token. ``completion_tokens`` = len(token_ids);
    ``logprobs``, where asked for, has the same length.
    """

    id: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Delta:
    """A piece of a response that will not change any more."""

    text: str
    token_ids: tuple[int, ...]


class Sampler(Protocol):
    """The interface that ``Generator`` and ``SamplingClient`` share, so that generate and bootstrap take either."""

    def generate(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Result]:
        """Return results in the order of ``requests``."""
        ...


@dataclass(frozen=True)
class Limits:
    """The limits of an engine: ``generation.*``, and for a server ``server.max_queue``."""

    max_batch: int
    max_sequence_tokens: int
    max_cache_tokens: int
    max_queue: int = 2**31  # choices that may wait for a row; without a server there is no bound


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
