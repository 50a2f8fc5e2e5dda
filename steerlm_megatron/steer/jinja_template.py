"""A model's own Jinja chat template as a prompt template, into which label lines are put.

Owns: finding the segments of a conversation in what a chat template renders. Does not own: rendering it
(``jinja_rendering.py``), where a chat template comes from (``stages/base.py``), whether a tokenizer agrees with it
(``stages/prompt_tokens.py``), writing one out (``chat_template.py``). Invariants: the text of ``prefix`` without a
label line is what the chat template renders; and what precedes a response is the same whether more turns follow it or
not, which is tried for every combination of roles (in long conversations, for the first and the last turns). A chat
template for which that does not hold is refused. (Blanks may stand before a response that do not stand in a request for
one: the model begins with them, and they are the ``response_prefix``.) Thoughts that it leaves out of earlier responses
are left out of prompts alone: training keeps them, since the response that has them is trained.

A conversation is rendered with marks in the place of its texts. Between two control strings everything is one segment,
so that its tokens are those of the whole text; only a response is a segment of its own, since it is generated so.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.jinja_rendering import AROUND, BEHIND_EMPTY, BEHIND_SYSTEM, MARK, Rendering, probes
from steerlm_megatron.steer.records import Message
from steerlm_megatron.steer.templates import Part, Segment, Spoken, Template, join

_MOST_LAYOUTS = 1024  # of conversations of at most _LONG messages
_LONG = 64
_TRIED_TURNS = 4  # of a conversation that is longer: at its start, and at its end


def _roles(messages: Sequence[Spoken]) -> str:
    shown = " ".join(message.role for message in messages[:_TRIED_TURNS])
    return shown if len(messages) <= _TRIED_TURNS else f"{shown} and {len(messages) - _TRIED_TURNS} more"


def _another_history(asked: str, earlier: str) -> str:
    """Return what is wrong with a chat template that writes ``asked`` before a response that it asks for, and
    ``earlier`` before the same response as a part of the history.
    """
    said = "the chat template writes a history in another way than it was generated"
    common = os.path.commonprefix([asked, earlier])
    opens, opened = asked[len(common) :], earlier[len(common) :]
    if opens != opened and not MARK.search(opens + opened):
        said += f": it opens a response with {opens!r} where it asks for one, and with {opened!r} in the history"
    return f"{said}; train the model in a format of ours (template=chatml, template=steerlm)"


class _Piece(NamedTuple):
    """A segment whose text is parts: strings, and numbers of messages whose contents stand there."""

    parts: tuple[str | int, ...]
    control: bool
    part: Part
    turn: int


@dataclass(frozen=True)
class JinjaTemplate(Template):
    """A chat template of a model's tokenizer, with a label line before a response or after what the user wrote.

    Args:
        source: the Jinja source.
        tokens: variables such as ``bos_token``.
        controls: the strings that the tokenizer has one token for, among those that the chat template writes.
        day: the day (ISO 8601) that the chat template is told, where it asks.
        label_at: ``response``: ``<extra_id_2>quality:9\\n`` stands right before the response; ``user``:
            ``<extra_id_2>quality:9`` stands right after the text that is answered, inside the user's turn.

    Raises:
        UserError: no stop string follows a response, texts come out changed by more than blanks around them, or a
            history is written in another way than it was generated.
    """

    name: ClassVar[str] = "jinja"

    source: str = ""
    tokens: Mapping[str, str] = field(default_factory=dict)
    controls: tuple[str, ...] = ()
    day: str = ""
    label_at: str = "response"

    @classmethod
    def of(
        cls,
        source: str,
        tokens: Mapping[str, str],
        known: Iterable[str],
        system: str = "",
        label_at: str = "response",
        day: date | None = None,
    ) -> JinjaTemplate:
        """Make the template of a chat template. ``known``: all strings that the tokenizer has one token for."""
        day = day or date.today()
        bare = cls(system, "", source, dict(tokens), (), day.isoformat(), label_at)
        texts = [bare._rendering.marked(messages, generate) for messages, generate in probes(system=None)]
        try:
            texts += [bare._rendering.marked(messages, generate) for messages, generate in probes(system="x")]
        except UserError as error:
            # It has no system text: a conversation with one is refused when it comes.
            if system:
                raise UserError(f"template.system={system!r} cannot be used: {error}") from None
        texts = [MARK.sub("\ue000", text) for text in texts]
        controls = tuple(sorted({text for text in known if text and any(text in found for found in texts)}))
        made = replace(bare, controls=controls)
        made._check()
        return made

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> JinjaTemplate:
        """Make the template of what ``to_dict`` gives, without its name."""
        try:
            return cls(
                system=str(options.get("system") or ""),
                source=str(options["source"]),
                tokens={str(key): str(value) for key, value in options["tokens"].items()},
                controls=tuple(map(str, options["controls"])),
                day=date.fromisoformat(options["day"]).isoformat(),
                label_at=str(options["label_at"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"template: what is stored of a chat template cannot be read: {error!r}") from None

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "system": self.system,
            "label_at": self.label_at,
            "source": self.source,
            "tokens": dict(self.tokens),
            "controls": list(self.controls),
            "day": self.day,
        }

    @property
    def control_strings(self) -> tuple[str, ...]:
        return (*self.controls, self.label_marker)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self._rendering.closing[1],)

    @property
    def response_suffix(self) -> str:
        return self._rendering.closing[0]

    @property
    def response_prefix(self) -> str:
        return self._rendering.response_prefix

    @property
    def blanks(self) -> Mapping[str, str]:
        """What texts lose of the blanks around them, by role (``Rendering.blanks``)."""
        return self._rendering.blanks

    @cached_property
    def _rendering(self) -> Rendering:
        return Rendering(self.source, self.tokens, self.controls, self.day)

    def refusal(self, messages: Sequence[Spoken]) -> str | None:
        """Return why the chat template cannot write a conversation, None if it can."""
        try:
            body = messages[:-1] if messages and messages[-1].role == "assistant" else messages
            self._layout(self._with_system(body), len(body) < len(messages))
        except UserError as error:
            return str(error)
        return None

    def written(self, messages: Sequence[Spoken]) -> list[str]:
        behind, first = "", None
        if self.system or (messages and messages[0].role == "system"):
            given = messages[0].content if messages and messages[0].role == "system" else self.system
            behind = BEHIND_SYSTEM if given else BEHIND_EMPTY
            first = next((i for i, m in enumerate(messages) if m.role == "user"), None)
        out = []
        for i, message in enumerate(messages):
            blanks = self.blanks.get(behind if i == first else message.role)
            out.append(getattr(message.content, blanks)() if blanks else message.content)
        return out

    def segments(self, messages: Sequence[Message], schema: AttributeSchema | None, training: bool) -> list[Segment]:
        if not messages or messages[-1].role != "assistant":
            return self._filled(messages, schema, training, False)
        final, turn = messages[-1], len(messages) - 1
        segments = self._filled(messages, schema, training, True)
        trained = training and final.weight > 0
        suffix, stop = self._rendering.closing
        segments.append(Segment(self.response_prefix + final.content, False, trained, Part.RESPONSE, turn))
        if suffix:
            segments.append(Segment(suffix, False, trained, Part.END, turn))
        segments.append(Segment(stop, True, trained, Part.END, turn))
        return segments

    def prefix(
        self,
        messages: Sequence[Message],
        schema: AttributeSchema | None = None,
        levels: Mapping[str, int] | None = None,
    ) -> list[Segment]:
        if not any(message.role == "user" for message in messages):
            raise UserError("messages has no user message; a prompt needs one")
        label = schema.format(levels) if schema is not None and levels else ""
        earlier = [replace(m, content=self._remembered(m.content)) if m.role == "assistant" else m for m in messages]
        return self._filled([*earlier, Message("assistant", "")], schema, False, True, label)

    def _remembered(self, content: str) -> str:
        """Return what the chat template writes of an earlier response, which may be without its thoughts. Blanks around
        a response stay, as they do in training.
        """
        before, after = self._rendering.around_response
        question, _, next_question = probes(None)[1][0]
        text = self._rendering.rendered([question, Message("assistant", content), next_question], True)
        if len(text) < len(before) + len(after) or not (text.startswith(before) and text.endswith(after)):
            return content
        found = text[len(before) : len(text) - len(after)]
        return content if found.strip() == content.strip() else found

    def _open_response(self, turn: int, follows: bool) -> list[Segment]:
        raise AssertionError("what opens a response follows from what the chat template renders")

    def _check(self) -> None:
        """Compare the texts of prompts with what the chat template renders. ``UserError`` if they differ."""
        for system in (None, "Be brief."):
            for messages, _ in probes(system):
                try:
                    expected = self._rendering.rendered(messages, True)
                except UserError:
                    if system is None:
                        raise
                    continue  # it has no system text
                padded = [
                    m if m.role == "assistant" else replace(m, content=AROUND.format(m.content)) for m in messages
                ]
                bare = replace(self, system="")
                if system is not None and bare.refusal(messages) is not None:
                    continue  # it has a system text in some conversations, and says so when one comes
                for tried, wanted in ((messages, expected), (padded, self._rendering.rendered(padded, True))):
                    if join(bare.prefix(tried)) != wanted:
                        raise UserError(
                            "the chat template changes what a user or an assistant wrote; a format of ours "
                            "(template=chatml) may do"
                        )
        if self.label_at == "user":
            users = ("user", BEHIND_SYSTEM, BEHIND_EMPTY)
            if len({self.blanks[role] for role in users if role in self.blanks}) > 1:
                raise UserError(
                    "template.label_at=user: the chat template takes other blanks away from a user's text that follows "
                    "a system text than from others; take template.label_at=response"
                )
            self.prefix([Message("user", "x")], AttributeSchema("x", ("x",), 9, "x"), {"x": 0})

    # -- segments -----------------------------------------------------------------------------------------------------

    def _with_system(self, messages: Sequence[Spoken]) -> tuple[list[Spoken], int]:
        """Return the messages with the default system text, and the number of their first among ``messages``."""
        if self.system and not (messages and messages[0].role == "system"):
            return [Message("system", self.system), *messages], -1
        return list(messages), 0

    @cached_property
    def _layouts(self) -> dict[Any, list[_Piece] | str]:
        return {}

    def _layout(self, found: tuple[list[Spoken], int], generate: bool) -> list[_Piece]:
        """Return the pieces of a conversation of such roles; with ``generate``, up to where a response starts.

        A conversation that the chat template refuses is remembered as well, by the reason.
        """
        messages, shift = found
        roles = tuple([m.role for m in messages])
        key = (roles, bool(messages and messages[0].content), shift, generate)
        known = self._layouts.get(key)
        if known is None:
            try:
                known = self._pieces(messages, shift, generate)
            except UserError as error:
                known = f"{error} (roles: {_roles(messages)})"
            if len(roles) <= _LONG:
                if len(self._layouts) >= _MOST_LAYOUTS:
                    self._layouts.clear()
                self._layouts[key] = known
        if isinstance(known, str):
            raise UserError(known)
        return known

    def _pieces(self, messages: list[Spoken], shift: int, generate: bool) -> list[_Piece]:
        text = self._rendering.marked(messages, generate)
        turns = [i for i, m in enumerate(messages) if m.role != "system"]
        written = Counter(map(int, MARK.findall(text)))
        if any(written[i] != 1 for i in turns):
            raise UserError("the chat template leaves out a text, or writes it twice")
        for at, i in enumerate(turns):
            mark = f"\ue000{i}\ue001"
            # Each try renders all that comes before, so in a long conversation there are few.
            tried = len(turns) <= _LONG or at < _TRIED_TURNS or at >= len(turns) - _TRIED_TURNS
            if messages[i].role == "assistant" and tried:
                before = self._rendering.marked(messages[:i], True)
                if not text.startswith(before + self.response_prefix + mark + self._rendering.between[0]):
                    raise UserError(_another_history(before, text.partition(mark)[0]))
        pieces: list[_Piece] = []
        header = self._header(text, messages)
        owner, closes = -1, False  # the turn of what comes, and whether that is still what closes its text
        for part, chunk in ((Part.HEADER, text[:header]), (Part.ROLE, text[header:])):
            for piece, control in self._rendering.split(chunk):
                for parts, index in self._cut(piece, messages):
                    if part is Part.HEADER:
                        pieces.append(_Piece(parts, control, part, -1))
                        continue
                    if index is not None:  # it holds the text of a turn
                        owner, closes = index, not (self.label_at == "user" and messages[index].role == "user")
                        kind = Part.RESPONSE if messages[index].role == "assistant" else Part.USER
                        pieces.append(_Piece(parts, control, kind, index + shift))
                        continue
                    ends = closes and messages[owner].role == "assistant"
                    turn = owner if closes else self._next_turn(owner, turns, len(messages))
                    pieces.append(_Piece(parts, control, Part.END if ends else Part.ROLE, turn + shift))
                    closes = closes and not control
        return pieces

    @staticmethod
    def _next_turn(owner: int, turns: Sequence[int], end: int) -> int:
        return next((i for i in turns if i > owner), end)

    def _header(self, text: str, messages: Sequence[Spoken]) -> int:
        """Return where the first turn starts: behind the system text and what the chat template writes before it."""
        first = next((i for i, m in enumerate(messages) if m.role != "system"), None)
        before = text if first is None else text.partition(f"\ue000{first}\ue001")[0]
        opening = self._rendering.between[1]
        if first is not None and messages[first].role == "user" and before.endswith(opening):
            return len(before) - len(opening)
        bos = self.tokens.get("bos_token", "")
        return len(bos) if bos and text.startswith(bos) else 0

    def _cut(self, piece: str, messages: Sequence[Spoken]) -> Iterable[tuple[tuple[str | int, ...], int | None]]:
        """Yield the parts of segments, and which turn's text is in each: a response is one by itself."""
        parts: list[str | int] = []
        index: int | None = None
        for at, found in enumerate(MARK.split(piece)):
            if at % 2 == 0:
                parts += [found] if found else []
                continue
            number = int(found)
            if messages[number].role != "assistant":
                parts.append(number)
                index = index if messages[number].role == "system" else number
                continue
            if parts:
                yield tuple(parts), index
            yield (number,), number
            parts, index = [], None
        if parts:
            yield tuple(parts), index

    def _filled(
        self,
        messages: Sequence[Message],
        schema: AttributeSchema | None,
        training: bool,
        generate: bool,
        last_label: str | None = None,
    ) -> list[Segment]:
        """Return the segments of ``messages``; with ``generate``, those before the response that is the last message.

        ``last_label`` is the label string of that response, None for the one of its attributes.
        """
        body, shift = self._with_system(messages[:-1] if generate else messages)
        labels = {i: self.label(m, schema) for i, m in enumerate(messages) if m.role == "assistant" and m.attributes}
        if last_label is not None:
            labels[len(messages) - 1] = last_label
        contents = self.written(body)
        out: list[Segment] = []
        at_user = self.label_at == "user"
        last = len(messages) - 1 if generate else -1
        for parts, control, part, turn in self._layout((body, shift), generate):
            text = "".join([p if isinstance(p, str) else contents[p] for p in parts])
            if part is Part.RESPONSE:
                text = _taken_off(out, self.response_prefix) + text
                if not at_user:
                    out += self._label(labels.get(turn, ""), turn)
            message = messages[turn] if 0 <= turn < len(messages) else None
            trained = training and message is not None and message.weight > 0 and part in (Part.RESPONSE, Part.END)
            out.append(Segment(text, control, trained, part, turn))
            if part is Part.USER and at_user and (labels.get(turn + 1)):
                if isinstance(parts[-1], str):
                    raise UserError(
                        "template.label_at=user: the chat template writes text after a user's text, without a token of "
                        "its own between them; take template.label_at=response"
                    )
                out += self._label(labels.pop(turn + 1), turn + 1)
        if at_user and any(labels.values()):
            raise UserError("template.label_at=user: a response with attributes answers no user message")
        if generate and not at_user:
            out += self._label(labels.get(last, ""), last)
        return out

    def _label(self, text: str, turn: int) -> list[Segment]:
        if self.label_at == "response" or not text:
            return super()._label(text, turn)
        return [
            Segment(self.label_marker, True, False, Part.LABEL, turn),
            Segment(text, False, False, Part.LABEL, turn),
        ]


def _taken_off(segments: list[Segment], end: str) -> str:
    """Take ``end`` off the text of the last segment, which ends with it; return ``end``."""
    if end:
        last = segments.pop()
        if rest := last.text.removesuffix(end):
            segments.append(last._replace(text=rest))
    return end
