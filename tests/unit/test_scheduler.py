"""Plans, executed on a cache of numbers: whatever is preempted, shared, chunked or cancelled, every sequence finds its
own tokens in its blocks.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlm_megatron.generate.block_pool import BlockPool
from steerlm_megatron.generate.sampling import RowParams
from steerlm_megatron.generate.scheduler import Scheduler, StepPlan


@dataclass(eq=False)
class Sample:
    """A sequence whose next token is a function of all before."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    row_params: RowParams = RowParams(1.0, 0, 1.0, 0)
    token_ids: list[int] = field(default_factory=list)
    failed: bool = False
    gone: bool = False

    @property
    def total_tokens(self) -> int:
        return len(self.prompt_ids) + self.max_tokens


def following(tokens: tuple[int, ...]) -> int:
    return hash(tokens) % 5


class Rank:
    """What a rank does with plans, with the tokens up to each slot in the place of keys and values."""

    def __init__(self, blocks: int, size: int) -> None:
        self.memory: list[list[Any]] = [[None] * size for _ in range(blocks)]
        self.size = size
        self.rows: list[dict[str, Any]] = []
        self.most_prompt_tokens = 0
        self.fed = 0

    def run(self, plan: StepPlan) -> list[int]:
        for block in plan.wipe:
            self.memory[block] = [None] * self.size
        if plan.keep is not None:
            self.rows = [self.rows[i] for i in plan.keep]
        for new in plan.new:
            row = {"tokens": list(new.tokens), "length": new.start, "blocks": list(new.blocks), "copy_of": new.copy_of}
            self.rows.append({**row, "known": ()})
        for number, block in plan.blocks:
            self.rows[number]["blocks"].append(block)
        chunks = dict(plan.chunks)
        self.most_prompt_tokens = max(self.most_prompt_tokens, sum(chunks.values()))
        work: list[tuple[dict[str, Any], int]] = []
        for number, row in enumerate(self.rows):
            count = chunks.get(number, 1)
            if number not in chunks:
                assert row["tokens"], "it was sampled in the step before"
            work.append((row, count))
        # Blocks that a step fills are read in that step: row after row, each writes before any later one reads.
        sampled: list[int] = []
        for row, count in work:
            for token in row["tokens"][:count]:
                at = row["length"]
                before = self._read(row, at)
                self._write(row, at, (*before, token))
                row["length"] += 1
            self.fed += count
            row["tokens"] = row["tokens"][count:]
        for row, _ in work:
            if row["tokens"]:
                continue
            if row["copy_of"] is not None:
                source = self.rows[row["copy_of"]]
                row["known"] = self._read(source, source["length"])
                row["copy_of"] = None
            else:
                row["known"] = self._read(row, row["length"])
            sampled.append(following(row["known"]))
            row["tokens"] = [sampled[-1]]
        for source_block, target in plan.copies:
            self.memory[target] = list(self.memory[source_block])
        return sampled

    def _read(self, row: dict[str, Any], length: int) -> tuple[int, ...]:
        """All tokens up to ``length``, which every slot on the way must agree about."""
        found: tuple[int, ...] = ()
        for i in range(length):
            value = self.memory[row["blocks"][i // self.size]][i % self.size]
            assert value is not None and value[:-1] == found, "a slot holds what follows what is before it"
            found = value
        return found

    def _write(self, row: dict[str, Any], at: int, value: tuple[int, ...]) -> None:
        self.memory[row["blocks"][at // self.size]][at % self.size] = value


def run_all(samples: list[Sample], blocks: int, size: int, batch: int, chunk: int, reserve: bool, rng: Any) -> Any:
    scheduler: Scheduler[Sample] = Scheduler(BlockPool(blocks, size), batch, chunk, reserve)
    rank, arriving = Rank(blocks, size), list(samples)
    steps = 0
    while arriving or scheduler.waiting or scheduler.rows:
        for _ in range(rng.randint(0, 3)):
            if arriving:
                scheduler.waiting.append(arriving.pop(0))
        plan = scheduler.plan(lambda s: s.gone)
        if plan is None:
            continue
        steps += 1
        assert steps < 10_000
        asked = scheduler.sampling()
        for sample, token in zip(asked, rank.run(plan), strict=True):
            sample.token_ids.append(token)
            sample.gone = len(sample.token_ids) == sample.max_tokens
            sample.failed = sample.gone and rng.random() < 0.1
        if rng.random() < 0.05 and scheduler.rows:
            rng.choice(scheduler.rows).sequence.gone = True
    assert rank.most_prompt_tokens <= chunk
    assert scheduler.pool.used == 0, "nobody keeps a block"
    return scheduler, rank, steps


@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 4),
    batch=st.integers(1, 6),
    chunk=st.integers(1, 12),
    spare=st.integers(0, 12),
    reserve=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_every_sequence_gets_its_own_tokens(
    seed: int, size: int, batch: int, chunk: int, spare: int, reserve: bool
) -> None:
    rng = random.Random(seed)
    samples = []
    for _ in range(rng.randint(1, 14)):
        prompt = tuple(rng.randint(0, 1) for _ in range(rng.randint(1, 9)))
        samples.append(Sample(prompt, rng.randint(1, 9)))
    longest = max(sample.total_tokens for sample in samples)
    scheduler, _, _ = run_all(samples, -(-longest // size) + spare, size, batch, chunk, reserve, rng)
    if reserve:
        assert scheduler.preemptions == 0
    for sample in samples:
        expected: list[int] = []
        for _ in sample.token_ids:
            expected.append(following((*sample.prompt_ids, *expected)))
        assert sample.token_ids == expected


def test_a_full_pool_preempts_the_youngest_and_loses_nothing() -> None:
    samples = [Sample((i, i + 1, i + 2), 12) for i in range(4)]
    scheduler, _, _ = run_all(samples, 8, 2, 4, 16, False, random.Random(1))
    assert scheduler.preemptions > 0
    scheduler.waiting.extend(Sample((i, i + 1, i + 2), 12) for i in range(4))
    rows = []
    while (plan := scheduler.plan(lambda s: s.gone)) is not None:
        rows.append(len(scheduler.rows))
        for sample in scheduler.sampling():
            sample.token_ids.append(0)
            sample.gone = len(sample.token_ids) == 12
        assert plan.kind == "run"
    assert max(rows) > rows[-1]


def test_samples_and_variants_of_a_prompt_are_computed_once() -> None:
    rng = random.Random(0)
    prompt = tuple(rng.randrange(100) for _ in range(203))
    for copies in (8, 29):
        samples = [Sample(prompt, 1) for _ in range(copies)]
        _, rank, steps = run_all_at_once(samples, 64, 512)
        assert (rank.fed, steps) == (203, 1)
    variants = [Sample((*prompt, 100 + i), 1) for i in range(29)]
    _, rank, _ = run_all_at_once(variants, 64, 4096)
    assert rank.fed == 204 + 28 * (204 - 192)


def run_all_at_once(samples: list[Sample], batch: int, chunk: int) -> tuple[Scheduler[Sample], Rank, int]:
    scheduler: Scheduler[Sample] = Scheduler(BlockPool(1000, 16), batch, chunk)
    rank = Rank(1000, 16)
    scheduler.waiting.extend(samples)
    steps = 0
    while (plan := scheduler.plan(lambda s: s.gone)) is not None:
        steps += 1
        for sample, token in zip(scheduler.sampling(), rank.run(plan), strict=True):
            sample.token_ids.append(token)
            sample.gone = len(sample.token_ids) == sample.max_tokens
    return scheduler, rank, steps


def test_a_long_prompt_does_not_hold_up_those_that_decode() -> None:
    scheduler: Scheduler[Sample] = Scheduler(BlockPool(1000, 16), 8, 100)
    rank = Rank(1000, 16)
    running = [Sample((i, i), 30) for i in range(3)]
    scheduler.waiting.extend(running)
    plan = scheduler.plan(lambda s: s.gone)
    assert plan is not None
    for sample, token in zip(scheduler.sampling(), rank.run(plan), strict=True):
        sample.token_ids.append(token)
    long = Sample(tuple(range(950)), 3)
    scheduler.waiting.append(long)
    for step in range(10):
        plan = scheduler.plan(lambda s: s.gone)
        assert plan is not None
        for sample, token in zip(scheduler.sampling(), rank.run(plan), strict=True):
            sample.token_ids.append(token)
        assert [len(sample.token_ids) for sample in running] == [step + 2] * 3
    assert len(long.token_ids) == 1 and rank.most_prompt_tokens == 100


@pytest.mark.parametrize(("blocks", "reserve", "most"), [(2048, False, 1.1), (2048, True, 1.4), (16384, True, 1.02)])
def test_steps_are_near_the_bound_of_the_pool(blocks: int, reserve: bool, most: float) -> None:
    """1,500 requests of log-normal lengths, longest first, as ``generate`` submits them. The bound: all their tokens
    over the rows, or all blocks that they hold over the blocks, as if no row and no block were ever idle."""
    rng, size, batch = random.Random(3), 16, 64
    samples = []
    for _ in range(1500):
        prompt, response = (min(800, int(rng.lognormvariate(5, width)) + 1) for width in (0.8, 0.9))
        samples.append(Sample(tuple(rng.randrange(1000) for _ in range(prompt)), response))
    samples.sort(key=lambda sample: -sample.total_tokens)
    scheduler: Scheduler[Sample] = Scheduler(BlockPool(blocks, size), batch, 4096, reserve)
    scheduler.waiting.extend(samples)
    steps = 0
    while scheduler.plan(lambda s: s.gone) is not None:
        steps += 1
        for sample in scheduler.sampling():
            sample.token_ids.append(0)
            sample.gone = len(sample.token_ids) == sample.max_tokens
    by_rows = sum(sample.max_tokens for sample in samples) / batch
    by_blocks = sum(-(-(len(s.prompt_ids) + t) // size) for s in samples for t in range(s.max_tokens)) / blocks
    assert steps <= most * max(by_rows, by_blocks)
