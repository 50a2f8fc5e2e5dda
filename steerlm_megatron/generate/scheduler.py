"""Plan which sequences run in the next step, with how many tokens, and in which blocks of the cache.

Owns: rows, admission, preemption, and :class:`StepPlan`, the message that keeps all ranks of a replica in lockstep.
Does not own: blocks and prefixes (``block_pool.py``), tensors (``runner.py``), text and callers (``generator.py``). It
is pure Python.
Invariants: every sequence that has its whole prompt in the cache gets a token in every step, and beside these a step
has at most ``chunk_tokens`` tokens of prompts; rows stand in the order of admission, and only the last one may wait for
a part of its prompt; first come, first admitted; with ``reserve`` a sequence is admitted only with room up to its
``max_tokens``, so that nothing is ever preempted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

from steerlm_megatron.generate.block_pool import BlockPool
from steerlm_megatron.generate.sampling import RowParams


class Sequence_(Protocol):
    """The attributes of a sequence that the scheduler uses."""

    prompt_ids: tuple[int, ...]
    row_params: RowParams
    token_ids: list[int]  # sampled so far

    @property
    def total_tokens(self) -> int:
        """Length of the prompt plus max_tokens."""
        ...

    @property
    def failed(self) -> bool:
        """Whether its logits were not finite, so that its keys and values may not be, either."""
        ...


S = TypeVar("S", bound=Sequence_)


@dataclass
class NewRow:
    """A sequence that joins the batch, as every rank must know it."""

    params: RowParams
    start: int  # tokens that its blocks hold already
    tokens: tuple[int, ...]  # those after them, sampled ones of an earlier stay included
    drawn: int  # tokens sampled before
    blocks: list[int]
    copy_of: int | None = None  # a new row of this step that has the same tokens, all of which the step computes


@dataclass
class StepPlan:
    """What changes from one step to the next; all ranks hold what does not.

    Each row is fed one token, the one sampled last, but for rows in ``chunks``, which have a part of their prompt to
    come. A row gets a token once all its tokens are fed.
    """

    kind: Literal["run", "between", "idle", "stop"]
    wipe: list[int] = field(default_factory=list)  # blocks to be filled with zeros
    keep: list[int] | None = None  # rows of the step before that stay, in order; None: all
    new: list[NewRow] = field(default_factory=list)  # rows that follow them
    blocks: list[tuple[int, int]] = field(default_factory=list)  # (row, block): blocks that rows get, in order
    chunks: list[tuple[int, int]] = field(default_factory=list)  # (row, tokens of its prompt that it is fed)
    copies: list[tuple[int, int]] = field(default_factory=list)  # (block, block that gets what it holds after the step)
    work: Any = None  # of kind between: what is done in the place of a step (``between_steps.py``)


@dataclass(eq=False)
class Row(Generic[S]):
    """A running sequence: its blocks, and how much of it is in them."""

    sequence: S
    blocks: list[int]
    given: int  # tokens that were known when it got the row: every rank has them
    computed: int  # tokens in the cache after the steps planned so far
    listed: int  # full blocks that the pool knows, from the start
    chain: int  # that ends with the last of them
    reserved: int = 0  # blocks that it may still ask for


class Scheduler(Generic[S]):
    """First-come-first-served continuous batching over blocks, with prompts in chunks and shared prefixes."""

    def __init__(self, pool: BlockPool, max_batch: int, chunk_tokens: int, reserve: bool = False) -> None:
        """The pool must hold the longest sequence."""
        self.pool, self.max_batch, self.chunk_tokens, self.reserve = pool, max_batch, chunk_tokens, reserve
        self.waiting: deque[S] = deque()
        self.rows: list[Row[S]] = []
        self.preemptions = 0
        self.shared_prompt_tokens = 0  # of prompts, found in the cache when their sequences were first admitted
        self._told: list[Row[S]] = []  # the rows as of the last plan, which is what the other ranks hold
        self._wipe: list[int] = []  # blocks that the next plan wipes

    @property
    def running(self) -> list[S]:
        """The sequences that have a row, in the order of rows."""
        return [row.sequence for row in self.rows]

    @property
    def cached_tokens(self) -> int:
        """Number of tokens that the rows have in the cache, shared ones counted for each."""
        return sum(row.computed for row in self.rows)

    def plan(self, gone: Callable[[S], bool]) -> StepPlan | None:
        """Return the next step; None if there is nothing to do. Sequences that are ``gone`` leave their rows first."""
        plan, staying = StepPlan("run", self._wipe), []
        for row in self.rows:
            if not gone(row.sequence):
                staying.append(row)
                continue
            if row.sequence.failed:
                self.pool.spoil(row.blocks)
            self._wipe += self.pool.release(row.blocks)
        self.rows = staying
        budget, preempted = self._feed_rows(plan)
        if not preempted:
            self._admit(plan, budget)
        if not self.rows:
            return None
        if self.rows != self._told:
            held = {id(row): i for i, row in enumerate(self._told)}
            keep = [held[id(row)] for row in self.rows if id(row) in held]
            plan.keep = None if len(keep) == len(self._told) else keep
            self._told = list(self.rows)
        self._wipe = []
        return plan

    def sampling(self) -> list[S]:
        """The sequences that get a token from the step planned last, in the order of rows."""
        return [row.sequence for row in self.rows if row.computed >= row.given]

    def _feed_rows(self, plan: StepPlan) -> tuple[int, bool]:
        """Feed the rows there are. Return how many tokens of prompts the step may still take, and whether a row was
        preempted."""
        budget, preempted, i, size = self.chunk_tokens, False, 0, self.pool.block_tokens
        while i < len(self.rows):
            row = self.rows[i]
            decodes = row.computed >= row.given
            if decodes and row.computed < size * len(row.blocks) and (row.computed + 1) // size == row.listed:
                row.computed += 1  # most steps: it goes on in a block that it has, and fills none
                i += 1
                continue
            tokens = 1 if decodes else min(row.given - row.computed, budget)
            missing = self.pool.blocks_for(row.computed + tokens) - len(row.blocks)
            while missing > self.pool.free and len(self.rows) > i:
                self._preempt()
                preempted = True
            if len(self.rows) == i:  # the row itself was the youngest
                break
            for _ in range(missing):
                row.blocks.append(self.pool.take())
                plan.blocks.append((i, row.blocks[-1]))
            row.reserved -= missing
            self._fed(plan, i, tokens)
            budget -= 0 if decodes else tokens
            i += 1
        return budget, preempted

    def _preempt(self) -> None:
        """Put the youngest row back to the head of the queue. Its blocks go, but for prefixes that nobody overwrites
        until it is admitted again."""
        row = self.rows.pop()
        self._wipe += self.pool.release(row.blocks)
        self.waiting.appendleft(row.sequence)
        self.preemptions += 1

    def _fed(self, plan: StepPlan, number: int, tokens: int) -> None:
        """Note that a row is fed ``tokens`` tokens, and list the blocks that they fill."""
        row = self.rows[number]
        if row.computed < row.given:
            plan.chunks.append((number, tokens))
        row.computed += tokens
        size, sequence = self.pool.block_tokens, row.sequence
        if row.computed // size == row.listed:
            return
        ids = (*sequence.prompt_ids, *sequence.token_ids)  # the last token may not have been read yet
        while row.listed < min(row.computed, len(ids)) // size:
            at = row.listed * size
            row.chain = self.pool.register(row.chain, ids[at : at + size], row.blocks[row.listed])
            row.listed += 1

    def _admit(self, plan: StepPlan, budget: int) -> None:
        """Give rows to waiting sequences as long as there are tokens in the step and blocks in the pool."""
        pool = self.pool
        computed: dict[tuple[int, ...], int] = {}  # what the step computes to its end: the number of its row
        while self.waiting and len(self.rows) < self.max_batch:
            sequence = self.waiting[0]
            ids = (*sequence.prompt_ids, *sequence.token_ids)
            # Log-probabilities of a prompt are asked for: all of it has to be computed.
            scored = sequence.row_params.prompt_logprobs is not None and not sequence.token_ids
            twin = None if scored else computed.get(ids)
            if twin is not None:
                shared, start, tokens = self.rows[twin].blocks[: len(ids) // pool.block_tokens], len(ids), 0
                chain = self.rows[twin].chain
            else:
                # The last token is always computed: the next one follows from its logits.
                shared = [] if scored else pool.match(ids, len(ids) - 1)
                start = len(shared) * pool.block_tokens
                tokens, chain = min(len(ids) - start, budget), pool.chain(shared)
                if tokens == 0:
                    return
            whole = pool.blocks_for(sequence.total_tokens if self.reserve else len(ids))
            if whole - len(shared) > pool.free - pool.free_among(shared) - self._spoken_for():
                return
            pool.share(shared, len(ids))
            blocks = [*shared, *(pool.take() for _ in range(pool.blocks_for(start + tokens) - len(shared)))]
            row = Row(sequence, blocks, len(ids), start, len(shared), chain)
            row.reserved = whole - len(blocks)
            self.waiting.popleft()
            self.rows.append(row)
            number, drawn = len(self.rows) - 1, len(sequence.token_ids)
            self.shared_prompt_tokens += 0 if drawn else start
            plan.new.append(
                NewRow(sequence.row_params.after(sequence.token_ids), start, ids[start:], drawn, list(blocks), twin)
            )
            if twin is None:
                self._fed(plan, number, tokens)
                budget -= tokens
                if row.computed == len(ids):
                    computed[ids] = number
            else:
                plan.chunks.append((number, 0))
                if len(blocks) > len(shared):
                    plan.copies.append((self.rows[twin].blocks[len(shared)], blocks[-1]))

    def _spoken_for(self) -> int:
        """Blocks that are free but not for whoever is admitted now: those that rows have reserved, or else one for
        each row that decodes, without which admission would cause preemption a few steps later."""
        if self.reserve:
            return sum(row.reserved for row in self.rows)
        return sum(max(row.reserved, 1) for row in self.rows)
