"""Which conversations are kept for validation, where a corpus does not say so itself.

Owns: the one rule by which conversations are dealt. Does not own: fractions and seeds (``data.valid_fraction`` and
``data.split_seed``), OpenAssistant's trees, of which an exact number is drawn (``data_tools/oasst.py``).
Invariant: a conversation's side follows from its first user message alone, so that all answers to one prompt are on one
side, whatever file, order or process they come in.
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
    """What a conversation must have (``steer.records.Conversation`` has it)."""

    @property
    def id(self) -> str: ...
    @property
    def messages(self) -> Sequence[_Message]: ...


def assign_split(conversation: _Conversation, valid_fraction: float, seed: int) -> Split:
    """Return the side that a conversation falls to, by the hash of (seed, first user message); its id where there is
    none.

    ``valid_fraction`` in [0, 1) is the share of prompts that falls to ``valid``.
    """
    if not valid_fraction:
        return "train"
    prompt = next((message.content for message in conversation.messages if message.role == "user"), conversation.id)
    digest = hashlib.sha256(f"{seed}:{prompt}".encode()).digest()
    return "valid" if int.from_bytes(digest[:8], "big") < valid_fraction * 2**64 else "train"
