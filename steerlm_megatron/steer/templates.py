"""Prompt templates: a conversation as a list of segments, for training and for inference alike.

Owns: the positions of control tokens, role names, label lines, texts and stop strings, and which segments are trained.
Does not own: the label string (``attributes.py``), token ids (``data/text/tokenizer.py``).

Invariants: only a segment with ``control=True`` becomes a control token; text that merely looks like one stays text,
since it is in a text segment. The segments of ``prefix`` are exactly those that ``render`` puts before the same
response, and a RESPONSE segment is the message's content behind ``response_prefix``, which is empty for most; so
(tokens of the prefix + tokens of the response) are the training tokens.

To shorten a conversation, drop messages and render again; never drop segments (the system text may be inside a turn).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple, Protocol

from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.attributes import AttributeSchema, nearest
from steerlm_megatron.steer.records import Conversation, Message

_FIELDS = ("name", "system", "system_suffix", "label_at")
LABEL_AT = ("response", "user")
AUTO = "auto"  # stands for the template that fits a tokenizer's chat template (``stages/base.py``)


class Part(IntEnum):
    """The role of a segment in the rendered conversation."""

    HEADER = 0  # system text and what surrounds it
    USER = 1  # what the user wrote
    ROLE = 2  # turn token, role name, separators
    LABEL = 3  # label marker, label string and newline
    RESPONSE = 4  # the assistant message's content, behind the template's response_prefix
    END = 5  # what closes a response


class Segment(NamedTuple):
    """A part of a prompt that is encoded by itself. It is a tuple because a corpus has millions of them.

    Attributes:
        text: the characters.
        control: whether ``text`` is a control string, which becomes exactly one token; otherwise it is plain text.
        trained: whether the loss is taken on the segment's tokens.
        part: its role.
        turn: index of its message in ``messages``; -1 for the header. The turn token that closes a final assistant
            message starts the next turn, so its index is ``len(messages)``.
    """

    text: str
    control: bool
    trained: bool
    part: Part
    turn: int


class Spoken(Protocol):
    """The attributes that a template needs of a message to say whether it can write it."""

    @property
    def role(self) -> str: ...
    @property
    def content(self) -> str: ...


class Scored(Protocol):
    """The attributes that a label line needs of a message."""

    @property
    def attributes(self) -> Mapping[str, float] | None: ...


@dataclass(frozen=True)
class Template(ABC):
    """A prompt template; ``from_config`` makes the one that is configured.

    Args:
        system: the system text of conversations without a system message.
        system_suffix: the text after the system text (``steerlm`` only).
    """

    name: ClassVar[str]
    label_marker: ClassVar[str] = "<extra_id_2>"

    system: str = ""
    system_suffix: str = ""

    @staticmethod
    def from_config(cfg: Any) -> Template:
        """Make a template from a mapping or an object with the fields of ``config.schema.TemplateConfig``."""
        if isinstance(cfg, Mapping):
            return Template.from_dict(cfg)
        return Template.from_dict({key: getattr(cfg, key) for key in _FIELDS})

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Template:
        """Make a template from what ``to_dict`` gives. Raises ``UserError`` for an unknown template or key."""
        name = data.get("name")
        if name == "jinja":
            from steerlm_megatron.steer.jinja_template import JinjaTemplate

            return JinjaTemplate.from_options(data)
        for key in data:
            if key not in _FIELDS:
                raise UserError(f"template.{key}: unknown key; legal keys: {' '.join(_FIELDS)}")
        if name not in TEMPLATES:
            near = nearest(str(name), (*TEMPLATES, AUTO))
            raise UserError(f"template.name={name!r}{near}; legal: {' '.join((*TEMPLATES, AUTO))}")
        if data.get("label_at") not in (None, LABEL_AT[0]):
            raise UserError(
                f"template.label_at={data['label_at']}: the label line of template.name={name} stands before the "
                "response; elsewhere only with template=auto"
            )
        options = {key: str(data[key]) for key in ("system", "system_suffix") if data.get(key) is not None}
        return TEMPLATES[name](**options)

    @property
    @abstractmethod
    def control_strings(self) -> tuple[str, ...]:
        """The strings that the template writes as one token each."""

    @property
    @abstractmethod
    def stop_strings(self) -> tuple[str, ...]:
        """The control strings that end a response."""

    @property
    @abstractmethod
    def response_suffix(self) -> str:
        """The trained text between the response and the stop string."""

    @property
    def response_prefix(self) -> str:
        """The blanks that stand before a response in a conversation, which a model that is asked for one begins with.
        They are a part of its first token, and none of its text. A label line stands before them.
        """
        return ""

    def refusal(self, messages: Sequence[Spoken]) -> str | None:
        """Return why the template cannot write a conversation of such roles; None if it can."""
        return None

    def written(self, messages: Sequence[Spoken]) -> list[str]:
        """Return the text of each message of a conversation as the template writes it."""
        return [message.content for message in messages]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data from which ``from_dict`` makes the template, to be stored in shards and checkpoints."""
        return {"name": self.name, "system": self.system, "system_suffix": self.system_suffix}

    def render(self, conversation: Conversation, schema: AttributeSchema | None = None) -> list[Segment]:
        """Return the segments of a complete conversation for training.

        Each assistant message with attributes has its label line, unless ``schema`` is None or nameless (plain SFT).
        The responses of weight 1 and the segments that end them are trained; label lines never are.

        Only whether a text is empty may change the segments around it. Conversations without empty texts that have the
        same roles, weights and label lines therefore have the same segments except for contents and label strings, each
        of which is in one segment unchanged. (``data/write/skeletons.py`` relies on that.)

        Raises:
            UserError: an attribute that the schema lacks, or NaN.
        """
        return self.segments(conversation.messages, schema, training=True)

    def prefix(
        self,
        messages: Sequence[Message],
        schema: AttributeSchema | None = None,
        levels: Mapping[str, int] | None = None,
    ) -> list[Segment]:
        """Return the segments of the prompt after ``messages``, up to where the response starts.

        The label line holds ``levels`` exactly as given (see ``AttributeSchema.complete``); without levels there is
        none. Earlier assistant messages keep the label lines of their attributes. Nothing is trained.

        Raises:
            UserError: no user message, an unknown attribute, or a level out of scale.
        """
        if not any(message.role == "user" for message in messages):
            raise UserError("messages has no user message; a prompt needs one")
        segments = self.segments(messages, schema, training=False)
        turn = len(messages)
        segments += self._open_response(turn, False)
        if schema is not None and levels:
            segments += self._label(schema.format(levels), turn)
        return segments

    @staticmethod
    def label(message: Scored, schema: AttributeSchema | None) -> str:
        """Return the label string of an assistant message, as in its label line; empty if it has no label line.

        Raises:
            UserError: an attribute that the schema lacks, or NaN.
        """
        if schema is None or not message.attributes:
            return ""
        return schema.format(schema.levels(message.attributes))

    def _label(self, text: str, turn: int) -> list[Segment]:
        """Return the segments of a label line; none for an empty label."""
        if not text:
            return []
        return [
            Segment(self.label_marker, True, False, Part.LABEL, turn),
            Segment(text + "\n", False, False, Part.LABEL, turn),
        ]

    def _until_response(
        self, message: Message, schema: AttributeSchema | None, turn: int, follows: bool
    ) -> list[Segment]:
        """Return the segments of an assistant turn before its response. ``follows`` is as in ``_open_response``."""
        return self._open_response(turn, follows) + self._label(self.label(message, schema), turn)

    @abstractmethod
    def segments(self, messages: Sequence[Message], schema: AttributeSchema | None, training: bool) -> list[Segment]:
        """Return the segments of all messages; ``training`` marks trained ones and closes a final assistant message."""

    @abstractmethod
    def _open_response(self, turn: int, follows: bool) -> list[Segment]:
        """Return the segments before an assistant turn's label line. ``follows``: a trained assistant turn came before
        it.
        """


