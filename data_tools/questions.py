"""Question files of Vicuna-80 and MT-bench to prompt records for ``evaluate.prompts``.

    python -m data_tools.questions question.jsonl --output questions.jsonl [--references gpt-4.jsonl] [--first-turn]

A row has ``question_id`` (or ``prompt_id``), ``category``, and ``turns`` (or ``prompt``), a list of the user's
messages, or ``text``, a single one, as FastChat and the data sets on the Hugging Face hub publish them; ``reference``
may have a solution per turn. A file of reference answers has ``question_id`` and ``choices[0].turns``.

Owns: these formats. Does not own: what becomes of a record (docs/judges.md). Invariants: every question becomes one
record, in the order of the files, or is an error that names its line; ids are unique. A record has the first message as
its prompt, ``category``, and where there are any ``follow_ups`` (the further messages) and ``reference``.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_tools.command_line import print_report
from data_tools.rows import read_files
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.messages import Message
from steerlm_megatron.steer.records import Conversation, write_records

References = dict[str, list[str | None]]


def convert(
    inputs: Sequence[str], output: str, references: Sequence[str] = (), first_turn: bool = False
) -> dict[str, Any]:
    """Write the questions of ``inputs`` as records into ``output``; return how many there are, by category too.

    Args:
        inputs: files or globs, JSON Lines or a JSON array.
        references: files of reference answers, whose solutions take the place of those in the questions.
        first_turn: leave out the turns after the first.

    Raises:
        UserError: a row that is no question, an id that occurs twice, a reference to no question.
    """
    known = _references(references)
    records = list(_records(inputs, known, first_turn))
    if unused := sorted(known.keys() - {record.id for record in records}):
        raise UserError(f"{' '.join(references)}: no question has the id {unused[0]} ({len(unused)} such references)")
    write_records(output, records)
    categories = Counter(record.extra.get("category", "") for record in records)
    return {
        "out": len(records),
        "turns": sum(1 + len(record.extra.get("follow_ups", ())) for record in records),
        "with_reference": sum("reference" in record.extra for record in records),
        "categories": dict(sorted(categories.items())),
    }


def _records(inputs: Sequence[str], references: References, first_turn: bool) -> Iterator[Conversation]:
    seen: set[str] = set()
    for where, row in read_files(inputs, "error", None):
        record = question(row, where, references, first_turn)
        if record.id in seen:
            raise UserError(f"{where}: the id {record.id} occurs twice; give each question one of its own")
        seen.add(record.id)
        yield record


def question(row: Mapping[str, Any], where: str, references: References, first_turn: bool = False) -> Conversation:
    """Return the record of one row. Raises UserError, which begins with ``where``."""
    name = _id(row, where)
    turns = next((row[key] for key in ("turns", "prompt", "text") if row.get(key) is not None), None)
    turns = [turns] if isinstance(turns, str) else turns
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise UserError(f"{where}: the row has no question: 'turns' must be a list of texts, or 'text' a text")
    category = row.get("category")
    if category is not None and not isinstance(category, str):
        raise UserError(f"{where}: category={category!r} must be a text")
    solutions = references.get(name, row.get("reference"))
    solutions = [solutions] if isinstance(solutions, str) else solutions or []
    if not isinstance(solutions, list) or not all(text is None or isinstance(text, str) for text in solutions):
        raise UserError(f"{where}: reference must be a list with the solution of each turn")
    kept = turns[:1] if first_turn else turns
    extra: dict[str, Any] = {} if category is None else {"category": category}
    if kept[1:]:
        extra["follow_ups"] = kept[1:]
    if any(solutions[: len(kept)]):
        extra["reference"] = solutions[: len(kept)]
    return Conversation(name, (Message("user", kept[0]),), extra=extra)


def _id(row: Mapping[str, Any], where: str) -> str:
    found = next((row[key] for key in ("question_id", "prompt_id", "id") if row.get(key) is not None), None)
    if isinstance(found, bool) or not isinstance(found, int | str):
        raise UserError(f"{where}: the row has no question_id")
    return str(found)


def _references(paths: Sequence[str]) -> References:
    """Return the solutions of files of reference answers, by question."""
    found: References = {}
    for where, row in read_files(paths, "error", None) if paths else ():
        try:
            turns = row["choices"][0]["turns"]
        except (KeyError, IndexError, TypeError):
            turns = None
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise UserError(f"{where}: the row has no reference answer: 'choices' must hold 'turns', a list of texts")
        found[_id(row, where)] = turns
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: print what was written as JSON. Returns 2 after a user's error."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.questions",
        description="Question files of Vicuna-80 and MT-bench to prompt records; docs/judges.md has the rules.",
    )
    parser.add_argument("inputs", nargs="+", metavar="IN", help="files or globs, .jsonl .json .gz .zst")
    parser.add_argument("--output", required=True, metavar="FILE", help="the record file that is written")
    parser.add_argument("--references", nargs="+", default=[], metavar="FILE", help="files of reference answers")
    parser.add_argument("--first-turn", action="store_true", help="leave out the turns after the first")
    args = parser.parse_args(argv)
    return print_report(lambda: convert(args.inputs, args.output, args.references, args.first_turn))


if __name__ == "__main__":
    sys.exit(main())
