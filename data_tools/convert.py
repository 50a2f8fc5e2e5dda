"""Convert corpora in their published formats into ``train.jsonl.zst`` and ``valid.jsonl.zst`` of conversation records.

    python -m data_tools.convert SOURCE IN... --output DIR [options]       see docs/data.md

Owns: the registry of sources, the split, writing, the report. Does not own: formats (``sources/``, ``oasst.py``),
filters (``filters.py``). Invariants: the same input gives the same bytes; a written file is complete; memory does not
grow with the text (``filters.Sieve`` tells what it holds); and the report adds up:

* in = out + Σ skipped.conversations. For ``oasst``, ``in`` counts its paths; for the others it counts the conversations
  that the rows hold, where a rejected line (``on_error=skip``) counts as one.
* reply_occurrences = trained_replies + context_replies + repeated_replies_avoided + filtered_replies
* out = train.conversations + valid.conversations

The split is that of the data set if it has one (``valid_inputs``, HelpSteer2's ``split``, ``hf``). OpenAssistant is
split by trees (``oasst.split``), all others by the hash of (seed, first user message), as in ``steerlm preprocess``, so
that all answers to one prompt are in one split, whatever the order of the files.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from data_tools import oasst
from data_tools.command_line import print_report
from data_tools.filters import Filters, Sieve
from data_tools.sources import hf, nemo
from data_tools.sources.base import STEERLM_NAMES, Context, Converter, Found
from data_tools.sources.chat import MESSAGES, MSID, SHAREGPT, parse_map
from data_tools.sources.helpsteer import HELPSTEER
from data_tools.sources.hh_rlhf import HH_RLHF
from data_tools.writing import REJECTED_FILE, NothingLeftError, Progress, counted, keep_rejected, write_splits
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.attributes import AttributeSchema, nearest
from steerlm_megatron.steer.lines import OnError, Rejected, reject
from steerlm_megatron.steer.messages import without_null_objects
from steerlm_megatron.steer.records import Conversation
from steerlm_megatron.steer.splits import assign_split

__all__ = ["REJECTED_FILE", "ROWS", "SOURCES", "Options", "convert", "main"]

_REJECTED_SHOWN = 100


def _by_other_source(row: dict[str, Any], where: str, context: Context) -> list[Found]:
    """Convert an ``hf`` row by the converter that ``rows`` names."""
    return SOURCES[context.rows].convert(row, where, context)


def _not_by_rows(row: dict[str, Any], where: str, context: Context) -> list[Found]:
    raise AssertionError("oasst is converted by trees, not by rows")


SOURCES: dict[str, Converter] = {
    converter.name: converter
    for converter in (
        Converter("oasst", "OpenAssistant trees or flat messages", _not_by_rows, repeats=True),
        HELPSTEER,
        HH_RLHF,
        MSID,
        nemo.NEMO,
        SHAREGPT,
        MESSAGES,
        Converter("hf", "Hugging Face datasets by hub name or folder; see --rows", _by_other_source, hf.read),
    )
}
ROWS = tuple(name for name in SOURCES if name != "hf")


@dataclass(frozen=True)
class Options:
    """The options of a conversion. Their names are those of ``data.*``, except ``seed`` (``split_seed``), ``rows``
    (``hf_rows``), ``subset`` (``hf_subset``) and ``split`` (``hf_split``).

    Args:
        paths: ``reply`` trains a reply after the same messages once, ``leaf`` as often as it occurs. The sources that
            repeat shared beginnings read it: oasst, hh_rlhf, nemo.
        valid_inputs: files of the validation set; then ``inputs`` are all for training.
        map: the mapping of ``messages``, and of ``hf`` with such rows; see ``sources/chat.py``.
        label_max: the published labels of ``nemo`` are on 0..label_max; None means on the schema's scale.
        rows, subset, split: for ``hf``: the source that has such rows, the data set's configuration, the split to read.
    """

    paths: str = "reply"
    filters: Filters = Filters()
    valid_inputs: Sequence[str] = ()
    valid_fraction: float = 0.05
    seed: int = 10
    on_error: str = "error"
    map: str = ""
    label_max: float | None = None
    rows: str = "messages"
    subset: str | None = None
    split: str | None = None


def convert(
    source: str,
    inputs: Sequence[str],
    output_dir: str,
    schema: AttributeSchema | None,
    options: Options = Options(),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Convert files of one source into ``train.jsonl.zst`` and ``valid.jsonl.zst`` in ``output_dir``.

    Without a validation set there is no ``valid.jsonl.zst`` (one of an earlier run is removed). Under ``on_error=skip``
    all rejected lines are written to ``rejected.jsonl`` (``where``, ``reason``, ``line``).

    Args:
        source: a key of ``SOURCES``.
        inputs: files or globs (``hf``: names or folders).
        schema: attributes that are kept, and their scale; None keeps labels as they are. ``oasst`` needs one.
        progress: called from time to time with the number of conversations so far (``oasst`` reads its files twice).

    Returns:
        The report (module docstring) with ``notes`` (how often a source had to adapt something, by name), ``train`` and
        ``valid`` (``file``, ``conversations``) and the first ``rejected`` lines; for ``oasst`` also all that its own
        report has.

    Raises:
        UserError: a wrong option, a malformed line (``on_error=error``), nothing left, a folder that cannot be written.
    """
    _check(source, inputs, schema, options)
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        rejected: Rejected = []
        if source == "oasst" or (source == "hf" and options.rows == "oasst"):
            assert schema is not None
            report = _convert_oasst(source, list(inputs), output_dir, schema, options, rejected, progress)
        else:
            report = _convert_rows(source, inputs, output_dir, schema, options, rejected, progress)
        keep_rejected(output_dir, rejected)
    except OSError as error:
        raise UserError(f"{output_dir}: {error.strerror or error}; free space or name another folder") from error
    report["rejected_lines"] = len(rejected)
    report["rejected"] = [{"line": where, "reason": reason} for where, reason in rejected[:_REJECTED_SHOWN]]
    return report


