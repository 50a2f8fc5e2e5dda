"""Records with labels that are wrong or missing on purpose: the controls of an ablation.

Owns: which labels a response of a control has. Does not own: training on them. Invariants: texts, and which responses
are trained, stay as they are; the result depends on the records and the seed alone.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from steerlm_megatron.steer.records import Conversation

_BITS = 64


def shuffled_labels(records: Sequence[Conversation], seed: int) -> list[Conversation]:
    """Return the records with the labels of all responses dealt out again at random, those of a response together.

    The labels keep their distribution and how attributes go together, and say nothing about the text they stand at: a
    model that is trained on them has nothing to learn from a label, so it must not be steered by one.
    """
    places = [
        (r, m) for r, record in enumerate(records) for m, message in enumerate(record.messages) if message.attributes
    ]
    labels = [records[r].messages[m].attributes for r, m in places]
    random.Random(seed).shuffle(labels)
    dealt = dict(zip(places, labels, strict=True))
    return [
        replace(
            record,
            messages=tuple(
                replace(message, attributes=dealt.get((r, m), message.attributes))
                for m, message in enumerate(record.messages)
            ),
        )
        for r, record in enumerate(records)
    ]


def partial_labels(records: Iterable[Conversation], share: float, seed: int) -> list[Conversation]:
    """Return the records in which each label of each response stays with probability ``share``, by a hash of seed,
    record, turn and attribute. A response that loses all labels is trained without a label.
    """

    def kept(record: Conversation, turn: int) -> dict[str, float] | None:
        found = (record.messages[turn].attributes or {}).items()
        return {name: value for name, value in found if _share_of(seed, record.id, turn, name) < share} or None

    return [
        replace(
            record,
            messages=tuple(
                replace(message, attributes=kept(record, turn)) for turn, message in enumerate(record.messages)
            ),
        )
        for record in records
    ]


def _share_of(*parts: object) -> float:
    """Return a number in [0, 1) from a hash of ``parts``."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[: _BITS // 8], "big") / 2.0**_BITS