@dataclass(frozen=True)
class SteerLMTemplate(Template):
    """The template of the released SteerLM code and model cards::

        <extra_id_0>System\\n{system}{system_suffix}
        <extra_id_1>User\\n{text}\\n
        <extra_id_1>Assistant\\n[<extra_id_2>{label}\\n]{response}\\n
        <extra_id_1>

    (without the line breaks shown). The turn token after an assistant turn is trained: it is the end of the turn.
    """

    name: ClassVar[str] = "steerlm"
    control_strings: ClassVar[tuple[str, ...]] = ("<extra_id_0>", "<extra_id_1>", "<extra_id_2>")
    stop_strings: ClassVar[tuple[str, ...]] = ("<extra_id_1>",)
    response_suffix: ClassVar[str] = "\n"

    system_suffix: str = "\n\n"

    def _open_response(self, turn: int, follows: bool) -> list[Segment]:
        return [
            Segment("<extra_id_1>", True, follows, Part.ROLE, turn),
            Segment("Assistant\n", False, False, Part.ROLE, turn),
        ]

    def segments(self, messages: Sequence[Message], schema: AttributeSchema | None, training: bool) -> list[Segment]:
        system, turns = _split_system(messages, self.system)
        segments = [
            Segment("<extra_id_0>", True, False, Part.HEADER, -1),
            Segment("System\n", False, False, Part.HEADER, -1),
            Segment(system + self.system_suffix, False, False, Part.HEADER, -1),
        ]
        follows = False  # whether the message before was a trained assistant turn
        for turn, message in turns:
            if message.role == "user":
                segments += (
                    Segment("<extra_id_1>", True, follows, Part.ROLE, turn),
                    Segment("User\n", False, False, Part.ROLE, turn),
                    Segment(message.content + "\n", False, False, Part.USER, turn),
                )
                follows = False
                continue
            segments += self._until_response(message, schema, turn, follows)
            follows = training and message.weight > 0
            segments += (
                Segment(message.content, False, follows, Part.RESPONSE, turn),
                Segment("\n", False, follows, Part.END, turn),
            )
        if training and messages and messages[-1].role == "assistant":
            segments.append(Segment("<extra_id_1>", True, follows, Part.END, len(messages)))
        return segments


