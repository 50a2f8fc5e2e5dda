"""Response text while it grows, and where it ends.

Owns: incremental detokenisation, stop strings, and the template's suffix before a stop token. Invariant: what
:meth:`push` has returned is a prefix of the final text, and never holds a part of a stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"  # what decoders put for an unfinished multi-byte character


class ResponseText:
    """The text of one response. ``push`` is only needed where stop strings or streaming ask for text along the way."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str], suffix: str) -> None:
        """``suffix``: the text a template puts between a response and its stop token
        (``Template.response_suffix``)."""
        self._decode = decode
        self._stop = tuple(stop)
        self._suffix = suffix
        # A tail that may yet turn out to be part of these is held back.
        self._held = (*self._stop, *([suffix + "\0"] if suffix else []))
        self._longest_stop = max((len(s) for s in stop), default=0)
        self._ids: list[int] = []
        self._window = 0  # decoding starts here ...
        self._read = 0  # ... and ids before this one are in text already
        self._text = ""
        self._sent = 0
        self.stopped_at: int | None = None  # where a stop string begins

    def push(self, token_id: int) -> str:
        """Add a token; return the text that has become certain. After a hit ``stopped_at`` is set."""
        self._ids.append(token_id)
        # Decode a short window, with and without the new tokens: decoders treat the first piece of a text specially.
        before = self._decode(self._ids[self._window : self._read])
        after = self._decode(self._ids[self._window :])
        if after.endswith(_REPLACEMENT) or len(after) <= len(before):
            return ""
        start = max(0, len(self._text) - self._longest_stop + 1)
        self._text += after[len(before) :]
        self._window, self._read = self._read, len(self._ids)
        hits = [at for s in self._stop if (at := self._text.find(s, start)) >= 0]
        if hits:
            self.stopped_at = min(hits)
        certain = self.stopped_at if self.stopped_at is not None else len(self._text) - self._tail()
        piece = self._text[self._sent : certain]
        self._sent = max(self._sent, certain)
        return piece

    def _tail(self) -> int:
        """Characters at the end that could be the beginning of a stop string or of the suffix."""
        longest = max((len(s) - 1 for s in self._held), default=0)
        for size in range(min(longest, len(self._text)), 0, -1):
            tail = self._text[-size:]
            if any(s.startswith(tail) for s in self._held):
                return size
        return 0

    def finish(self, ids: Sequence[int], by_control: bool) -> tuple[str, str]:
        """The whole text and what of it :meth:`push` has not returned yet.

        ``ids``: the response without its stop token. ``by_control``: a stop token ended it, so the template's suffix
        goes.
        """
        if self.stopped_at is not None:
            text = self._text[: self.stopped_at]
        else:
            text = self._decode(ids)
            # Text decoded only now (an unfinished character before it held it back) may hold a stop string too.
            hits = [at for s in self._stop if (at := text.find(s)) >= 0]
            if hits:
                text = text[: min(hits)]
            elif by_control and self._suffix:
                text = text.removesuffix(self._suffix)
        return text, text[self._sent :]
