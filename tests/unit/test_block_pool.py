"""The pool of cache blocks: what is free, shared, known, and spoiled, over random histories."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from steerlm_megatron.generate.block_pool import ROOT, BlockPool

SIZE = 2


class Pool(RuleBasedStateMachine):
    """Users that take, share and release blocks, against a plain account of who holds what and what blocks contain."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6, SIZE)
        self.users: list[tuple[list[int], list[int]]] = []  # (tokens, blocks)
        self.content: dict[int, tuple[int, ...]] = {}  # block -> the sequence up to its end
        self.spoiled: set[int] = set()

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def admit(self, tokens: list[int]) -> None:
        pool = self.pool
        shared = pool.match(tokens, len(tokens) - 1)
        for i, block in enumerate(shared):
            assert self.content[block] == tuple(tokens[: (i + 1) * SIZE]), "a prefix is found by its tokens"
            assert block not in self.spoiled
        missing = pool.blocks_for(len(tokens)) - len(shared)
        if missing > pool.free - pool.free_among(shared):
            return
        pool.share(shared, len(tokens))
        taken = [pool.take() for _ in range(missing)]
        assert not {block for _, held in self.users for block in held} & set(taken), "nobody used them"
        blocks, chain = [*shared, *taken], pool.chain(shared)
        for block in taken:
            self.content.pop(block, None)
        for i in range(len(shared), len(tokens) // SIZE):
            part = tuple(tokens[i * SIZE : (i + 1) * SIZE])
            chain = pool.register(chain, part, blocks[i])
            self.content[blocks[i]] = tuple(tokens[: (i + 1) * SIZE])
        self.users.append((tokens, blocks))

    @precondition(lambda self: self.users)
    @rule(data=st.data(), spoil=st.booleans())
    def leave(self, data: st.DataObject, spoil: bool) -> None:
        _, blocks = self.users.pop(data.draw(st.integers(0, len(self.users) - 1)))
        if spoil:
            self.pool.spoil(blocks)
            self.spoiled |= set(blocks)
        left = {block for _, held in self.users for block in held}
        wiped = self.pool.release(blocks)
        assert set(wiped) == {block for block in blocks if block in self.spoiled and block not in left}
        self.spoiled -= set(wiped)

    @invariant()
    def blocks_are_used_or_free(self) -> None:
        used = {block for _, held in self.users for block in held}
        assert self.pool.used == len(used) and self.pool.free == self.pool.blocks - len(used)

    @invariant()
    def everything_can_be_given_out(self) -> None:
        if not self.users:
            assert self.pool.free == self.pool.blocks


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_the_end_of_a_chain_is_given_out_first() -> None:
    pool = BlockPool(3, SIZE)
    blocks = [pool.take() for _ in range(3)]
    chain = ROOT
    for i, block in enumerate(blocks):
        chain = pool.register(chain, (i, i), block)
    assert pool.release(blocks) == []
    assert pool.match([0, 0, 1, 1, 2, 2], 6) == blocks
    assert pool.take() == blocks[2]
    assert pool.match([0, 0, 1, 1, 2, 2], 6) == blocks[:2] and pool.counts.evicted_blocks == 1
    assert pool.match([0, 0, 1, 1], 3) == blocks[:1], "within the first tokens alone"


@given(st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_equal_chains_have_one_block(prompts: list[list[int]]) -> None:
    pool = BlockPool(32, SIZE)
    for tokens in prompts:
        shared = pool.match(tokens, len(tokens))
        pool.share(shared, len(tokens))
        blocks, chain = list(shared), pool.chain(shared)
        for i in range(len(shared), len(tokens) // SIZE):
            blocks.append(pool.take())
            chain = pool.register(chain, tuple(tokens[i * SIZE : (i + 1) * SIZE]), blocks[i])
    heads, both = {tuple(p[:2]) for p in prompts}, {tuple(p) for p in prompts}
    assert pool.used == len(heads) + len(both)
    lookups = Counter(tuple(p) for p in prompts)
    assert pool.counts.hit_tokens >= sum(4 * (count - 1) for count in lookups.values())
