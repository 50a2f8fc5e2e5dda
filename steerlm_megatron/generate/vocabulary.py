"""What generation knows of a tokenizer's ids: which end a response, which are never drawn, how long texts can be.

Owns: these sets, and refusing parameters whose ids cannot be used. Does not own: ids ↔ text (``data/text``), which of a
template's strings are what (``steer/templates.py``). Invariant: all of it is found out once, at the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from steerlm_megatron.generate.protocol import SamplingParams


class TokenizerLike(Protocol):
    """The part of ``data.text.tokenizer.Tokenizer`` that generation uses."""

    @property
    def vocab_size(self) -> int: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def encode(self, text: str) -> list[int]: ...

    def control_id(self, text: str) -> int: ...

    @property
    def controls(self) -> dict[str, int]: ...


class TemplateLike(Protocol):
    """The part of ``steer.templates.Template`` that generation uses."""

    @property
    def control_strings(self) -> tuple[str, ...]: ...

    @property
    def stop_strings(self) -> tuple[str, ...]: ...

    @property
    def response_suffix(self) -> str: ...


@dataclass(frozen=True)
class Vocabulary:
    """What the ids of a tokenizer are to a template.

    ``stop_ids`` end a response; ``banned_ids`` are never drawn, since they are not text; ``longest_token_chars`` is the
    largest number of characters of a token, from which a lower bound of a text's tokens follows.
    """

    size: int
    stop_ids: frozenset[int]
    banned_ids: frozenset[int]
    longest_token_chars: int

    @classmethod
    def of(cls, tokenizer: TokenizerLike, template: TemplateLike) -> Vocabulary:
        """Look at each id. It is decoded twice in a row, since a decoder may drop a blank at the start."""
        chars = [len(tokenizer.decode([i, i])) for i in range(tokenizer.vocab_size)]
        # A model that takes no attributes may lack the label marker.
        control = {tokenizer.controls[s] for s in template.control_strings if s in tokenizer.controls}
        silent = {i for i, count in enumerate(chars) if not count}  # tokens without a text such as <s>
        stop = frozenset(stop_ids_of(tokenizer, template))
        return cls(tokenizer.vocab_size, stop, frozenset(control | silent) - stop, -(-max(chars, default=1) // 2))

    def problem(self, params: SamplingParams) -> str | None:
        """Return why the token ids in these parameters cannot be used, or None."""
        allowed = params.allowed_token_ids
        named = {
            "logit_bias": [i for i, _ in params.logit_bias],
            "stop_token_ids": params.stop_token_ids,
            "allowed_token_ids": allowed or (),
        }
        for name, ids in named.items():
            for i in ids:
                if not 0 <= i < self.size:
                    return f"{name}: the token id {i} is outside [0, {self.size})"
        if allowed is not None:
            drawable = set(allowed) - self.banned_ids
            if params.min_tokens:
                drawable -= self.stop_ids | set(params.stop_token_ids)
            if not drawable:
                return "allowed_token_ids leaves no token that may be drawn; name one that is text"
        return None


def stop_ids_of(tokenizer: TokenizerLike, template: TemplateLike) -> set[int]:
    """Return the ids of the tokens that end a response."""
    ids = {tokenizer.control_id(s) for s in template.stop_strings}
    eos = getattr(tokenizer, "eos_id", None)
    return ids | ({eos} if eos is not None and eos >= 0 else set())
