"""The text of a growing response, and the detection of its end.

Owns: incremental detokenisation, stop strings, and the template's suffix before a stop token. Invariants: what
:meth:`ResponseText.push` has returned is a prefix of the final text, and never holds a part of a stop string; the final
text does not depend on whether text was read on the way; the work is linear in the number of tokens, whatever bytes
they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

_REPLACEMENT = "\ufffd"  # decoders write it for invalid bytes, and for a character that is unfinished
# A character of UTF-8 has at most four bytes, so an unfinished one has at most three; decoders write one U+FFFD for all
# three or one for each. In a longer run of U+FFFD all but the last three are therefore final.
_UNFINISHED = 3
# While text ends in U+FFFD, the decoded window is cut to its last _KEPT tokens whenever it has _WINDOW tokens. That
# many tokens make more than _UNFINISHED characters, even where each U+FFFD stands for three bytes.
_WINDOW, _KEPT = 24, 12


class Detokenizer:
    """The text of a growing sequence of token ids. Each id is decoded a bounded number of times."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._window = 0  # decoding starts here
        self._returned = ""  # the part of the window's text that push() has returned
        self._clean = 0  # ids before this one make whole characters

    @property
    def count(self) -> int:
        """Number of ids that were pushed."""
        return len(self._ids)

    def push(self, token_id: int) -> str:
        """Add an id and return the text that has become final."""
        self._ids.append(token_id)
        text = self._decode(self._ids[self._window :])
        if not text.startswith(self._returned):
            # Some decoders show a complete run of bytes as U+FFFD while its last character is unfinished.
            if len(self._ids) - self._clean <= _UNFINISHED:
                return ""
            self._window, self._returned = self._clean, ""
            text = self._decode(self._ids[self._window :])
        held = len(text) - len(text.rstrip(_REPLACEMENT))
        certain = max(len(self._returned), len(text) - min(held, _UNFINISHED))
        piece, self._returned = text[len(self._returned) : certain], text[:certain]
        if not held:
            self._move(self._clean, text)
            self._clean = len(self._ids)
        elif len(self._ids) - self._window >= _WINDOW:
            self._move(len(self._ids) - _KEPT, text)
        return piece

    @property
    def whole(self) -> bool:
        """Whether the ids so far make whole characters, all of which :meth:`push` has returned."""
        return self._clean == len(self._ids)

    def rest(self) -> str:
        """Return the text that :meth:`push` has not returned yet; an unfinished character stays as decoded."""
        text = self._decode(self._ids[self._window :])
        if not text.startswith(self._returned):
            return self._decode(self._ids[self._clean :])
        return text[len(self._returned) :]

    def _move(self, window: int, text: str) -> None:
        """Decode from ``window`` on; ``text`` is that of the present window.

        The beginning of the new window may decode differently than it did inside the old one: decoders treat the first
        token of a text specially, and the window may begin inside a character. Its end decodes equally, so the text
        that has been returned is counted from the end.
        """
        if window <= self._window:
            return
        new = self._decode(self._ids[window:])
        returned = len(new) - (len(text) - len(self._returned))
        if returned >= 0:
            self._window, self._returned = window, new[:returned]


@lru_cache(maxsize=512)  # the choices of one request, and the requests of one client, have the same stop strings
def _borders(pattern: str) -> tuple[int, ...]:
    """Return for each prefix of ``pattern`` the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(pattern)
    size = 0
    for i in range(1, len(pattern)):
        while size and pattern[i] != pattern[size]:
            size = borders[size - 1]
        if pattern[i] == pattern[size]:
            size += 1
        borders[i] = size
    return tuple(borders)


class _Match:
    """The length of the prefix of ``pattern`` that a growing text ends with, by Knuth, Morris and Pratt's algorithm."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.size = pattern, 0
        self._borders = _borders(pattern)

    def push(self, text: str) -> int | None:
        """Add ``text`` and return the number of its characters up to the end of the first full match, or None."""
        pattern, borders, size, found = self.pattern, self._borders, self.size, None
        for at, char in enumerate(text, 1):
            while size and (size == len(pattern) or pattern[size] != char):
                size = borders[size - 1]
            if pattern[size] == char:
                size += 1
                if size == len(pattern) and found is None:
                    found = at
        self.size = size
        return found


