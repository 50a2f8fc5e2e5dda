"""What one token stands for inside a text, for models that have no table of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def text_inside(decode: Callable[[Sequence[int]], str], i: int) -> bytes:
    """The UTF-8 of token ``i`` after another token: a decoder may treat the first token of a text specially."""
    return decode([i, i])[len(decode([i])) :].encode()
