"""The generator: the engine that draws from this package's models, by continuous batching.

Owns: steps over the ranks of a replica: plan, launch, read. Does not own: requests and responses (``engine.py``), rows
(``scheduler.py``), tensors (``runner.py``). Invariant: every rank of a replica launches the leader's plans in order.
"""

from __future__ import annotations

import time
from collections import deque

import torch

from steerlm_megatron.generate.block_pool import BlockPool
from steerlm_megatron.generate.engine import Engine
from steerlm_megatron.generate.group import ModelGroup
from steerlm_megatron.generate.job import Job
from steerlm_megatron.generate.protocol import Limits
from steerlm_megatron.generate.runner import Launched, StepRunner
from steerlm_megatron.generate.scheduler import Scheduler, StepPlan
from steerlm_megatron.generate.vocabulary import TemplateLike, TokenizerLike


class Generator(Engine):
    """Continuous batching over one model replica (the SteerLM paper, arXiv 2310.05344 §3.4, samples its responses)."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: TokenizerLike,
        template: TemplateLike,
        limits: Limits,
        group: ModelGroup | None = None,
    ) -> None:
        """``model`` says by ``cache_shape()`` what it keeps of a token (``CacheShape``), and gives full-vocabulary
        logits: through ``model/inference.py``, or called as ``model(input_ids, position_ids, None, labels=None,
        packed_seq_params=PackedTokens)``. ``group`` is None for a replica of one process, else ``group.model_group()``.

        Raises UserError if the limits contradict each other."""
        super().__init__(tokenizer, template, limits, group)
        self.waits_for_others = self.group.size > 1
        self.runner = StepRunner(model, self.group, self.vocabulary, limits)
        pool = BlockPool(limits.blocks, limits.block_tokens)
        self.scheduler: Scheduler[Job] = Scheduler(pool, limits.max_batch, limits.chunk_tokens, limits.reserve)
        self._unread: tuple[list[Job], Launched] | None = None  # the step that is queued and not read

    @property
    def waiting(self) -> deque[Job]:
        """Jobs that wait for a row."""
        return self.scheduler.waiting

    @property
    def running(self) -> int:
        """Number of rows that are taken."""
        return len(self.scheduler.rows)

    @property
    def shared_prompt_tokens(self) -> int:
        """Tokens of prompts that were not computed, since another sequence had the same start."""
        return self.scheduler.shared_prompt_tokens

    def counters(self) -> dict[str, float]:
        """Return the engine's numbers for metrics; names that end in ``_total`` only grow. Any thread may call it."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        return {
            "running": len(scheduler.rows),
            "waiting": len(scheduler.waiting),
            "cache_tokens": scheduler.cached_tokens,
            "cache_blocks": pool.blocks,
            "cache_blocks_used": pool.used,
            "steps_total": self.steps,
            "sampled_tokens_total": self.sampled_tokens,
            "prefix_asked_tokens_total": pool.counts.asked_tokens,
            "prefix_hit_tokens_total": pool.counts.hit_tokens,
            "evicted_blocks_total": pool.counts.evicted_blocks,
            "preemptions_total": scheduler.preemptions,
        }

    def _step(self) -> bool:
        """Run one step. With ``limits.overlap`` the step is queued, and the one before it is read: the device computes
        while the host looks at tokens. A sequence that turns out to have ended is then fed once more, for nothing.
        """
        with self._lock:
            plan = self.scheduler.plan(
                lambda job: job.reason is not None or job.planned >= job.request.params.max_tokens
            )
            running, jobs = self.scheduler.running, self.scheduler.sampling() if plan is not None else []
            for job in jobs:
                job.planned += 1
        if plan is None and self._unread is None:
            return False
        began = time.monotonic()
        for job in running:
            if job.handle.times.began is None:
                job.handle.times.began = began
        launched = None
        if plan is not None:
            self._send(plan)
            launched = jobs, self.runner.launch(plan)
        ready, self._unread = (self._unread, launched) if self.limits.overlap else (launched, None)
        if ready is not None:
            self._take(ready[0], ready[1].read())
        return True

    def _follow(self, plan: StepPlan) -> None:
        self.runner.launch(plan)
