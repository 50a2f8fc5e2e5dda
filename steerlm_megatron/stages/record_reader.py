"""Records that a command reads, and the one account of them: how many came in, and what was left out, and why.

Owns: reading record files under ``data.on_error``, the run's ``rejected.jsonl``, the counts of the summary. Does not
own: what a record is (``steer/records.py``), what a command makes of it.
Invariant: in = out + Σ skipped, for every command; what is skipped because something is wrong with it is named in the
log and stands in ``rejected.jsonl``.
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
from steerlm_megatron.steer.records import Conversation, expand_paths, parse_records, raw_lines, to_json

REJECTED_FILE = "rejected.jsonl"  # in the run folder
_MOST_LINES_LOGGED = 100  # of one reason; the others are in the file


@dataclass(frozen=True)
class Record:
    """A conversation, and ``file:line`` it was read from."""

    where: str
    conversation: Conversation


@dataclass(frozen=True)
class Reject:
    """A line that is no good record: ``file:line``, why, and what stands there (None where it cannot be told)."""

    where: str
    reason: str
    line: bytes | None

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass
class _Part:
    """The account of one input: records that came in, and those left out by reason."""

    read: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def counts(self) -> dict[str, Any]:
        skipped = {reason: n for reason, n in self.skipped.items() if n}
        return {"in": self.read, "out": self.read - sum(skipped.values()), "skipped": skipped}


class RecordReader:
    """What one command reads. Every rank reads, rank 0 logs and writes; all take the same decisions."""

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
        """Return all records of ``paths``, checked. Collective over the world.

        Args:
            part: what the input is called in the summary; ``key``: its key in the configuration, for messages.
            require_response: whether a record without an assistant message is a bad one.
            each: what a record counts for in this part, where a command counts responses and draws several.

        Raises:
            UserError: a bad line with ``data.on_error=error``; no good record at all.
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

    def skip(
        self, part: str, reason: str, where: str, why: str, line: bytes | Conversation | None = None, count: int = 1
    ) -> None:
        """Leave out what was read at ``where`` for a fault of its own: counted, logged, and listed once.

        ``line``: what stands there, for ``rejected.jsonl``.
        """
        self._parts[part].skipped[reason] += count
        if (reason, where) in self._listed:
            return
        text = json_line(to_json(line)) if isinstance(line, Conversation) else line
        self._listed[reason, where] = rejected_json(where, why, text)
        self._logged[reason] += 1
        if self._here.layout.is_main and self._logged[reason] <= _MOST_LINES_LOGGED:
            get_logger(__name__).warning("skipped %s: %s", where, why)

    def leave_out(self, part: str, reason: str, count: int) -> None:
        """Count what is left out as the configuration asks for, by no fault of its own."""
        self._parts[part].skipped[reason] += count

    def list_rejected(self) -> None:
        """Write ``rejected.jsonl``, or remove that of an earlier attempt. Collective over the world."""
        path = self._here.folder / REJECTED_FILE
        on_main(lambda: write_rejected(path, list(self._listed.values())))
        for reason, count in self._logged.items():
            if count > _MOST_LINES_LOGGED and self._here.layout.is_main:
                get_logger(__name__).warning("%d more (%s) are in %s", count - _MOST_LINES_LOGGED, reason, path)

    def counts(self) -> dict[str, Any]:
        """Return ``{"in", "out", "skipped": {reason: n}}`` over all that was read; of several inputs each one's as
        well.
        """
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
    """Yield the good records of ``paths``, streamed; with ``on_error="skip"`` the others are added to ``rejects``.
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
    """Lines on their way to be parsed, kept until it is known whether they are good."""

    def __init__(self, lines: Iterator[tuple[str, bytes]]) -> None:
        self._lines = lines
        self._taken: dict[str, bytes] = {}

    def __next__(self) -> tuple[str, bytes]:
        where, line = next(self._lines)
        self._taken[where] = line
        return where, line

    def of(self, rejected: Rejected) -> list[Reject]:
        """Return what was rejected since the last call, with its lines; empties ``rejected``."""
        found = [Reject(where, reason, self._taken.get(where)) for where, reason in rejected]
        self._taken.clear()
        rejected.clear()
        return found


def skipped_in_words(counts: Mapping[str, Any]) -> str:
    """Return what was skipped, in words for a log line: ``, 3 skipped (rejected: 2, prompt_too_long: 1)``, or nothing."""
    skipped = counts["skipped"]
    if not skipped:
        return ""
    return f", {sum(skipped.values())} skipped ({', '.join(f'{reason}: {n}' for reason, n in skipped.items())})"


def write_rejects(folder: Path, rejects: Sequence[Reject]) -> None:
    """Name ``rejects`` in the log and list them in the ``rejected.jsonl`` of a run folder. Main rank only."""
    for reject in rejects[:_MOST_LINES_LOGGED]:
        get_logger(__name__).warning("skipped %s", reject)
    write_rejected(folder / REJECTED_FILE, [rejected_json(r.where, r.reason, r.line) for r in rejects])


def write_rejected(path: Path, entries: Sequence[str]) -> None:
    """``entries``, lines of JSON, as a file that is whole; no file if there are none."""
    if entries:
        write_text_atomic(path, "".join(entries))
    else:
        path.unlink(missing_ok=True)
