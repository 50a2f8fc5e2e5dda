"""Plan which sequences run in the next step, and in which rows of the cache.

Owns: rows, admission, the cache's shape, and :class:`StepPlan`, the message that keeps all ranks of a replica in
lockstep. Does not own: tensors (``runner.py``), text and callers (``generator.py``). It is pure Python.
Invariants: running sequences sit in rows 0..n-1; rows × capacity never exceeds the cache budget; a sequence is admitted
only with room for its whole prompt and ``max_tokens``, so nothing ever has to be evicted; first come, first admitted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeVar

from steerlm_megatron.generate.sampling import RowParams

_CAPACITY_STEP = 64  # the cache grows by this many tokens, to save reallocations while sequences get longer
MAX_PREFILL_TOKENS = 8192  # bounds the prompts of one step, and so memory and the pause of running sequences


class Sequence_(Protocol):
    """The attributes of a sequence that the scheduler uses."""

    prompt_ids: tuple[int, ...]
    row_params: RowParams
    token_ids: list[int]  # sampled so far

    @property
    def total_tokens(self) -> int:
        """Length of the prompt plus max_tokens."""
        ...


S = TypeVar("S", bound=Sequence_)


@dataclass
class StepPlan:
    """Everything that a rank needs for one step. Rows 0..n-1 decode ``tokens``; rows n.. are ``prompts``."""

    kind: Literal["run", "idle", "stop"]
    moves: list[tuple[int, int, int]] = field(
        default_factory=list
    )  # (from row, to row, cached tokens), to be done in this order
    cache_shape: tuple[int, int] = (0, 0)  # rows and capacity after the moves
    tokens: list[int] = field(default_factory=list)  # the last token of each decoding row
    lengths: list[int] = field(default_factory=list)  # tokens cached in each decoding row
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    duplicate_of: list[int] = field(default_factory=list)  # per prompt: the first equal one of this step
    drawn: list[int] = field(default_factory=list)  # tokens sampled so far, per row
    params: list[RowParams] | None = None  # per row; None means as in the last plan

    @property
    def size(self) -> int:
        """Number of rows that get a token in this step."""
        return len(self.tokens) + len(self.prompts)


class Scheduler(Generic[S]):
    """First-come-first-served continuous batching over a rectangular cache."""

    def __init__(self, max_batch: int, max_cache_tokens: int, max_prefill_tokens: int = MAX_PREFILL_TOKENS) -> None:
        self.max_batch = max_batch
        self.max_cache_tokens = max_cache_tokens
        self.max_prefill_tokens = max_prefill_tokens
        self.waiting: deque[S] = deque()
        self.running: list[S] = []  # index = row
        self._cache_shape = (0, 0)
        self._params_changed = True

    @property
    def cached_tokens(self) -> int:
        """Number of tokens in the cache now."""
        return sum(len(s.prompt_ids) + len(s.token_ids) - 1 for s in self.running)

    def plan(self, gone: Callable[[S], bool]) -> StepPlan | None:
        """Return the next step; None if there is nothing to do. Sequences that are ``gone`` leave their rows first."""
        moves = self._compact(gone)
        decoding = list(self.running)
        admitted = self._admit()
        if not self.running:
            return None
        first: dict[tuple[int, ...], int] = {}
        plan = StepPlan(
            kind="run",
            moves=moves,
            cache_shape=self._cache_shape,
            tokens=[s.token_ids[-1] for s in decoding],
            lengths=[len(s.prompt_ids) + len(s.token_ids) - 1 for s in decoding],
            prompts=[s.prompt_ids for s in admitted],
            duplicate_of=[first.setdefault(s.prompt_ids, i) for i, s in enumerate(admitted)],
            drawn=[len(s.token_ids) for s in self.running],
            params=[s.row_params for s in self.running] if self._params_changed else None,
        )
        self._params_changed = False
        return plan

    def _compact(self, gone: Callable[[S], bool]) -> list[tuple[int, int, int]]:
        """Drop sequences that are gone, and move the last rows into the free ones."""
        moves: list[tuple[int, int, int]] = []
        row = 0
        while row < len(self.running):
            if not gone(self.running[row]):
                row += 1
                continue
            self._params_changed = True
            last = self.running.pop()
            while len(self.running) > row and gone(last):
                last = self.running.pop()
            if len(self.running) > row:
                moves.append((len(self.running), row, len(last.prompt_ids) + len(last.token_ids) - 1))
                self.running[row] = last
                row += 1
        return moves

    def _admit(self) -> list[S]:
        admitted: list[S] = []
        prefill_tokens = 0
        new_prompts: set[tuple[int, ...]] = set()
        while self.waiting and len(self.running) < self.max_batch:
            candidate = self.waiting[0]
            cost = 0 if candidate.prompt_ids in new_prompts else len(candidate.prompt_ids)
            if admitted and prefill_tokens + cost > self.max_prefill_tokens:
                break
            shape = self._shape_with([*self.running, candidate])
            if shape is None:
                break
            self._cache_shape = shape
            prefill_tokens += cost
            new_prompts.add(candidate.prompt_ids)
            admitted.append(self.waiting.popleft())
            self.running.append(candidate)
            self._params_changed = True
        return admitted

    def _shape_with(self, sequences: Sequence[S]) -> tuple[int, int] | None:
        """Return a cache shape that holds ``sequences`` to their ends, if possible the present one; None if the budget
        is too small.
        """
        budget, count = self.max_cache_tokens, len(sequences)
        rows, capacity = self._cache_shape
        longest = max(s.total_tokens for s in sequences)
        if count <= rows and longest <= capacity:
            return rows, capacity
        if count * longest > budget:
            return None
        wanted = max(capacity, -(-longest // _CAPACITY_STEP) * _CAPACITY_STEP)
        if count * wanted > budget:
            wanted = min(-(-longest // _CAPACITY_STEP) * _CAPACITY_STEP, budget // count)
        doubled = max(rows, 1 << (count - 1).bit_length())
        return min(self.max_batch, doubled, budget // wanted), wanted
