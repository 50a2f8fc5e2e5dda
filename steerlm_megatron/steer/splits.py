"""Assign conversations to training or validation, where a corpus has no splits.

Owns: the one rule that assigns a split. Does not own: fractions and seeds (``data.valid_fraction`` and
``data.split_seed``), the split of OpenAssistant's trees, of which an exact number is drawn (``data_tools/oasst.py``).
Invariant: a conversation's split follows from its first user message alone, so that all answers to one prompt are in
one split, whatever file, order or process they come in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, Protocol

Split = Literal["train", "valid"]


class _Message(Protocol):
    @property
    def role(self) -> str: ...
    @property
    def content(self) -> str: ...


class _Conversation(Protocol):
    """The attributes that the rule needs of a conversation, which ``steer.records.Conversation`` has."""

    @property
    def id(self) -> str: ...
    @property
    def messages(self) -> Sequence[_Message]: ...


def assign_split(conversation: _Conversation, valid_fraction: float, seed: int) -> Split:
    """Return the split of a conversation by the hash of (seed, first user message), or of its id if no user speaks.

    ``valid_fraction`` in [0, 1) is the share of prompts that is assigned to ``valid``.
    """
    if not valid_fraction:
        return "train"
    prompt = next((message.content for message in conversation.messages if message.role == "user"), conversation.id)
    digest = hashlib.sha256(f"{seed}:{prompt}".encode()).digest()
    return "valid" if int.from_bytes(digest[:8], "big") < valid_fraction * 2**64 else "train"