@dataclass(frozen=True)
class Llama2Template(Template):
    """Llama-2's chat format, with a label line before the response::

        <s>[INST] <<SYS>>\\n{system}\\n<</SYS>>\\n\\n{text} [/INST] [<extra_id_2>{label}\\n]{response} </s>
        <s>[INST] {text} [/INST] …

    (without the line breaks shown). An empty system text has no ``<<SYS>>`` block; ``system_suffix`` is not used.
    """

    name: ClassVar[str] = "llama2"
    control_strings: ClassVar[tuple[str, ...]] = ("<s>", "</s>", "[INST]", "[/INST]", "<extra_id_2>")
    stop_strings: ClassVar[tuple[str, ...]] = ("</s>",)
    response_suffix: ClassVar[str] = " "

    def _open_response(self, turn: int, follows: bool) -> list[Segment]:
        return [Segment(" ", False, False, Part.ROLE, turn)]

    def segments(self, messages: Sequence[Message], schema: AttributeSchema | None, training: bool) -> list[Segment]:
        system, turns = _split_system(messages, self.system)
        segments: list[Segment] = []
        for turn, message in turns:
            if message.role == "user":
                segments += (
                    Segment("<s>", True, False, Part.ROLE, turn),
                    Segment("[INST]", True, False, Part.ROLE, turn),
                )
                if system:
                    segments.append(Segment(f" <<SYS>>\n{system}\n<</SYS>>\n\n", False, False, Part.HEADER, -1))
                space = "" if system else " "
                system = ""
                segments += (
                    Segment(f"{space}{message.content} ", False, False, Part.USER, turn),
                    Segment("[/INST]", True, False, Part.ROLE, turn),
                )
                continue
            trained = training and message.weight > 0
            segments += self._until_response(message, schema, turn, False)
            segments += (
                Segment(message.content, False, trained, Part.RESPONSE, turn),
                Segment(" ", False, trained, Part.END, turn),
                Segment("</s>", True, trained, Part.END, turn),
            )
        return segments


@dataclass(frozen=True)
class ChatMLTemplate(Template):
    """ChatML, the format of many instruction-tuned models, with a label line before the response::

        <|im_start|>system\\n{system}<|im_end|>\\n
        <|im_start|>user\\n{text}<|im_end|>\\n
        <|im_start|>assistant\\n[<extra_id_2>{label}\\n]{response}<|im_end|>\\n

    (without the line breaks shown). An empty system text has no system turn; ``system_suffix`` is not used. The end of
    a response is trained, the newline after it is not: generation has stopped by then.
    """

    name: ClassVar[str] = "chatml"
    control_strings: ClassVar[tuple[str, ...]] = ("<|im_start|>", "<|im_end|>", "<extra_id_2>")
    stop_strings: ClassVar[tuple[str, ...]] = ("<|im_end|>",)
    response_suffix: ClassVar[str] = ""

    def _open_response(self, turn: int, follows: bool) -> list[Segment]:
        return [
            Segment("<|im_start|>", True, False, Part.ROLE, turn),
            Segment("assistant\n", False, False, Part.ROLE, turn),
        ]

    def segments(self, messages: Sequence[Message], schema: AttributeSchema | None, training: bool) -> list[Segment]:
        system, turns = _split_system(messages, self.system)
        segments: list[Segment] = []
        if system:
            segments += (
                Segment("<|im_start|>", True, False, Part.HEADER, -1),
                Segment(f"system\n{system}", False, False, Part.HEADER, -1),
                Segment("<|im_end|>", True, False, Part.HEADER, -1),
                Segment("\n", False, False, Part.HEADER, -1),
            )
        for turn, message in turns:
            if message.role == "user":
                segments += (
                    Segment("<|im_start|>", True, False, Part.ROLE, turn),
                    Segment(f"user\n{message.content}", False, False, Part.USER, turn),
                    Segment("<|im_end|>", True, False, Part.ROLE, turn),
                    Segment("\n", False, False, Part.ROLE, turn),
                )
                continue
            trained = training and message.weight > 0
            segments += self._until_response(message, schema, turn, False)
            segments += (
                Segment(message.content, False, trained, Part.RESPONSE, turn),
                Segment("<|im_end|>", True, trained, Part.END, turn),
                Segment("\n", False, False, Part.ROLE, turn),
            )
        return segments


TEMPLATES: dict[str, type[Template]] = {
    template.name: template for template in (SteerLMTemplate, Llama2Template, ChatMLTemplate)
}


def join(segments: Iterable[Segment]) -> str:
    """Return the segments as one string, in which control strings and text cannot be told apart any more."""
    return "".join(segment.text for segment in segments)


def _split_system(messages: Sequence[Message], default: str) -> tuple[str, list[tuple[int, Message]]]:
    """Return the system text, and the other messages with their indices in ``messages``."""
    if messages and messages[0].role == "system":
        return messages[0].content, list(enumerate(messages))[1:]
    return default, list(enumerate(messages))
