"""What a model's own Jinja chat template renders, and what follows from that about its format.

Owns: rendering with marks in the place of texts; what closes a response, what stands before it, which blanks around
texts are lost. Does not own: segments (``jinja_template.py``), running Jinja safely (``jinja_sandbox.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property

from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.jinja_sandbox import render_chat_template
from steerlm_megatron.steer.records import Message
from steerlm_megatron.steer.templates import Spoken

# Characters of Unicode's private use, which no chat template treats in a special way.
MARK = re.compile("\ue000(\\d+)\ue001")
# Texts on which a chat template could do more than write them.
_TRIED = ("What is 2 + 2?\nShow {{ your }} work.", "It is <b>4</b>.", "Thanks! And in 1984?")
AROUND = " \n\t {}\t \n "
# What a chat template may do with blanks around a text, as the name of a method of str.
_BLANKS = ("", "lstrip", "rstrip", "strip")
# In ``Rendering.blanks``, in the place of a role: the first user behind a system text, or behind an empty one.
BEHIND_SYSTEM, BEHIND_EMPTY = "user behind system", "user behind empty system"


def probes(system: str | None) -> list[tuple[list[Message], bool]]:
    """Conversations to try: one prompt, and one with a history."""
    head = [] if system is None else [Message("system", system)]
    first, answer, second = (
        Message(role, text) for role, text in zip(("user", "assistant", "user"), _TRIED, strict=True)
    )
    return [([*head, first], True), ([*head, first, answer, second], True)]


@dataclass(frozen=True)
class Rendering:
    """What a chat template renders.

    Args:
        source: the Jinja source.
        tokens: variables such as ``bos_token``.
        controls: the strings that the tokenizer has one token for, among those that the chat template writes.
        day: the day (ISO 8601) that the chat template is told, where it asks.
    """

    source: str
    tokens: Mapping[str, str]
    controls: tuple[str, ...]
    day: str

    def rendered(self, messages: Sequence[Message], generate: bool) -> str:
        """Return the text of a conversation; with ``generate``, of a prompt. ``UserError`` if it is refused."""
        plain = [{"role": message.role, "content": message.content} for message in messages]
        return render_chat_template(self.source, plain, self.tokens, generate, date.fromisoformat(self.day))

    def marked(self, messages: Sequence[Spoken], generate: bool) -> str:
        """Render with a mark in the place of each text. An empty system text stays empty: it may have no place."""
        marks = [
            Message(m.role, f"\ue000{i}\ue001" if m.content or m.role != "system" else "")
            for i, m in enumerate(messages)
        ]
        return self.rendered(marks, generate)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.controls, key=len, reverse=True)
        return re.compile(f"{MARK.pattern}|(?P<control>{'|'.join(map(re.escape, longest_first))})")

    def split(self, text: str) -> list[tuple[str, bool]]:
        """Return the text cut at control strings: pieces, and whether each is a control string."""
        if not self.controls:
            return [(text, False)]
        pieces, at = [], 0
        for match in self._pattern.finditer(text):
            if match["control"] is None:  # a mark, whose number may look like a control string
                continue
            pieces += [(text[at : match.start()], False), (match[0], True)]
            at = match.end()
        return [piece for piece in (*pieces, (text[at:], False)) if piece[0]]

    @cached_property
    def between(self) -> tuple[str, str]:
        """What stands between a response and the next user's text, cut behind the stop string."""
        messages, _ = probes(None)[1]
        text = self.marked(messages, True)
        between = text.partition("\ue0001\ue001")[2].partition("\ue0002\ue001")[0]
        before = ""
        for piece, control in self.split(between):
            before += piece
            if control:
                return before, between[len(before) :]
        raise UserError(
            "the chat template closes a response with no token that ends it; a format of ours (template=chatml) may do"
        )

    @cached_property
    def closing(self) -> tuple[str, str]:
        """The text between a response and its stop string, and the stop string."""
        pieces = self.split(self.between[0])
        return "".join(text for text, control in pieces if not control), pieces[-1][0]

    @cached_property
    def around_response(self) -> tuple[str, str]:
        """The text before and after an earlier response, between two questions."""
        messages, _ = probes(None)[1]
        answer = messages[1].content
        text = self.rendered([messages[0], replace(messages[1], content="\ue0001\ue001"), messages[2]], True)
        before, found, after = text.partition("\ue0001\ue001")
        return (before, after) if found else (text + answer, "")

    @cached_property
    def blanks(self) -> Mapping[str, str]:
        """What texts of users and systems lose of the blanks around them: the names of methods of ``str``. The text of
        a user behind that of a system may lose others, since some chat templates join the two.
        """
        found = {}
        text = AROUND.format("x")
        for role, system, user in (
            ("user", None, text), ("system", text, "y"), (BEHIND_SYSTEM, "y", text), (BEHIND_EMPTY, "", text)
        ):  # fmt: skip
            messages = [*([] if system is None else [Message("system", system)]), Message("user", user)]
            try:
                rendered = self.rendered(messages, True)
            except UserError:
                continue  # it has no system text
            change: Callable[[str], str]
            for name in _BLANKS:
                change = getattr(str, name) if name else str
                if change(text) in rendered:
                    found[role] = name
                    break
        return found

    @cached_property
    def response_prefix(self) -> str:
        """The blanks before a response that stand in no request for one (``Template.response_prefix``)."""
        (first, _), (conversation, _) = probes(None)
        asked, earlier = self.marked(first, True), self.marked(conversation, True).partition("\ue0001\ue001")[0]
        found = earlier.removeprefix(asked) if earlier.startswith(asked) else ""
        return found if found.isspace() else ""
