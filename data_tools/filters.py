"""Filters for every source, and their counts.

Owns: the filters (``Filters``) and their order, weights of replies, unique ids, ``control_like_text``. Does not own:
formats. Invariant: every candidate is passed on or counted under exactly one reason, and

    reply_occurrences = trained_replies + context_replies + repeated_replies_avoided + filtered_replies

over all candidates. Context replies have weight 0 in the source, or no text (``empty_replies`` counts those); filtered
replies failed a filter, alone or with their conversation.
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.messages import count_empty_replies
from steerlm_megatron.steer.records import Conversation, Message, content_hash
from steerlm_megatron.steer.templates import TEMPLATES

_ROLES = ("system", "user", "assistant")
_RULE = re.compile(r"\s*([\w.-]+?)\s*(>=|<=|==|>|<)\s*(-?\d+(?:\.\d+)?)\s*")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
# HelpSteer3 names its languages in English.
_CODES = {
    "english": "en", "german": "de", "french": "fr", "spanish": "es", "italian": "it", "portuguese": "pt",
    "chinese": "zh", "japanese": "ja", "korean": "ko", "russian": "ru", "dutch": "nl", "polish": "pl", "turkish": "tr",
    "vietnamese": "vi", "indonesian": "id", "arabic": "ar", "hindi": "hi",
}  # fmt: skip
_CONTROLS = sorted({text for kind in TEMPLATES.values() for text in kind().control_strings}, key=len, reverse=True)
CONTROL_LIKE = re.compile("|".join([r"<extra_id_\d+>", *map(re.escape, _CONTROLS)]))


@dataclass(frozen=True)
class Filters:
    """The filters. The defaults keep everything.

    Args:
        languages: allowed values of the record's ``lang`` or ``language``; ``pt`` keeps ``pt-BR``. A record without a
            language is left out.
        roles: a conversation with a message of another role is left out; empty: all roles.
        min_turns, max_turns: bounds of the number of user and assistant messages.
        min_chars, max_chars: bounds of the number of characters of all contents together.
        labels: rules such as ``quality>=6``, all of which a reply must meet. A reply that does not, or has no such
            label, becomes context (weight 0), and a conversation without a trained reply is left out.
        dedupe: whether a conversation with the same roles and contents as an earlier one is left out.
    """

    languages: Sequence[str] = ()
    roles: Sequence[str] = ()
    min_turns: int = 0
    max_turns: int | None = None
    min_chars: int = 0
    max_chars: int | None = None
    labels: Sequence[str] = ()
    dedupe: bool = False

    def rules(self, schema: AttributeSchema | None) -> list[tuple[str, Callable[[float, float], bool], float]]:
        """Parse and check ``labels``, and check all other fields. Raises ``UserError``."""
        for role in self.roles:
            if role not in _ROLES:
                raise UserError(f"data.roles={list(self.roles)}: {role!r} is no role; legal: {' '.join(_ROLES)}")
        if self.roles and not {"user", "assistant"} <= set(self.roles):
            raise UserError(f"data.roles={list(self.roles)} keeps no conversation: it needs user and assistant")
        for low, high in (("min_turns", "max_turns"), ("min_chars", "max_chars")):
            least, most = getattr(self, low), getattr(self, high)
            if least < 0 or (most is not None and most < max(1, least)):
                raise UserError(
                    f"data.{low}={least}, data.{high}={most}: must be 0 <= {low} <= {high}, {high} at least 1"
                )
        return label_rules(self.labels, schema, "data.labels")


def label_rules(
    rules: Sequence[str], schema: AttributeSchema | None, key: str
) -> list[tuple[str, Callable[[float, float], bool], float]]:
    """Return rules such as ``quality>=6`` as attribute, comparison and bound. ``key`` names them in errors.

    Raises:
        UserError: a rule of another form, or an attribute that ``schema`` lacks.
    """
    found = []
    for rule in rules:
        match = _RULE.fullmatch(rule)
        if match is None:
            raise UserError(f"{key}: {rule!r} is not of the form name>=number; legal: {' '.join(_COMPARE)}")
        if schema is not None and match[1] not in schema.names:
            raise UserError(f"{key}: {rule!r}: schema {schema.name!r} has: {' '.join(schema.names) or 'nothing'}")
        found.append((match[1], _COMPARE[match[2]], float(match[3])))
    return found


COUNTS = (
    "in", "out", "reply_occurrences", "trained_replies", "context_replies", "repeated_replies_avoided",
    "filtered_replies", "labelled_replies", "empty_replies", "control_like_text", "ids_made_unique",
)  # fmt: skip


class Sieve:
    """Passes candidates on, or counts why not; ``counts``, ``skipped`` and ``languages`` go into the report.

    It holds 16 bytes and a set entry per id, and as much again per conversation for ``dedupe``, per reply for ``once``.

    Args:
        once: whether a reply that an earlier conversation had after the same messages becomes context.
    """

    def __init__(self, filters: Filters, schema: AttributeSchema | None, once: bool) -> None:
        self._filters, self._once = filters, once
        self._rules = filters.rules(schema)
        self._languages = frozenset(language.lower() for language in filters.languages)
        self._roles = frozenset(filters.roles)
        self._hashes: set[bytes] = set()
        self._replies: set[bytes] = set()
        self._ids: set[bytes] = set()
        self._next_number: dict[str, int] = {}  # the next suffix of ids that occurred twice or more
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
        self.skipped: Counter[str] = Counter()
        self.languages: Counter[str] = Counter()

    def skip(self, reason: str, count: int = 1) -> None:
        """Count candidates that the source itself left out."""
        self.counts["in"] += count
        self.skipped[reason] += count

    def take(self, conversation: Conversation) -> Conversation | None:
        """Return the conversation as it is to be written; None if it is left out."""
        counts = self.counts
        counts["in"] += 1
        lang = _lang(conversation)
        self.languages[lang or "unknown"] += 1
        before = _trained(conversation)
        replies = sum(message.role == "assistant" for message in conversation.messages)
        counts["reply_occurrences"] += replies
        counts["context_replies"] += replies - before
        empty = count_empty_replies(conversation.messages)
        counts["empty_replies"] += empty
        reason = self._unwanted(conversation, lang) or ("empty_response" if replies and empty == replies else "")
        kept, repeated = conversation, 0
        if not reason and self._rules:
            kept = _weighted(kept, self._meets)
            reason = "label" if before and not _trained(kept) else ""
        if not reason and self._filters.dedupe and _is_repeated(bytes.fromhex(content_hash(kept))[:16], self._hashes):
            reason = "duplicate"
        if not reason and self._once:
            left = _trained(kept)
            kept = self._untrain_repeated(kept)
            repeated = left - _trained(kept)
            reason = "repeated" if repeated and repeated == left else ""
        after = 0 if reason else _trained(kept)
        counts["repeated_replies_avoided"] += repeated
        counts["filtered_replies"] += before - after - repeated
        if reason:
            self.skipped[reason] += 1
            return None
        counts["out"] += 1
        counts["trained_replies"] += after
        for message in kept.messages:
            counts["labelled_replies"] += bool(message.attributes and message.weight)
            counts["control_like_text"] += CONTROL_LIKE.search(message.content) is not None
        return self._with_unique_id(kept)

    def _unwanted(self, conversation: Conversation, lang: str) -> str:
        filters, messages = self._filters, conversation.messages
        if self._languages and not self._languages & {lang, lang.split("-")[0], _CODES.get(lang, lang)}:
            return "language" if lang else "language_unknown"
        if self._roles and any(message.role not in self._roles for message in messages):
            return "role"
        turns = sum(message.role != "system" for message in messages)
        if turns < filters.min_turns:
            return "too_few_turns"
        if filters.max_turns is not None and turns > filters.max_turns:
            return "too_many_turns"
        chars = sum(len(message.content) for message in messages)
        if chars < filters.min_chars:
            return "too_short"
        if filters.max_chars is not None and chars > filters.max_chars:
            return "too_long"
        return ""

    def _meets(self, message: Message) -> bool:
        values = message.attributes or {}
        return all(name in values and compare(values[name], bound) for name, compare, bound in self._rules)

    def _untrain_repeated(self, conversation: Conversation) -> Conversation:
        chain = b""
        repeated: set[int] = set()
        for index, message in enumerate(conversation.messages):
            content = message.content.encode("utf-8", "surrogatepass")
            chain = hashlib.blake2b(chain + f"{message.role}:".encode() + content, digest_size=16).digest()
            if message.role == "assistant" and message.weight and _is_repeated(chain, self._replies):
                repeated.add(index)
        if not repeated:
            return conversation
        messages = [replace(m, weight=0) if i in repeated else m for i, m in enumerate(conversation.messages)]
        return replace(conversation, messages=tuple(messages))

    def _with_unique_id(self, conversation: Conversation) -> Conversation:
        """Make the conversation's id unique: the second ``x`` becomes ``x#2``."""
        name = conversation.id
        while _is_repeated(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest(), self._ids):
            number = self._next_number.get(conversation.id, 2)
            self._next_number[conversation.id] = number + 1
            name = f"{conversation.id}#{number}"
        if name == conversation.id:
            return conversation
        self.counts["ids_made_unique"] += 1
        return replace(conversation, id=name)

    def report(self) -> dict[str, Any]:
        """Return the counts as plain data; ``skipped`` is sorted by frequency."""
        return {
            **self.counts,
            "conversations": self.counts["out"],
            "skipped": {"conversations": dict(self.skipped.most_common())},
            "languages": dict(self.languages.most_common()),
        }


def _is_repeated(digest: bytes, seen: set[bytes]) -> bool:
    if digest in seen:
        return True
    seen.add(digest)
    return False


def _trained(conversation: Conversation) -> int:
    return sum(message.role == "assistant" and message.weight > 0 for message in conversation.messages)


def _weighted(conversation: Conversation, keep: Callable[[Message], bool]) -> Conversation:
    """Return the conversation with weight 0 on the trained replies that ``keep`` refuses."""
    messages = [
        replace(m, weight=0) if m.role == "assistant" and m.weight and not keep(m) else m for m in conversation.messages
    ]
    return replace(conversation, messages=tuple(messages))


def _lang(conversation: Conversation) -> str:
    lang = conversation.extra.get("lang") or conversation.extra.get("language")
    return lang.lower() if isinstance(lang, str) else ""
