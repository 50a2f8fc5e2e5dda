"""What a step gives: tokens, and what rows asked to know of them. An engine makes it, and ``engine.py`` reads it."""

from __future__ import annotations

from dataclasses import dataclass, field

from steerlm_megatron.generate.protocol import Top

NOT_FINITE = -1  # the row's largest logit is NaN or infinite
NOT_DRAWN = -2  # drawing from the row raised an exception


@dataclass
class Drawn:
    """What a step gives: a token for each row that has been fed all of its tokens, and what rows asked to know of it.

    ``ids`` may be ``NOT_FINITE`` or ``NOT_DRAWN``. ``top``: per row the most likely tokens, as many as it asked for;
    empty if no row asked. ``prompts``, by number among these rows, where the last part of a prompt was computed and the
    row asked: the log-probability of each token of the prompt but the first, and the most likely tokens in its place.
    """

    ids: list[int]
    logprobs: list[float]
    top: list[Top] = field(default_factory=list)
    prompts: dict[int, tuple[list[float], list[Top]]] = field(default_factory=dict)