def _check(source: str, inputs: Sequence[str], schema: AttributeSchema | None, options: Options) -> None:
    """Check everything that can be checked before a file is opened."""
    if source not in SOURCES:
        raise UserError(f"data.source={source!r}{nearest(source, tuple(SOURCES))}; legal: {' '.join(SOURCES)}")
    if not inputs:
        raise UserError(f"data.input is empty; name the files of data.source={source}")
    if "oasst" in (source, options.rows if source == "hf" else "") and schema is None:
        raise UserError("data.source=oasst needs a schema for its labels; choose attributes=oasst")
    if options.paths not in oasst.PATHS:
        raise UserError(f"data.paths={options.paths!r}; legal: {' '.join(oasst.PATHS)}")
    if options.on_error not in ("error", "skip"):
        raise UserError(f"data.on_error={options.on_error!r}; legal: error skip")
    if not 0 <= options.valid_fraction < 1:
        raise UserError(f"data.valid_fraction={options.valid_fraction} must be in [0, 1)")
    if options.rows not in ROWS:
        raise UserError(f"data.hf_rows={options.rows!r}{nearest(options.rows, ROWS)}; legal: {' '.join(ROWS)}")
    if options.label_max is not None and not options.label_max > 0:
        raise UserError(f"data.label_max={options.label_max} must be above 0")
    options.filters.rules(schema)
    parse_map(options.map)
    shape = options.rows if source == "hf" else source
    read_by = {  # option → (whether it was given, whether this source reads it)
        "map": (bool(options.map), shape == "messages"),
        "label_max": (options.label_max is not None, shape == "nemo"),
        "hf_subset": (options.subset is not None, source == "hf"),
        "hf_split": (options.split is not None, source == "hf"),
        "valid_input": (bool(options.valid_inputs), source not in ("oasst", "hf")),
    }
    for name, (given, is_read) in read_by.items():
        if given and not is_read:
            raise UserError(f"data.{name} is set, but data.source={source} does not read it; leave it out")


# Rows


def _convert_rows(
    source: str,
    inputs: Sequence[str],
    output_dir: str,
    schema: AttributeSchema | None,
    options: Options,
    rejected: Rejected,
    progress: Progress | None,
) -> dict[str, Any]:
    shape = options.rows if source == "hf" else source
    sieve = Sieve(options.filters, schema, once=options.paths == "reply" and SOURCES[shape].repeats)
    context = Context(
        shape, schema, parse_map(options.map), options.label_max, options.rows, options.subset, options.split
    )
    report: dict[str, Any] = {"source": source, "lines": 0}
    stream = _stream_rows(SOURCES[source], inputs, options, context, sieve, report, rejected)
    try:
        written = write_splits(output_dir, counted(stream, progress, lambda: sieve.counts["in"]))
    except NothingLeftError:
        written = None
    if rejected:
        sieve.skip("rejected", len(rejected))
    report |= sieve.report() | {"notes": dict(sorted((+context.notes).items()))}
    if written is None:
        raise UserError(_why_empty(report, inputs, options, rejected))
    return report | written


