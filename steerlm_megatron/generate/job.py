"""A request between submission and result.

Owns: its state, the handle that the caller gets, and how an error of this request ends it. Does not own: when it
advances (``generator.py``). Invariant: a job's future is resolved once, by a result or by an exception.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count

from steerlm_megatron.generate.adjust import History
from steerlm_megatron.generate.protocol import Delta, FinishReason, Request, RequestFailed, Result, Top
from steerlm_megatron.generate.sampling import RowParams
from steerlm_megatron.generate.text import ResponseText
from steerlm_megatron.observe.log import get_logger

log = get_logger(__name__)

_jobs = count()  # an id may be used again once its request has ended, and what was counted for it must not be


@dataclass
class Times:
    """When a request reached each stage, on the clock of ``time.monotonic``; None until it does."""

    submitted: float = field(default_factory=time.monotonic)
    began: float | None = None  # the engine took it in
    first_token: float | None = None
    last_token: float | None = None
    longest_gap: float = 0.0  # longest time between two of its tokens
    tokens: int = 0

    def token(self, now: float) -> None:
        """Note that a token was drawn."""
        if self.last_token is None:
            self.first_token = now
        else:
            self.longest_gap = max(self.longest_gap, now - self.last_token)
        self.last_token = now
        self.tokens += 1


class Handle:
    """A submitted request. ``future`` resolves to its :class:`Result`, to the error that ended it alone
    (``RequestFailed``), or to the one that ended the engine (``EngineDead``)."""

    def __init__(self, request: Request, cancel: Callable[[str], None]) -> None:
        self.id = request.id
        self.times = Times()
        self.future: Future[Result] = Future()
        self.future.set_running_or_notify_cancel()  # from now on the engine alone may resolve it
        self._cancel = cancel

    @property
    def result(self) -> Result | None:
        """The result, if there is one by now."""
        if not self.future.done() or self.future.exception() is not None:
            return None
        return self.future.result()

    def cancel(self) -> None:
        """Ask the engine to stop the request; its result then has finish_reason ``cancelled``."""
        self._cancel(self.id)


class Job:
    """A request in progress and its state. ``reason`` is set once it has ended."""

    def __init__(
        self,
        request: Request,
        handle: Handle,
        text: ResponseText,
        on_delta: Callable[[Delta], None] | None,
        stop_ids: frozenset[int] = frozenset(),
        text_in_deltas: bool = True,
    ) -> None:
        """``stop_ids`` are the template's."""
        self.request, self.handle, self.text, self.on_delta = request, handle, text, on_delta
        params = request.params
        self.prompt_ids = request.prompt_ids
        self.stop_ids = (frozenset() if params.ignore_eos else stop_ids) | frozenset(params.stop_token_ids)
        self.row_params = RowParams(
            params.temperature,
            params.top_k,
            params.top_p,
            params.seed,
            logprobs=params.logprobs,
            top_logprobs=params.top_logprobs,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=params.logit_bias,
            allowed_ids=params.allowed_token_ids,
            min_tokens=params.min_tokens,
            stop_ids=tuple(sorted(stop_ids | self.stop_ids)) if params.min_tokens else (),
            history=History(f"{next(_jobs)}", request.prompt_ids) if params.penalises else None,
            prompt_logprobs=params.prompt_logprobs,
        )
        self.token_ids: list[int] = []
        self.planned = 0  # tokens that steps have given or will have given it
        self.logprobs: list[float] = []
        self.top_logprobs: list[Top] = []
        self.prompt_logprobs: tuple[tuple[float | None, ...], tuple[Top | None, ...]] | None = None
        self.stop_reason: str | int | None = None
        self.reason: FinishReason | None = None
        self.failed = False  # its logits were not finite
        self.text_in_deltas = text_in_deltas
        self.needs_text = (on_delta is not None and text_in_deltas) or bool(params.stop)

    @property
    def total_tokens(self) -> int:
        return len(self.prompt_ids) + self.request.params.max_tokens


def ended_by(job: Job, error: Exception) -> RequestFailed:
    """End a job on an error, which ends no other one; return what its future gets."""
    job.reason = "cancelled"
    if isinstance(error, RequestFailed):
        log.error("request %s ends: %s", job.request.id, error)
        return error
    log.error("request %s ends on an error of its own", job.request.id, exc_info=error)
    failed = RequestFailed(f"{type(error).__name__}: {error}")
    failed.__cause__ = error
    return failed


def resolve(job: Job, outcome: Result | RequestFailed) -> None:
    """Resolve the job's future with its outcome."""
    if isinstance(outcome, Result):
        job.handle.future.set_result(outcome)
    else:
        job.handle.future.set_exception(outcome)
