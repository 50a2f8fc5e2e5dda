"""Answers of a judge on the disk, so that a question that was answered (and paid for) is not asked again.

Owns: ``judged/answers.jsonl`` in the run folder, one line of JSON per answer. Does not own: what an answer means.
Invariants: only whole lines count, and a torn last one is cut off before the next is written; an answer is on the disk
when :meth:`AnswerCache.put` returns. One process writes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerlm_megatron.observe.log import get_logger

FOLDER, FILE = "judged", "answers.jsonl"


@dataclass(frozen=True)
class Answer:
    """What a judge answered: its text, tokens (None where the server does not count them), and seconds."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None
    seconds: float


def key_of(model: str, messages: Sequence[Mapping[str, str]], settings: Mapping[str, Any]) -> str:
    """Return the key of an answer: a hash of the model's name, the whole conversation, and how it is asked.

    The server's address is not part of it: a judge that a cluster starts again stands at another one.
    """
    asked = {"model": model, "messages": [dict(m) for m in messages], "settings": dict(settings)}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class AnswerCache:
    """The answers in ``folder``, which is made when the first one is written."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._found: dict[str, Answer] = {}
        self._read()

    def _read(self) -> None:
        """Read the file and cut off a torn last line. A whole line that is damaged is left out and named."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return
        whole = data.rfind(b"\n") + 1
        if whole != len(data):
            os.truncate(self.path, whole)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                entry = json.loads(line)
                key = entry.pop("key")
                self._found[key] = Answer(**entry)
            except (ValueError, KeyError, TypeError, AttributeError):
                get_logger(__name__).warning("%s:%d: no answer of a judge; it is asked again", self.path, number)

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: str) -> Answer | None:
        """Return the answer of ``key``, None if there is none."""
        return self._found.get(key)

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer, which is on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, **answer.__dict__}).encode() + b"\n"
        with open(self.path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._found[key] = answer
