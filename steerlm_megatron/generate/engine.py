"""What every engine that answers requests does: from a submitted request to its result, in a loop of steps.

Owns: requests in flight, the text and the end of a response, the loop and its lockstep over the ranks of a replica.
Does not own: how tokens are drawn (``generator.py``: by this package's models; ``vllm_engine.py``: by vLLM), HTTP
(``serve``). Invariants: every submitted request gets exactly one result or exception, also when the engine fails; an
exception that one request causes (its callback, its text, its logits) ends that request alone; ``step`` runs in one
thread at a time, everything else is thread-safe.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.between_steps import BetweenSteps
from steerlm_megatron.generate.drawn import NOT_DRAWN, NOT_FINITE, Drawn
from steerlm_megatron.generate.group import LocalGroup, ModelGroup
from steerlm_megatron.generate.job import Handle, Job, ended_by, resolve
from steerlm_megatron.generate.protocol import (
    Delta,
    EngineDead,
    FinishReason,
    Limits,
    Progress,
    QueueFull,
    Request,
    RequestFailed,
    Result,
)
from steerlm_megatron.generate.scheduler import StepPlan
from steerlm_megatron.generate.text import ResponseText
from steerlm_megatron.generate.vocabulary import TemplateLike, TokenizerLike, Vocabulary

_NO_TOKEN = {
    NOT_FINITE: "the model's logits are not finite after this prompt",
    NOT_DRAWN: "no token could be drawn with its parameters; the log of the rank that samples has the reason",
}


class Engine(ABC):
    """Answers many requests at a time, for one model replica.

    With a replica of several ranks, every rank constructs an engine; the leader submits and steps while the others
    sit in :meth:`worker_loop` (or all call :meth:`generate`).
    """

    # Whether a step may wait for another process, which can stop or be cut off: the engine is then given up in the end.
    waits_for_others = False

    def __init__(
        self, tokenizer: TokenizerLike, template: TemplateLike, limits: Limits, group: ModelGroup | None = None
    ) -> None:
        """``group`` is None for a replica of one process, else ``group.model_group()``.

        Raises UserError if the limits contradict each other."""
        self.tokenizer, self.template, self.limits = tokenizer, template, limits.checked()
        self.group: ModelGroup = group or LocalGroup()
        self.vocabulary = Vocabulary.of(tokenizer, template)
        self.error: str | None = None
        self.last_beat_sec = time.monotonic()  # time of the loop's last sign of life
        self.longest_step_sec = 0.0
        # Called at every message between the ranks of a replica, in the thread that sends or receives it.
        self.on_message: Callable[[], None] = lambda: None
        # Called with every result, in the thread of the loop (that of a cancelled request, in the canceller's thread).
        self.on_result: Callable[[Result], None] = lambda result: None
        self.steps = self.sampled_tokens = 0
        self.jobs: dict[str, Job] = {}
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)
        self._last_message_sec = time.monotonic()
        self.between = BetweenSteps(
            self.group, lambda work: self._send(StepPlan("between", work=work)), self.wake, self._beat
        )

    # ---- what an engine has of its own ----

    @property
    @abstractmethod
    def waiting(self) -> deque[Job]:
        """Jobs that wait for a row, the first to get one first."""

    @property
    @abstractmethod
    def running(self) -> int:
        """Number of rows that are taken."""

    @abstractmethod
    def _step(self) -> bool:
        """Do what :meth:`step` says; an exception ends the engine."""

    @abstractmethod
    def counters(self) -> dict[str, float]:
        """Return the engine's numbers for metrics; names that end in ``_total`` only grow. Any thread may call it."""

    @property
    def shared_prompt_tokens(self) -> int:
        """Tokens of prompts that were not computed, since another sequence had the same start."""
        return 0

    def _follow(self, plan: StepPlan) -> None:
        """Do a follower's part of a step. Only a replica whose ranks hold the model has one."""
        raise AssertionError(f"no part in {plan.kind}")

    def close(self) -> None:
        """End the engine, and give back what it holds outside of this process. The leader calls it."""
        self.fail("the engine is closed")

    # ---- submission, any thread of the leader ----

    def problem(self, prompt_tokens: int, max_tokens: int) -> str | None:
        """Return why a request of these sizes can never run, or None."""
        limit = self.limits.max_sequence_tokens
        if prompt_tokens < 1:
            return "the prompt is empty; it needs at least one token"
        if prompt_tokens + max_tokens > limit:
            return (
                f"the prompt has {prompt_tokens} tokens and max_tokens={max_tokens}: "
                f"{prompt_tokens + max_tokens} together, more than generation.max_sequence_tokens={limit}; "
                "shorten the prompt or lower max_tokens"
            )
        return None

    def _check_alive(self) -> None:
        if self.error is not None:
            raise EngineDead(self.error)

    def _check(self, requests: Sequence[Request]) -> None:
        vocab_size = self.vocabulary.size
        # The choices of a request share the prompt, whose ids are checked once.
        inside: set[int] = set()
        for request in requests:
            request.params.checked()
            problem = self.problem(len(request.prompt_ids), request.params.max_tokens)
            if problem:
                raise UserError(f"request {request.id}: {problem}")
            if id(request.prompt_ids) not in inside:
                if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= vocab_size:
                    raise UserError(f"request {request.id}: a prompt token id is outside [0, {vocab_size})")
                inside.add(id(request.prompt_ids))
            if (problem := self.vocabulary.problem(request.params)) is not None:
                raise UserError(f"request {request.id}: {problem}")
        if len({request.id for request in requests}) < len(requests):
            raise UserError("two requests have the same id; ids must be unique")

    def submit(self, request: Request, on_delta: Callable[[Delta], None] | None = None) -> Handle:
        """Queue one request. ``on_delta`` is called from the engine's thread as text becomes final.

        Raises UserError (the request can never run), QueueFull, EngineDead."""
        return self.submit_all([request], [on_delta])[0]

    def submit_all(
        self,
        requests: Sequence[Request],
        on_delta: Sequence[Callable[[Delta], None] | None] | None = None,
        bounded: bool = True,
        text: bool = True,
    ) -> list[Handle]:
        """Queue all of ``requests`` or, on an exception, none. ``bounded=False`` ignores ``server.max_queue``. With
        ``text=False`` deltas have token ids alone, and the caller makes text of them outside of the engine's thread.
        """
        assert self.group.is_leader, "only the leader of a replica submits"
        self._check_alive()
        self._check(requests)
        jobs = [self.new_job(r, on_delta[i] if on_delta else None, text) for i, r in enumerate(requests)]
        with self._lock:
            self._check_alive()
            for request in requests:
                if request.id in self.jobs:
                    raise UserError(f"request {request.id}: a request of this id is being answered; ids must be unique")
            waiting = len(self.waiting)
            # Requests for which a row is free do not count, since they leave the queue at the next step.
            free = self.limits.max_batch - self.running
            if bounded and waiting + len(requests) > self.limits.max_queue + free:
                raise QueueFull(waiting, self._retry_after_sec())
            for job in jobs:
                self.jobs[job.request.id] = job
                self.waiting.append(job)
            self._work.notify()
        return [job.handle for job in jobs]

    def new_job(self, request: Request, on_delta: Callable[[Delta], None] | None, text_in_deltas: bool = True) -> Job:
        handle = Handle(request, self.cancel)
        return Job(request, handle, self.new_text(request), on_delta, self.vocabulary.stop_ids, text_in_deltas)

    def new_text(self, request: Request) -> ResponseText:
        """Return the empty text of a response to ``request``."""
        params = request.params
        silent = self.vocabulary.stop_ids | (set() if params.include_stop_str_in_output else set(params.stop_token_ids))
        return ResponseText(
            self.tokenizer.decode,
            params.stop,
            self.template.response_suffix,
            include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
            silent_ids=silent,
            prefix=request.text_prefix,
        )

    def refuse_waiting(self, error: Exception) -> int:
        """End the requests for which nothing has been computed yet with ``error``; return their number. Those that
        were preempted go on.
        """
        with self._lock:
            jobs = [job for job in self.waiting if not job.planned]
            for job in jobs:
                self.waiting.remove(job)
                job.reason = "cancelled"
                self.jobs.pop(job.request.id, None)
        for job in jobs:
            job.handle.future.set_exception(error)
        return len(jobs)

    def _retry_after_sec(self) -> int:
        return max(1, min(30, len(self.waiting) // max(1, self.limits.max_batch)))

    def cancel(self, request_id: str) -> None:
        """End a request; unknown or finished ids are ignored."""
        with self._lock:
            job = self.jobs.get(request_id)
            if job is None or job.reason is not None:
                return
            job.reason = "cancelled"
            if job in self.waiting:
                self.waiting.remove(job)
            del self.jobs[request_id]
            outcome: Result | RequestFailed
            try:
                outcome = self._result(job)
            except Exception as e:
                outcome = ended_by(job, e)
        if isinstance(outcome, Result):
            self.on_result(outcome)
        resolve(job, outcome)

    # ---- the loop, one thread of the leader ----

    def step(self) -> bool:
        """Run one step if there is work; return whether there was. Collective over the replica when there is."""
        began = self.last_beat_sec = time.monotonic()
        self._check_alive()
        try:
            worked = self._step()
        except BaseException as e:
            self.fail(str(e) if isinstance(e, EngineDead) else f"{type(e).__name__}: {e}")
            raise
        if worked:
            self.last_beat_sec = time.monotonic()
            self.longest_step_sec = max(self.longest_step_sec, self.last_beat_sec - began)
        return worked

    def _send(self, plan: StepPlan) -> None:
        if self.group.size > 1:
            self.on_message()
            self.group.broadcast(plan)
            if plan.kind == "idle":
                self.group.wait_for_all()  # a broadcast returns although a rank has stopped
            self._last_message_sec = time.monotonic()

    def _take(self, jobs: list[Job], drawn: Drawn) -> None:
        """Append each job's new token to it, and resolve the requests that end with it."""
        ended: list[tuple[Job, Result | RequestFailed]] = []
        outcome: Result | RequestFailed | None
        with self._lock:
            self.steps += 1
            now = time.monotonic()
            for row, job in enumerate(jobs):
                if job.reason is not None:  # cancelled while the step ran
                    continue
                try:
                    outcome = self._take_token(job, row, drawn, now)
                except Exception as e:
                    outcome = ended_by(job, e)
                if outcome is not None:
                    ended.append((job, outcome))
                    del self.jobs[job.request.id]
        for job, outcome in ended:
            if isinstance(outcome, Result):
                self.on_result(outcome)
            resolve(job, outcome)

    def _take_token(self, job: Job, row: int, drawn: Drawn, now: float) -> Result | None:
        """Append a token to a job and return its result if it ends. An exception here ends this job alone."""
        token_id = drawn.ids[row]
        if token_id < 0:
            job.failed = True
            raise RequestFailed(_NO_TOKEN[token_id])
        job.token_ids.append(token_id)
        job.handle.times.token(now)
        self.sampled_tokens += 1
        if job.row_params.logprobs:
            job.logprobs.append(drawn.logprobs[row])
        if job.row_params.top_logprobs:
            job.top_logprobs.append(drawn.top[row])
        if drawn.prompts and row in drawn.prompts:
            chosen, top = drawn.prompts[row]
            job.prompt_logprobs = (None, *chosen), (None, *top)
        piece, job.reason = self._advance(job, token_id)
        if job.reason is not None:
            return self._result(job, piece)
        if job.on_delta is not None:
            job.on_delta(_delta(job, piece))
        return None

    def _advance(self, job: Job, token_id: int) -> tuple[str, FinishReason | None]:
        """Return the text that became final, and the reason if the response ends here."""
        piece = ""
        params = job.request.params
        ends = token_id in job.stop_ids
        if ends and token_id in params.stop_token_ids:
            job.stop_reason = token_id
        if ends and not params.include_stop_str_in_output:
            return piece, "stop"
        if job.needs_text:
            piece = job.text.push(token_id)
        if ends or job.text.stopped_at is not None:
            return piece, "stop"
        return piece, "length" if len(job.token_ids) >= params.max_tokens else None

    def _result(self, job: Job, piece: str = "") -> Result:
        """Return the job's result, after its last text was sent as a delta."""
        by_control = job.token_ids[-1:] != [] and job.token_ids[-1] in job.stop_ids & self.vocabulary.stop_ids
        text, rest = job.text.finish(job.token_ids, by_control)
        if job.reason == "length" and job.text.stopped_at is not None:
            job.reason = "stop"  # the text that was held back contains a stop string
        if job.text.stop is not None:
            job.stop_reason = job.text.stop
        if job.on_delta is not None and job.reason != "cancelled":
            job.on_delta(_delta(job, piece + rest))
        assert job.reason is not None
        prompt, began = job.prompt_logprobs, job.handle.times.began
        return Result(
            id=job.request.id,
            token_ids=tuple(job.token_ids),
            text=text,
            finish_reason=job.reason,
            prompt_tokens=len(job.prompt_ids),
            completion_tokens=len(job.token_ids),
            logprobs=tuple(job.logprobs) if job.row_params.logprobs else None,
            top_logprobs=tuple(job.top_logprobs) if job.row_params.top_logprobs else None,
            stop_reason=job.stop_reason,
            prompt_logprobs=None if prompt is None else prompt[0],
            prompt_top_logprobs=None if prompt is None else prompt[1],
            seconds=None if began is None else time.monotonic() - began,
        )

    def fail(self, reason: str, kind: type[EngineDead] = EngineDead) -> None:
        """End the engine: pending requests get ``kind(reason)``, later ones ``EngineDead(reason)``."""
        with self._lock:
            if self.error is None:
                self.error = reason
            jobs = list(self.jobs.values())
            self.jobs.clear()
            self.waiting.clear()
            self._work.notify_all()
        for job in jobs:
            job.reason = "cancelled"
            if not job.handle.future.done():
                job.handle.future.set_exception(kind(reason))
        self.between.end(kind(reason))

    def run_until(self, stop: threading.Event) -> None:
        """Step until ``stop`` is set, and sleep while there is nothing to do. Only the leader calls it."""
        while not stop.is_set():
            worked = self._between_steps()
            if self.step() or worked:
                continue
            self.last_beat_sec = time.monotonic()
            if self.group.size > 1 and time.monotonic() - self._last_message_sec > self.group.heartbeat_sec:
                self._send(StepPlan("idle"))
            with self._lock:
                if not self.jobs and not self.between.waits and not stop.is_set():
                    self._work.wait(timeout=0.5)

    def _beat(self) -> None:
        self.last_beat_sec = time.monotonic()

    def _between_steps(self) -> bool:
        """Do one piece of other work, if some waits; return whether there was. Collective over the replica then."""
        self._beat()
        try:
            return self.between.do_one()
        except BaseException as e:
            self.fail(str(e) if isinstance(e, EngineDead) else f"{type(e).__name__}: {e}")
            raise

    def wake(self) -> None:
        """Wake a sleeping :meth:`run_until`, so that it checks its stop event."""
        with self._lock:
            self._work.notify_all()

    def stop_workers(self) -> None:
        """Make the other ranks leave :meth:`worker_loop`. Only the leader calls it."""
        self._send(StepPlan("stop"))

    def worker_loop(self) -> None:
        """Run the leader's plans until it sends a stop. Collective over the replica."""
        assert not self.group.is_leader
        while True:
            plan: StepPlan = self.group.broadcast(None)
            self.on_message()
            if plan.kind == "stop":
                return
            if plan.kind == "idle":
                self.group.wait_for_all()
            if plan.kind == "between":
                self.between.follow(plan.work)
            if plan.kind == "run":
                self._follow(plan)

    # ---- in process ----

    def generate(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Result]:
        """Answer all of ``requests``, in their order, in the calling thread. Every rank of the replica gets the
        results.

        ``progress`` is called on the leader after each finished request. ``server.max_queue`` does not apply. Raises
        UserError before anything runs if a request can never run. Collective over the replica.
        """
        if not self.group.is_leader:
            self.worker_loop()
            results = self.group.broadcast(None)
            if isinstance(results, Exception):
                raise results
            return results
        try:
            answer: Any = self._generate(requests, progress)
        except BaseException as e:
            if (
                self.group.size > 1 and self.error is None
            ):  # the ranks run in lockstep, so the others get the same error
                self.stop_workers()
                self.group.broadcast(e if isinstance(e, UserError) else RuntimeError(f"rank 0: {e!r}"))
            raise
        if self.group.size > 1:
            self.stop_workers()
            self.group.broadcast(answer)
        return answer

    def _generate(self, requests: Sequence[Request], progress: Progress | None) -> list[Result]:
        # Longest requests come first, so that stragglers start early and rows have similar lengths.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids) - requests[i].params.max_tokens)
        handles = self.submit_all([requests[i] for i in order], bounded=False)
        done: list[Future[Result]] = []
        for handle in handles:
            handle.future.add_done_callback(done.append)
        try:
            while self.step():
                for future in done if progress is not None else ():
                    assert progress is not None
                    progress(future.result())
                done.clear()
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        results = {handle.id: handle.future.result(timeout=0) for handle in handles}
        return [results[request.id] for request in requests]


def _delta(job: Job, text: str) -> Delta:
    """Return the delta of the job's last token, whose text and that of tokens before it may be held back."""
    params = job.row_params
    return Delta(
        text if job.text_in_deltas else "",
        tuple(job.token_ids[-1:]),
        tuple(job.logprobs[-1:]) if params.logprobs else None,
        tuple(job.top_logprobs[-1:]) if params.top_logprobs else None,
        whole=job.text.whole,
    )
