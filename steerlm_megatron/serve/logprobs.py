"""Log-probabilities as responses show them, in OpenAI's two shapes.

Owns: which bytes and which place of the text each token has, the names of tokens, and what of them a stream may show
already. Does not own: the numbers (``generate/sampling.py``). Invariants: the bytes of a response's tokens, joined, are
those of its text; the log-probabilities of a stream's chunks, joined, are those of the whole response.

The shapes are documented at https://platform.openai.com/docs/api-reference/chat/object and
https://platform.openai.com/docs/api-reference/completions/object; that ``echo`` lists the tokens of the prompt first,
the first of them without a number, is how lm-eval's ``local-completions`` and vLLM know it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.generate.protocol import Delta, Result, Top
from steerlm_megatron.generate.text import character_of_each_byte


@dataclass
class Scored:
    """Tokens of a response, each with its bytes in the text, its log-probability, and those of the most likely tokens
    in its place. ``offsets``: the index of the character at which each begins.
    """

    ids: Sequence[int]
    parts: Sequence[bytes]
    logprobs: Sequence[float | None]
    top: Sequence[Top | None] | None
    offsets: Sequence[int]

    def after(self, count: int) -> Scored:
        """Return what follows the first ``count`` tokens."""
        top = None if self.top is None else self.top[count:]
        return Scored(self.ids[count:], self.parts[count:], self.logprobs[count:], top, self.offsets[count:])


@dataclass
class Pending:
    """What a stream has not yet shown of one choice's tokens."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[Top] = field(default_factory=list)
    shown: int = 0  # tokens
    chars: int = 0  # of the text that was sent
    place: int = 0  # the character at which the first token that is not shown begins

    def add(self, delta: Delta) -> None:
        """Take in the tokens of a delta."""
        self.ids += delta.token_ids
        self.logprobs += delta.logprobs or ()
        self.top += delta.top_logprobs or ()

    def take(self, text: str) -> None:
        """Note that ``text`` is sent; if nothing is pending then, the next token begins after it."""
        self.chars += len(text)
        if self.shown == len(self.ids):
            self.place = self.chars


class TokenTexts:
    """Shows tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # The tokens of a tokenizer that does not know their bytes are taken to be complete characters.
        self.bytes_of: Callable[[int], bytes] = getattr(
            tokenizer, "token_bytes", lambda i: tokenizer.decode([i]).encode()
        )

    def place(
        self, ids: Sequence[int], silent: Set[int] = frozenset(), shown: str | None = None, prefix: str = ""
    ) -> tuple[list[bytes], list[int]]:
        """Return the bytes that each token contributes to a text, and the index of the character where it begins.

        ``silent`` tokens contribute none. ``shown`` is the text if it is cut off (by a stop string, or by a template's
        suffix); None stands for the complete one. ``prefix`` is what is left out where the text begins with it.
        """
        parts = [b"" if i in silent else self.bytes_of(i) for i in ids]
        text = self.tokenizer.decode([i for i in ids if i not in silent])
        characters = character_of_each_byte(b"".join(parts), text)
        count = characters[-1] + 1 if characters else 0
        begin = len(prefix) if text.startswith(prefix) else 0
        # Counted from the end of the text, where it was cut off.
        cut = len(text) - begin - len(shown) if shown is not None and text.startswith(shown, begin) else 0
        kept = count - cut
        offsets: list[int] = []
        at = 0
        for i, part in enumerate(parts):
            own = characters[at : at + len(part)]
            if not own and at == len(characters):
                offsets.append(count)
            else:
                offsets.append(own[0] if own else characters[at])
            parts[i] = bytes(byte for byte, of in zip(part, own, strict=True) if begin <= of < kept)
            at += len(part)
        return parts, offsets

    def of_result(self, result: Result, silent: Set[int], prefix: str = "") -> Scored:
        """Return the tokens of a response. Those that ended it (a stop token, a stop string) contribute no bytes to its
        text, nor does any of ``silent``, nor a ``prefix`` that its text is without.
        """
        assert result.logprobs is not None
        parts, offsets = self.place(result.token_ids, silent, result.text, prefix)
        return Scored(result.token_ids, parts, result.logprobs, result.top_logprobs, offsets)

    def of_prompt(self, ids: Sequence[int], result: Result) -> Scored:
        """Return the tokens of a prompt, which a response echoes."""
        parts, offsets = self.place(ids)
        assert result.prompt_logprobs is not None
        return Scored(ids, parts, result.prompt_logprobs, result.prompt_top_logprobs, offsets)

    def of_stream(self, pending: Pending, silent: Set[int], prefix: str = "") -> Scored:
        """Return the tokens that a stream has taken in and not shown, all of whose text it has, and mark them shown.
        ``prefix`` is what the text is without, if it begins with that.
        """
        new = slice(pending.shown, None)
        ids = pending.ids[new]
        parts, offsets = self.place(ids, silent, prefix="" if pending.shown else prefix)
        scored = Scored(
            ids, parts, pending.logprobs[new], pending.top[new] or None, [pending.place + at for at in offsets]
        )
        pending.shown = len(pending.ids)
        return scored

    def name(self, token_id: int, as_id: bool) -> str:
        """Return a token as log-probabilities name it."""
        return f"token_id:{token_id}" if as_id else self.tokenizer.decode([token_id])

    def chat(self, scored: Scored, likely: int, as_ids: bool) -> dict[str, Any]:
        """Return the ``logprobs`` of a chat's choice, with the ``likely`` most likely tokens of each place."""
        content = []
        for at, (i, part, logprob) in enumerate(zip(scored.ids, scored.parts, scored.logprobs, strict=True)):
            tops = () if scored.top is None else _agreeing(scored.top[at], i, logprob)[:likely]
            others = [
                {"token": self.name(other, as_ids), "logprob": value, "bytes": list(self.bytes_of(other))}
                for other, value in tops
            ]
            token = {"token": self.name(i, as_ids), "logprob": logprob, "bytes": list(part), "top_logprobs": others}
            content.append(token)
        return {"content": content, "refusal": None}

    def completion(self, scored: Sequence[Scored], likely: int, as_ids: bool) -> dict[str, Any]:
        """Return the ``logprobs`` of a completion's choice, of pieces of its text one after another, whose offsets
        count from the beginning of the text. With ``likely`` 0 they have no ``top_logprobs``; otherwise these have the
        most likely tokens, and the chosen one if it is not among them.
        """
        top: list[dict[str, float] | None] = []
        for piece in scored:
            for at, (i, logprob) in enumerate(zip(piece.ids, piece.logprobs, strict=True)):
                if logprob is None or piece.top is None:
                    top.append(None)
                    continue
                names: dict[str, float] = {}
                for other, value in (*_agreeing(piece.top[at], i, logprob)[:likely], (i, logprob)):
                    names.setdefault(self.name(other, as_ids), value)
                top.append(names)
        return {
            "tokens": [self.name(i, as_ids) for piece in scored for i in piece.ids],
            "token_logprobs": [logprob for piece in scored for logprob in piece.logprobs],
            "top_logprobs": top if likely else None,
            "text_offset": [at for piece in scored for at in piece.offsets],
        }


def _agreeing(top: Top | None, chosen: int, logprob: float | None) -> Top:
    """Return ``top`` with the number that is reported for the chosen token, which another sum may have rounded
    otherwise: clients compare the two.
    """
    if logprob is None:
        return top or ()
    return tuple((i, logprob if i == chosen else value) for i, value in top or ())