def _stream_rows(
    converter: Converter,
    inputs: Sequence[str],
    options: Options,
    context: Context,
    sieve: Sieve,
    report: dict[str, Any],
    rejected: Rejected,
) -> Iterator[tuple[str, Conversation]]:
    """Yield ``(split, conversation)`` of every conversation that is kept."""
    mode = cast(OnError, options.on_error)
    parts: list[tuple[Sequence[str], str | None]] = [(inputs, "train" if options.valid_inputs else None)]
    if options.valid_inputs:
        parts.append((options.valid_inputs, "valid"))
    for files, part in parts:
        for where, row, own in converter.read(files, context, mode, rejected):
            try:
                candidates = converter.convert(without_null_objects(row, where), where, context)
            except UserError as error:
                reject(error, mode, rejected)
                continue
            report["lines"] += 1
            for found in candidates:
                if found.conversation is None:
                    sieve.skip(found.reason)
                    continue
                kept = sieve.take(found.conversation)
                if kept is not None:
                    yield part or found.split or own or assign_split(kept, options.valid_fraction, options.seed), kept


# OpenAssistant


def _convert_oasst(
    source: str,
    inputs: list[str],
    output_dir: str,
    schema: AttributeSchema,
    options: Options,
    rejected: Rejected,
    progress: Progress | None,
) -> dict[str, Any]:
    """Convert like ``oasst.convert``, reading files twice, with filters after its paths; without filters the files are
    equal.
    """
    mode = cast(OnError, options.on_error)
    languages = options.filters.languages
    filters = replace(options.filters, languages=())  # oasst.read filters languages by message

    def kept(
        report: dict[str, Any], sieve: Sieve, rejected: Rejected | None = None
    ) -> Iterator[tuple[str, Conversation]]:
        files, context = None, Context("oasst", schema, subset=options.subset, split=options.split)
        if source == "hf":
            files = [((where, row) for where, row, _ in hf.read(inputs, context, mode, rejected))]
        yield from oasst.read(inputs, schema, options.paths, languages, report, mode, rejected, sieve.take, files)
        report["notes"].update(context.notes)

    report, sieve = oasst.new_report(), Sieve(filters, schema, once=False)
    first = counted(kept(report, sieve, rejected), progress, lambda: report["paths"])
    trees = dict.fromkeys(tree for tree, _ in first)
    valid_trees = oasst.split(tuple(trees), options.valid_fraction, options.seed)
    counts = sieve.report()
    skipped = {unit: Counter(reasons) for unit, reasons in report["skipped"].items()}
    skipped["paths"].update(sieve.skipped)
    report |= {
        **counts,
        "labelled_replies": report["labelled_replies"],
        "source": source,
        "in": report["paths"],
        "reply_occurrences": report["reply_occurrences"],
        "repeated_replies_avoided": report["repeated_replies_avoided"],
        "context_replies": 0,
        "filtered_replies": report["trained_replies"] - counts["trained_replies"],
        "languages": dict(report["languages"].most_common()),
        "notes": dict(sorted(report["notes"].items())),
        "skipped": {unit: dict(reasons.most_common()) for unit, reasons in skipped.items()},
    }
    report["skipped"]["conversations"] = report["skipped"]["paths"]
    if not trees:
        raise UserError(_why_empty(report, inputs, options, rejected))
    second = oasst.new_report()
    again = counted(
        kept(second, Sieve(filters, schema, once=False)), progress, lambda: report["paths"] + second["paths"]
    )
    written = write_splits(output_dir, (("valid" if tree in valid_trees else "train", c) for tree, c in again))
    written["train"]["trees"], written["valid"]["trees"] = len(trees) - len(valid_trees), len(valid_trees)
    return report | written


def _why_empty(report: dict[str, Any], inputs: Sequence[str], options: Options, rejected: Rejected) -> str:
    reasons = ", ".join(f"{reason} {count}" for reason, count in report["skipped"]["conversations"].items())
    text = f"{' '.join(inputs)}: no conversation is left for training: {report['in']} in, skipped: {reasons or 'none'}"
    if report["out"]:
        text += f"; {report['out']} fell to the validation set (data.valid_fraction={options.valid_fraction})"
    if options.filters.languages:
        found = " ".join(list(report["languages"])[:12])
        text += f"; data.languages={list(options.filters.languages)}, the input has: {found or 'none'}"
    if rejected:
        text += f"; {len(rejected)} lines rejected, the first: {': '.join(rejected[0])}"
    return text


