"""Read the records of a command, and account for them: how many came in, how many were left out, and why.

Owns: reading record files under ``data.on_error``, the run's ``rejected.jsonl``, the counts of the summary. Does not
own: the definition of a record (``steer/records.py``), using records. Invariant: in = out + Σ skipped, for every
command; a record with a fault is named in the log and listed in ``rejected.jsonl``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from steerlm_megatron.errors import UserError
from steerlm_megatron.files import write_text_atomic
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.runtime.collectives import on_main
from steerlm_megatron.stages.session import Session
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.lines import OnError, Rejected, json_line, rejected_json
from steerlm_megatron.steer.preferences import Pair, read_pairs
from steerlm_megatron.steer.records import Conversation, expand_paths, parse_records, raw_lines, to_json
from steerlm_megatron.steer.templates import Template

REJECTED_FILE = "rejected.jsonl"  # its name in the run folder
_MOST_LINES_LOGGED = 100  # lines logged per reason; the file has all of them


@dataclass(frozen=True)
class Record:
    """A conversation, and the ``file:line`` that it was read from."""

    where: str
    conversation: Conversation


@dataclass(frozen=True)
class Reject:
    """A malformed line: its ``file:line``, the reason, and its text (None if it is unknown)."""

    where: str
    reason: str
    line: bytes | None

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass
class _Part:
    """The counts of one input: records that came in, and records left out, by reason."""

    read: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def counts(self) -> dict[str, Any]:
        skipped = {reason: n for reason, n in self.skipped.items() if n}
        return {"in": self.read, "out": self.read - sum(skipped.values()), "skipped": skipped}


class RecordReader:
    """Reads all records of one command. Every rank reads and decides in the same way; rank 0 logs and writes."""

    def __init__(self, here: Session) -> None:
        self._here = here
        self._parts: dict[str, _Part] = {}
        self._listed: dict[tuple[str, str], str] = {}  # (reason, where) → its line of rejected.jsonl
        self._logged: Counter[str] = Counter()

    @property
    def on_error(self) -> OnError:
        return cast(OnError, self._here.config.data.on_error)

    def read(
        self, part: str, paths: str | Sequence[str], key: str, require_response: bool = True, each: int = 1
    ) -> list[Record]:
        """Read and check all records of ``paths``. Collective over the world.

        Args:
            part: name of the input in the summary; ``key``: its key in the configuration, for messages.
            require_response: whether a record without an assistant message is malformed.
            each: how many a record counts as, for a command that counts responses and draws several per record.

        Raises:
            UserError: a malformed line with ``data.on_error=error``; no valid record at all.
        """
        rejects: list[Reject] = []
        found = list(read_lines(paths, self.on_error, rejects, require_response))
        account = self._parts.setdefault(part, _Part())
        account.read += each * (len(found) + len(rejects))
        for reject in rejects:
            self.skip(part, "rejected", reject.where, reject.reason, reject.line, each)
        self.list_rejected()
        if not found:
            told = f"; {len(rejects)} lines were rejected, the first: {rejects[0]}" if rejects else ""
            raise UserError(f"{key}={paths} holds no record that can be used{told}")
        return found

    def read_pairs(self, part: str, paths: str) -> list[Pair]:
        """Read and check all pairs of ``evaluate.preferences``. Arguments and errors are those of :meth:`read`.
        Collective over the world.
        """
        rejected: Rejected = []
        found = [pair for _, pair in read_pairs(paths, self.on_error, rejected)]
        self._parts.setdefault(part, _Part()).read += len(found) + len(rejected)
        for where, reason in rejected:
            self.skip(part, "rejected", where, reason)
        self.list_rejected()
        if not found:
            told = f"; {len(rejected)} lines were rejected, the first: {': '.join(rejected[0])}" if rejected else ""
            raise UserError(f"evaluate.preferences={paths} holds no pair that can be used{told}")
        return found

    def skip(
        self, part: str, reason: str, where: str, why: str, line: bytes | Conversation | None = None, count: int = 1
    ) -> None:
        """Skip the record at ``where`` because of a fault in it: count it, log it, and list it once in
        ``rejected.jsonl``.

        ``line`` is its text.
        """
        self._parts[part].skipped[reason] += count
        if (reason, where) in self._listed:
            return
        text = json_line(to_json(line)) if isinstance(line, Conversation) else line
        self._listed[reason, where] = rejected_json(where, why, text)
        self._logged[reason] += 1
        if self._here.layout.is_main and self._logged[reason] <= _MOST_LINES_LOGGED:
            get_logger(__name__).warning("skipped %s: %s", where, why)

    def writable(self, part: str, records: Sequence[Record], template: Template) -> list[Record]:
        """Return the records that a model's template can write; the others are skipped. Collective over the world.

        Raises:
            UserError: there are others, with ``data.on_error=error``; or there is nothing but others.
        """
        kept = []
        for record in records:
            if (refusal := template.refusal(record.conversation.messages)) is None:
                kept.append(record)
            elif self.on_error == "skip":
                self.skip(part, "refused", record.where, refusal, record.conversation)
            else:
                raise UserError(f"{record.where}: {refusal}; data.on_error=skip leaves such records out")
        if len(kept) < len(records):
            self.list_rejected()
            if not kept:
                raise UserError(f"the model's chat template can write none of the records; see {REJECTED_FILE}")
        return kept

    def leave_out(self, part: str, reason: str, count: int) -> None:
        """Count records that are left out because the configuration does not ask for them."""
        self._parts[part].skipped[reason] += count

    def list_rejected(self) -> None:
        """Write ``rejected.jsonl``, or remove that of an earlier attempt. Collective over the world."""
        path = self._here.folder / REJECTED_FILE
        on_main(lambda: write_rejected(path, list(self._listed.values())))
        for reason, count in self._logged.items():
            if count > _MOST_LINES_LOGGED and self._here.layout.is_main:
                get_logger(__name__).warning("%d more (%s) are in %s", count - _MOST_LINES_LOGGED, reason, path)

    def counts(self) -> dict[str, Any]:
        """Return ``{"in", "out", "skipped": {reason: n}}`` over all inputs, and of each input if there are several."""
        parts = {name: part.counts() for name, part in self._parts.items()}
        skipped: Counter[str] = sum((part.skipped for part in self._parts.values()), Counter())
        total = {
            "in": sum(part["in"] for part in parts.values()),
            "out": sum(part["out"] for part in parts.values()),
            "skipped": {reason: n for reason, n in skipped.items() if n},
        }
        return total if len(parts) == 1 else total | parts


def read_lines(
    paths: str | Sequence[str],
    on_error: OnError,
    rejects: list[Reject],
    require_response: bool = True,
    schema: AttributeSchema | None = None,
) -> Iterator[Record]:
    """Yield the valid records of ``paths``; with ``on_error="skip"`` malformed lines are added to ``rejects``.
    ``schema`` checks attributes, as in ``steer.records.read_records``.
    """
    for path in expand_paths(paths):
        rejected: Rejected = []
        lines = _Remembered(raw_lines(path))
        for where, record in parse_records(lines, schema, on_error, rejected, require_response):
            rejects += lines.of(rejected)
            yield Record(where, record)
        rejects += lines.of(rejected)


class _Remembered(Iterator[tuple[str, bytes]]):
    """An iterator over lines that keeps each line until it is known whether it is valid."""

    def __init__(self, lines: Iterator[tuple[str, bytes]]) -> None:
        self._lines = lines
        self._taken: dict[str, bytes] = {}

    def __next__(self) -> tuple[str, bytes]:
        where, line = next(self._lines)
        self._taken[where] = line
        return where, line

    def of(self, rejected: Rejected) -> list[Reject]:
        """Return the rejects since the last call with their lines, and empty ``rejected``."""
        found = [Reject(where, reason, self._taken.get(where)) for where, reason in rejected]
        self._taken.clear()
        rejected.clear()
        return found


def skipped_in_words(counts: Mapping[str, Any]) -> str:
    """Return the skipped records in words, as ``, 3 skipped (rejected: 2, prompt_too_long: 1)``, or nothing."""
    skipped = counts["skipped"]
    if not skipped:
        return ""
    return f", {sum(skipped.values())} skipped ({', '.join(f'{reason}: {n}' for reason, n in skipped.items())})"


def write_rejects(folder: Path, rejects: Sequence[Reject]) -> None:
    """Log ``rejects``, and list them in the ``rejected.jsonl`` of a run folder. Only the main rank calls it."""
    for reject in rejects[:_MOST_LINES_LOGGED]:
        get_logger(__name__).warning("skipped %s", reject)
    write_rejected(folder / REJECTED_FILE, [rejected_json(r.where, r.reason, r.line) for r in rejects])


def write_rejected(path: Path, entries: Sequence[str]) -> None:
    """Write ``entries``, lines of JSON, atomically; remove the file if there are none."""
    if entries:
        write_text_atomic(path, "".join(entries))
    else:
        path.unlink(missing_ok=True)