class ResponseText:
    """The text of one response. ``push`` is only needed where stop strings or streaming ask for text along the way."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str],
        suffix: str,
        include_stop: bool = False,
        min_tokens: int = 0,
        silent_ids: frozenset[int] = frozenset(),
        prefix: str = "",
    ) -> None:
        """``prefix`` is left out where a response begins with it (``response_prefix``). ``suffix`` is the text that a
        template puts between a response and its stop token (``response_suffix``).
        ``include_stop``: the stop string is part of the text. A stop string that is complete within the first
        ``min_tokens`` tokens is ordinary text. ``silent_ids`` are tokens that are no text.
        """
        self._decode = decode
        self._include_stop, self._min_tokens, self._silent_ids = include_stop, min_tokens, silent_ids
        self._count = 0  # tokens that were pushed
        self._suffix = suffix
        self._detokenizer = Detokenizer(decode)
        self._stops = [_Match(text) for text in stop]
        # A tail that may become part of a stop string, or of the suffix, is held back. The complete suffix is held back
        # too, so the pattern ends in a character that never comes.
        self._held = [*self._stops, *([_Match(suffix + "\0")] if suffix else [])]
        self._returned: list[str] = []
        self._open = ""  # text that follows what was returned
        self._prefix, self._begun = prefix, ""  # the prefix that may still come; the text that may be its beginning
        self.stopped_at: int | None = None  # index at which the text ends, since a stop string was found
        self.stop: str | None = None  # that stop string

    @property
    def whole(self) -> bool:
        """Whether :meth:`push` has returned the text of all tokens so far."""
        return not self._open and not self._begun and self._detokenizer.whole

    def push(self, token_id: int) -> str:
        """Add a token and return the text that has become final. ``stopped_at`` is set when a stop string was found."""
        self._count += 1
        if token_id in self._silent_ids:
            return ""
        self._add(self._detokenizer.push(token_id))
        certain = len(self._open)
        if self.stopped_at is None:
            certain -= max((min(held.size, len(held.pattern) - 1) for held in self._held), default=0)
        piece, self._open = self._open[:certain], self._open[certain:]
        self._returned.append(piece)
        return piece

    def _add(self, text: str) -> None:
        """Add final text, up to the first stop string in it."""
        text = self._without_prefix(text)
        if not text or self.stopped_at is not None:
            return
        ends = [(match, match.push(text)) for match in self._held]
        before = len(self._open)
        self._open += text
        hits = [
            (before + end - len(match.pattern), before + end, match.pattern)
            for match, end in ends
            if end is not None and match in self._stops and self._count > self._min_tokens
        ]
        if hits:
            start, end, self.stop = min(hits)
            self._open = self._open[: end if self._include_stop else max(0, start)]
            self.stopped_at = sum(map(len, self._returned)) + len(self._open)

    def _without_prefix(self, text: str) -> str:
        """Return the part of the text that is certain not to belong to the prefix."""
        if not self._prefix:
            return text
        self._begun += text
        if len(self._begun) < len(self._prefix) and self._prefix.startswith(self._begun):
            return ""
        text, self._begun = self._begun.removeprefix(self._prefix), ""
        self._prefix = ""
        return text

    def finish(self, ids: Sequence[int], by_control: bool) -> tuple[str, str]:
        """Return the complete text, and the part of it that :meth:`push` has not returned yet.

        ``ids`` are the tokens of the response. ``by_control``: a stop token of the template ended it, so the template's
        suffix is removed.
        """
        ids = [i for i in ids if i not in self._silent_ids] if self._silent_ids else ids
        if self.stopped_at is None:
            whole = "" if self._detokenizer.count else self._decode(ids)
            if self._detokenizer.count or _REPLACEMENT in whole:
                # Some decoders show invalid bytes differently when more bytes follow, so the text is made as a
                # streaming client gets it.
                for token_id in ids[self._detokenizer.count :]:
                    self._count += 1
                    self._add(self._detokenizer.push(token_id))
                whole = self._detokenizer.rest()
            self._add(whole)
        if self._begun:  # the text has ended before the prefix was complete
            begun, self._begun, self._prefix = self._begun, "", ""
            self._add(begun)
        if self.stopped_at is None and by_control:
            self._open = self._open.removesuffix(self._suffix)
        return "".join(self._returned) + self._open, self._open


def character_of_each_byte(data: bytes, text: str) -> list[int]:
    """Return for each byte of ``data`` the index of its character in ``text``, which a decoder made of it.

    Some decoders make one U+FFFD of each invalid byte, others one of all bytes of an incomplete character; the number
    of characters tells which.
    """
    by_byte = _characters(data, per_byte=True)
    return by_byte if by_byte[-1:] == [len(text) - 1] else _characters(data, per_byte=False)


def _characters(data: bytes, per_byte: bool) -> list[int]:
    found: list[int] = []
    count = at = 0
    while at < len(data):
        try:
            valid, wrong = data[at:].decode(), 0
        except UnicodeDecodeError as error:
            valid, wrong = data[at : at + error.start].decode(), error.end - error.start
        for char in valid:
            found += [count] * len(char.encode())
            count += 1
        found += range(count, count + wrong) if per_byte else [count] * wrong
        count += wrong if per_byte else wrong > 0
        at = len(found)
    return found
