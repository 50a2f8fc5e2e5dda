"""Blocks of the key/value cache: which are free, who uses them, and which hold a prefix that others may share.

Owns: block numbers, their reference counts, and the table from a chain of full blocks to the block that holds its end.
Does not own: tensors (``kv_cache.py``), or who asks for how many (``scheduler.py``). It is pure Python.
Invariants: a block is used by someone, or free, never both; a free block may still hold a known prefix, until it is
given out for something else; two chains are the same only if all their tokens are: chains are compared by their tokens,
not by a hash of them, so a collision cannot hand one prompt's cache to another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ROOT = 0  # the chain before the first block


@dataclass
class PoolCounts:
    """What happened since the start, for metrics."""

    hit_tokens: int = 0  # tokens whose keys and values were found
    asked_tokens: int = 0  # tokens of the prefixes that were looked up
    evicted_blocks: int = 0  # free blocks of a known prefix that were given out for something else


class BlockPool:
    """``blocks`` blocks of ``block_tokens`` tokens each.

    A chain is a number that stands for the tokens from a sequence's start up to the end of a full block. The same
    tokens have the same chain as long as a block holds their end.
    """

    def __init__(self, blocks: int, block_tokens: int) -> None:
        assert blocks > 0 and block_tokens > 0
        self.blocks, self.block_tokens = blocks, block_tokens
        self.counts = PoolCounts()
        self._users = [0] * blocks
        self._empty = list(range(blocks - 1, -1, -1))  # free blocks of no known prefix; the last released goes first
        self._kept: OrderedDict[int, None] = OrderedDict()  # free blocks of a known prefix; the oldest goes first
        self._block_of: dict[tuple[int, tuple[int, ...]], int] = {}  # (chain before, tokens) -> block
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}  # block -> its key in the table above
        self._chain_of: dict[int, int] = {}  # block -> the chain that ends with it
        self._next_chain = ROOT + 1
        self._dirty: set[int] = set()  # what they hold must not reach anyone else

    @property
    def free(self) -> int:
        """Number of blocks that :meth:`take` can give out."""
        return len(self._empty) + len(self._kept)

    @property
    def used(self) -> int:
        """Number of blocks that somebody uses."""
        return self.blocks - self.free

    def blocks_for(self, tokens: int) -> int:
        """Number of blocks that hold ``tokens`` tokens."""
        return -(-tokens // self.block_tokens)

    def take(self) -> int:
        """Give out a free block to one user. There must be one (:attr:`free`)."""
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._kept.popitem(last=False)
            self._unlist(block)
            self.counts.evicted_blocks += 1
        self._users[block] = 1
        return block

    def match(self, tokens: Sequence[int], most: int) -> list[int]:
        """Return the blocks that hold the longest known prefix of ``tokens`` within its first ``most`` tokens. Nothing
        is taken."""
        found: list[int] = []
        chain, size = ROOT, self.block_tokens
        for start in range(0, most - size + 1, size):
            block = self._block_of.get((chain, tuple(tokens[start : start + size])))
            if block is None:
                break
            found.append(block)
            chain = self._chain_of[block]
        return found

    def free_among(self, blocks: Iterable[int]) -> int:
        """Number of ``blocks`` that are free, and so would leave :attr:`free` when shared."""
        return sum(self._users[block] == 0 for block in blocks)

    def share(self, blocks: Sequence[int], asked: int) -> None:
        """Add a user to each of ``blocks``, which :meth:`match` found for a prefix of ``asked`` tokens."""
        for block in blocks:
            if self._users[block] == 0:
                del self._kept[block]
            self._users[block] += 1
        self.counts.hit_tokens += len(blocks) * self.block_tokens
        self.counts.asked_tokens += asked

    def chain(self, blocks: Sequence[int]) -> int:
        """Return the chain that ends with the last of ``blocks``, all of which are known."""
        return self._chain_of[blocks[-1]] if blocks else ROOT

    def register(self, chain: int, tokens: tuple[int, ...], block: int) -> int:
        """Make it known that ``block``, which is full, holds ``tokens`` after ``chain``, and return the chain with
        them. If another block is known to, that one stays known."""
        key = (chain, tokens)
        known = self._block_of.get(key)
        if known is not None:
            return self._chain_of[known]
        assert self._users[block] > 0 and block not in self._key_of and len(tokens) == self.block_tokens
        self._block_of[key], self._key_of[block] = block, key
        self._chain_of[block], self._next_chain = self._next_chain, self._next_chain + 1
        return self._chain_of[block]

    def release(self, blocks: Sequence[int]) -> list[int]:
        """Take one user from each of a sequence's ``blocks``. Return those that must be wiped before anyone else gets
        them.

        The sequence's last block is given out again first: without it, what comes before is still of use.
        """
        wipe: list[int] = []
        for block in reversed(blocks):
            assert self._users[block] > 0
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._dirty:
                self._dirty.remove(block)
                wipe.append(block)
            if block in self._key_of:
                self._kept[block] = None
            else:
                self._empty.append(block)
        return wipe

    def spoil(self, blocks: Iterable[int]) -> None:
        """Note that ``blocks`` may hold numbers that are not finite: nobody else shares them from now on, and they are
        wiped when their last user goes."""
        for block in blocks:
            assert self._users[block] > 0
            self._dirty.add(block)
            self._unlist(block)

    def _unlist(self, block: int) -> None:
        """Forget the prefix that ``block`` holds; chains that go on from there are not found any more."""
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
            del self._chain_of[block]