# Command line

_SCHEMAS = {
    "oasst": oasst.OASST,
    "helpsteer": AttributeSchema("helpsteer", STEERLM_NAMES, 4),
    "none": None,
}
_DEFAULT_SCHEMA = {"oasst": "oasst", "helpsteer": "helpsteer", "nemo": "helpsteer"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.convert",
        description="Corpora in their published formats to conversation records; docs/data.md has the rules.",
        epilog="sources: " + "; ".join(f"{c.name} ({c.summary})" for c in SOURCES.values()),
    )
    parser.add_argument("source", choices=tuple(SOURCES), metavar="SOURCE", help=" ".join(SOURCES))
    parser.add_argument("inputs", nargs="+", metavar="IN", help="files or globs, .jsonl .json .gz .zst; hf: names")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the files that are written")
    parser.add_argument("--export", action="store_true", help="nemo: record files to NeMo-Aligner's JSONL")
    parser.add_argument("--valid-input", nargs="+", default=[], metavar="IN", help="files of the validation set")
    parser.add_argument("--valid-fraction", type=float, default=0.05, help="share of prompts (default: 0.05)")
    parser.add_argument("--seed", type=int, default=10, help="of the split (default: 10)")
    parser.add_argument("--on-error", choices=("error", "skip"), default="error", help="what a malformed line does")
    parser.add_argument("--paths", choices=oasst.PATHS, default="reply", help="train a repeated reply once, or always")
    parser.add_argument("--attributes", choices=tuple(_SCHEMAS), help="schema (default: by source)")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="a schema of these attributes, quality first")
    parser.add_argument("--max-level", type=int, help="the schema's highest level (default: 4, oasst 9)")
    parser.add_argument(
        "--map", default="", help="messages: prompt=KEY,response=KEY[,context=KEY] or turns=KEY,text=KEY,…"
    )
    parser.add_argument("--label-max", type=float, help="nemo: the published labels' highest value")
    parser.add_argument("--rows", choices=ROWS, default="messages", help="hf: whose rows they are")
    parser.add_argument("--subset", help="hf: the data set's configuration")
    parser.add_argument("--split", help="hf: the split to read")
    group = parser.add_argument_group("filters")
    group.add_argument("--languages", nargs="*", default=[], metavar="LANG")
    group.add_argument("--roles", nargs="*", default=[], metavar="ROLE")
    group.add_argument("--min-turns", type=int, default=0)
    group.add_argument("--max-turns", type=int)
    group.add_argument("--min-chars", type=int, default=0)
    group.add_argument("--max-chars", type=int)
    group.add_argument("--labels", nargs="*", default=[], metavar="RULE", help="quality>=6 …")
    group.add_argument("--dedupe", action="store_true", help="leave out conversations that occurred before")
    return parser


def _schema(args: argparse.Namespace) -> AttributeSchema | None:
    shape = args.rows if args.source == "hf" else args.source
    schema = _SCHEMAS[args.attributes or _DEFAULT_SCHEMA.get(shape, "none")]
    if args.names:
        return AttributeSchema("custom", tuple(args.names), args.max_level or 4, quality=args.names[0])
    if args.max_level and schema is not None:
        return replace(schema, max_level=args.max_level, best={})
    return schema


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: print the report as JSON. Returns 2 after a user's error."""
    parser = _parser()
    args = parser.parse_args(argv)
    return print_report(lambda: _converted(args))


def _converted(args: argparse.Namespace) -> dict[str, Any]:
    """Do what the command line asks for, and return the report."""
    schema = _schema(args)
    if args.export:
        if args.source != "nemo" or schema is None:
            raise UserError(f"--export is of source nemo and needs a schema, not of {args.source}")
        return nemo.export(args.inputs, args.output, schema, args.on_error)
    filters = Filters(
        args.languages, args.roles, args.min_turns, args.max_turns, args.min_chars, args.max_chars, args.labels,
        args.dedupe,
    )  # fmt: skip
    options = Options(
        args.paths, filters, args.valid_input, args.valid_fraction, args.seed, args.on_error, args.map,
        args.label_max, args.rows, args.subset, args.split,
    )  # fmt: skip
    return convert(args.source, args.inputs, args.output, schema, options)


if __name__ == "__main__":
    sys.exit(main())
