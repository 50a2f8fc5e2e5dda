"""Write pairs of responses of which people chose one, for ``evaluate.preferences``, from published corpora.

``python -m data_tools.preferences hh_rlhf IN… --output FILE`` reads HH-RLHF (``chosen``/``rejected``);
``… helpsteer IN…`` reads HelpSteer2's and HelpSteer3's preferences. ``steer/preferences.py`` has the form that is
written. A line is checked by the rules of its source (``data_tools/sources``).

Left out, and counted: a row of which a response is left out by its source; ``prompts_differ`` (the two transcripts
answer different messages); ``equal_responses``; ``no_preference`` (people found both alike, or the label is invalid).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.command_line import print_report
from data_tools.sources.base import Context, Converter
from data_tools.sources.helpsteer import HELPSTEER
from data_tools.sources.hh_rlhf import HH_RLHF, SIDES
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import write_text_atomic
from steerlm_megatron.steer.lines import OnError, Rejected, reject
from steerlm_megatron.steer.messages import without_null_objects
from steerlm_megatron.steer.records import Conversation

SOURCES: dict[str, Converter] = {converter.name: converter for converter in (HH_RLHF, HELPSTEER)}


def write_pairs(source: str, inputs: Sequence[str], output: str, on_error: OnError = "error") -> dict[str, Any]:
    """Write the pairs of ``inputs`` to ``output``; return a report: ``in`` = ``out`` + Σ ``skipped``.

    Raises:
        UserError: an unknown source; a malformed line (``on_error="error"``); no pair at all.
    """
    if source not in SOURCES:
        raise UserError(f"source={source!r}; legal: {' '.join(SOURCES)}")
    skipped: Counter[str] = Counter()
    rejected: Rejected = []
    lines = [
        json.dumps(pair, ensure_ascii=False) for pair in _pairs(SOURCES[source], inputs, on_error, rejected, skipped)
    ]
    if rejected:
        skipped["rejected"] = len(rejected)
    if not lines:
        reasons = ", ".join(f"{reason} {count}" for reason, count in skipped.items()) or "none"
        raise UserError(f"{' '.join(inputs)}: no pair is left; skipped: {reasons}")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(output, "".join(f"{line}\n" for line in lines))
    return {
        "source": source, "in": len(lines) + sum(skipped.values()), "out": len(lines), "skipped": dict(skipped),
        "rejected": [{"line": where, "reason": reason} for where, reason in rejected[:100]], "file": str(output),
    }  # fmt: skip


def _pairs(
    converter: Converter, inputs: Sequence[str], on_error: OnError, rejected: Rejected, skipped: Counter[str]
) -> Iterator[dict[str, Any]]:
    context = Context(converter.name, None)
    for where, row, _ in converter.read(list(inputs), context, on_error, rejected):
        try:
            found = converter.convert(without_null_objects(row, where), where, context)
        except UserError as error:
            reject(error, on_error, rejected)
            continue
        made = [one.conversation for one in found if one.conversation is not None]
        if len(made) < len(found):
            skipped[next(one.reason for one in found if one.conversation is None)] += 1
            continue
        pair = _pair(made)
        if isinstance(pair, str):
            skipped[pair] += 1
        else:
            yield pair


def _pair(made: Sequence[Conversation]) -> dict[str, Any] | str:
    """Return the pair of two conversations, or the reason why they are none."""
    sides = {side: one for one in made if (side := _side(one)) is not None}
    if set(sides) != set(SIDES):
        return "no_preference"
    chosen, rejected = (sides[side].messages for side in SIDES)
    before = [[(m.role, m.content) for m in messages[:-1]] for messages in (chosen, rejected)]
    if before[0] != before[1]:
        return "prompts_differ"
    if chosen[-1].content == rejected[-1].content:
        return "equal_responses"
    return {
        "id": str(made[0].extra.get("pair", made[0].id)),
        "messages": [{"role": role, "content": content} for role, content in before[0]],
        "chosen": chosen[-1].content,
        "rejected": rejected[-1].content,
    }


def _side(conversation: Conversation) -> str | None:
    said = conversation.extra.get("preference")
    if isinstance(said, dict):
        preferred = said.get("preferred")
        said = None if preferred is None else SIDES[0 if preferred else 1]
    return said if said in SIDES else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: print the report as JSON. Returns 2 after a user's error."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.preferences", description=__doc__.split("\n")[0])
    parser.add_argument("source", choices=tuple(SOURCES))
    parser.add_argument("inputs", nargs="+", metavar="IN", help="files or globs, .jsonl .json .gz .zst")
    parser.add_argument("--output", required=True, metavar="FILE", help="the file that is written (.jsonl)")
    parser.add_argument("--on-error", choices=("error", "skip"), default="error", help="what a malformed line does")
    args = parser.parse_args(argv)
    return print_report(lambda: write_pairs(args.source, args.inputs, args.output, args.on_error))


if __name__ == "__main__":
    sys.exit(main())
