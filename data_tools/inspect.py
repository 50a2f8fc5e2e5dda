"""Show the content of a shard folder to people: ``python -m data_tools.inspect DIR [--sample N]``.

It prints the manifest's summary, the length and attribute histograms, the fill at ``--row-tokens``, and samples in
colour: control tokens, label lines, masked text dim, trained text bright, markers of the ``ap`` view with their target
values, and where a document begins and ends. Without colour, trained text is in ⟦ ⟧, label lines are in ‹ ›.

Owns: the output. Does not own: formats, views, packing (``steerlm_megatron.data``). Invariant: in the ``acsft`` view it
shows all tokens that Megatron-Core's ``IndexedDataset`` yields for a document, in order; the other views remove label
lines, ``ap`` adds markers, and ``ap_text`` puts label lines after the responses.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.text import Text

from steerlm_megatron.data.feed.dataset import ShardDataset
from steerlm_megatron.data.shards import ShardReader
from steerlm_megatron.data.views import ASSISTANT, VIEWS, View
from steerlm_megatron.errors import UserError

_BAR = 40  # length of the longest bar in characters


class Kind(IntEnum):
    """The kind of a shown token."""

    MASKED = 0  # context, no loss
    TRAINED = 1
    LABEL = 2  # part of a label line, which is never trained
    CONTROL = 3  # a control token without loss
    CONTROL_TRAINED = 4
    MARKER = 5  # added by the ap view; its hidden state is regressed


_STYLES = {
    Kind.MASKED: "dim",
    Kind.TRAINED: "bold green",
    Kind.LABEL: "yellow",
    Kind.CONTROL: "magenta",
    Kind.CONTROL_TRAINED: "bold magenta reverse",
    Kind.MARKER: "bold cyan reverse",
}
_NAMES = {
    Kind.MASKED: "masked",
    Kind.TRAINED: "trained",
    Kind.LABEL: "label line",
    Kind.CONTROL: "control",
    Kind.CONTROL_TRAINED: "control, trained",
    Kind.MARKER: "AP marker",
}
_BRACKETS = {
    Kind.MASKED: ("", ""),
    Kind.TRAINED: ("⟦", "⟧"),
    Kind.LABEL: ("‹", "›"),
    Kind.CONTROL: ("", ""),
    Kind.CONTROL_TRAINED: ("⟦", "⟧"),
    Kind.MARKER: ("«", "»"),
}


@dataclass(frozen=True)
class Shown:
    """A document to show. T tokens; ``kinds_T`` are ``Kind``; ``values`` maps a marker's position to its values."""

    id: str
    tokens_T: npt.NDArray[np.int64]
    kinds_T: npt.NDArray[np.int8]
    values: dict[int, dict[str, float]]
    has_target: bool


def shown(dataset: ShardDataset, index: int, view: View) -> Shown:
    """Return document ``index`` through ``view``, uncut. If it has no target there, all of it is shown as masked."""
    document = dataset.document(index)
    sample = dataset.sample(index, view)
    tokens = np.asarray(document.tokens_T if sample is None else sample.tokens_T, np.int64)
    mask = np.zeros(len(tokens), np.bool_) if sample is None else sample.loss_mask_T
    kinds = np.where(mask, Kind.TRAINED, Kind.MASKED).astype(np.int8)
    if view == "acsft" or sample is None:  # the positions are those of the stored document
        for turn in document.turns_N:
            kinds[turn["label_start"] : turn["label_end"]] = Kind.LABEL
    control = np.isin(tokens, list(dataset.tokenizer.controls.values()))
    kinds[control] = np.where(mask[control], Kind.CONTROL_TRAINED, Kind.CONTROL)
    values: dict[int, dict[str, float]] = {}
    if sample is not None and len(sample.pool_P):
        kinds[sample.pool_P] = Kind.MARKER
        names = dataset.schema.names if dataset.schema else ()
        for position, row in zip(sample.pool_P.tolist(), sample.values_PA.tolist(), strict=True):
            values[position] = {name: value for name, value in zip(names, row, strict=True) if value == value}
    return Shown(document.id, tokens, kinds, values, sample is not None)


def runs(item: Shown) -> Iterator[tuple[Kind, int, int]]:
    """Yield ``(kind, start, end)`` of runs of one kind; a control token or marker is a run by itself."""
    start, size = 0, len(item.tokens_T)
    for end in range(1, size + 1):
        same = end < size and item.kinds_T[end] == item.kinds_T[start] and item.kinds_T[start] <= Kind.LABEL
        if not same:
            yield Kind(item.kinds_T[start]), start, end
            start = end


def picture(dataset: ShardDataset, item: Shown, color: bool) -> Text:
    """Return the document as coloured text."""
    out = Text()
    for kind, start, end in runs(item):
        text = dataset.tokenizer.decode(item.tokens_T[start:end].tolist())
        opening, closing = ("", "") if color else _BRACKETS[kind]
        out.append(opening + text + closing, _STYLES[kind])
        if start in item.values:
            said = " ".join(f"{name}={value:g}" for name, value in item.values[start].items())
            out.append(f"[{said or 'no target'}]", "cyan")
    return out


# Sections


def summary_lines(dataset: ShardDataset) -> list[str]:
    """Return the manifest in a few lines."""
    manifest = dataset.manifest
    counts, schema = manifest["counts"], dataset.schema
    tokens = counts["tokens"]
    skipped = ", ".join(f"{reason} {number}" for reason, number in counts.get("skipped", {}).items())
    lines = [
        f"documents {len(dataset):,} in {len(manifest['shards'])} shards; in {counts.get('in', '?')}, "
        f"out {counts.get('out', '?')}, skipped {skipped or 'none'}",
        f"tokens    {tokens:,}, trained {counts['target_tokens']:,} ({_percent(counts['target_tokens'], tokens)}), "
        f"unknown {counts['unk_tokens']:,}",
        f"turns     {counts['turns']:,}, labelled {counts['labelled_turns']:,}",
        f"template  {manifest['template']['name']}; schema "
        + (f"{schema.name}: {' '.join(schema.names)} on 0..{schema.max_level}" if schema else "none"),
        f"tokenizer {manifest['tokenizer']['vocab_size']:,} ids, hash {manifest['tokenizer']['hash'][:12]}; controls "
        + " ".join(f"{text}={number}" for text, number in dataset.tokenizer.controls.items()),
    ]
    for name, policy in manifest.get("policies", {}).items():
        said = [f"{key} {number}" for key, number in policy.items() if key != "policy"]
        lines.append(f"policy    {name}={policy['policy']}: {', '.join(said)}")
    for source in manifest["sources"]:
        lines.append("source    " + " ".join(f"{key}={str(value)[:64]}" for key, value in source.items()))
    converted = manifest.get("converted")
    if converted:
        reasons = ", ".join(f"{reason} {number}" for reason, number in converted["skipped"]["conversations"].items())
        lines.append(
            f"converted by {converted['source']}: in {converted['in']}, out {converted['out']}, skipped "
            f"{reasons or 'none'}; repeated replies avoided {converted['repeated_replies_avoided']}"
        )
        for source in converted["sources"]:
            lines.append("  from    " + " ".join(f"{key}={value}" for key, value in source.items()))
    return lines


def length_lines(lengths: npt.NDArray[np.int64]) -> list[str]:
    """Return histogram over powers of two of the samples that have a target."""
    used = lengths[lengths > 0]
    if not len(used):
        return ["no sample has a target in this view"]
    low, middle, most = np.percentile(used, [5, 50, 95]).astype(int)
    lines = [
        f"{len(used):,} samples with a target, {len(lengths) - len(used):,} without",
        f"tokens: mean {used.mean():.1f}, 5 % {low:,}, median {middle:,}, 95 % {most:,}, longest {used.max():,}",
    ]
    buckets = np.floor(np.log2(used)).astype(int)
    counts = np.bincount(buckets)
    for bucket in range(int(buckets.min()), len(counts)):
        lines.append(f"{2**bucket:>9,} – {2 ** (bucket + 1) - 1:<9,} {_bar(counts[bucket], int(counts.max()))}")
    return lines


def attribute_counts(reader: ShardReader) -> dict[str, npt.NDArray[np.int64]]:
    """Count the labelled, trained turns of each attribute at each level, by the schema's rounding (half to even)."""
    schema = reader.schema
    if schema is None:
        return {}
    totals = np.zeros((len(schema.names), schema.max_level + 1), np.int64)
    for shard in reader.shards:
        counts_turn = (shard.turns["role"] == ASSISTANT) & (shard.turns["weight"] > 0)
        for attribute, values in enumerate(np.asarray(shard.values)[counts_turn].T):
            levels = np.rint(np.clip(values[~np.isnan(values)], 0, schema.max_level)).astype(np.int64)
            totals[attribute] += np.bincount(levels, minlength=schema.max_level + 1)
    return dict(zip(schema.names, totals, strict=True))


def attribute_lines(reader: ShardReader, mean: npt.NDArray[np.float32]) -> list[str]:
    """Return one block of lines per attribute."""
    lines = []
    for (name, counts), average in zip(attribute_counts(reader).items(), mean.tolist(), strict=False):
        total = int(counts.sum())
        lines.append(f"{name}: {total:,} values" + (f", mean {average:.3f}" if total else ""))
        if total:
            lines += [f"{level:>4} {_bar(number, int(counts.max()))}" for level, number in enumerate(counts)]
    return lines or ["no attributes"]


def fill_lines(dataset: ShardDataset, view: View, row_tokens: int, seed: int) -> list[str]:
    """Return the packing plan's report in lines."""
    try:
        plan = dataset.plan(view, row_tokens, seed, cache=False)
    except UserError as error:
        return [str(error)]
    report = plan.report()
    return [f"{key} {value}" for key, value in report.items()]


def _bar(count: int, most: int) -> str:
    return f"{'█' * max(1 if count else 0, round(_BAR * int(count) / max(1, int(most)))):<{_BAR}} {int(count):,}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


# Printing


def chosen(count: int, sample: int, indices: Sequence[int], seed: int) -> list[int]:
    """Return the documents to show: those asked for, else ``sample`` random ones in order."""
    for index in indices:
        if not 0 <= index < count:
            raise UserError(f"--index {index}: the folder has documents 0..{count - 1}")
    return list(indices) or sorted(random.Random(seed).sample(range(count), min(sample, count)))


def show(console: Console, reader: ShardReader, args: argparse.Namespace) -> None:
    """Print everything that ``args`` asks for."""
    dataset, color = ShardDataset(reader), not args.no_color
    view = cast(View, args.view)

    def section(title: str, lines: Sequence[str]) -> None:
        console.print(Text(title, "bold"))
        for line in lines:
            console.print(Text("  " + line), soft_wrap=True)

    section(str(reader.folder), summary_lines(dataset))
    section(f"lengths, view {view}", length_lines(dataset.lengths(view)))
    section("attributes", attribute_lines(reader, dataset.label_mean()))
    section(f"packing, rows of {args.row_tokens:,} tokens", fill_lines(dataset, view, args.row_tokens, args.seed))
    picked = chosen(len(dataset), args.sample, args.index, args.seed)
    if not picked:
        return
    legend = Text("legend: ")
    for kind, style in _STYLES.items():
        opening, closing = ("", "") if color else _BRACKETS[kind]
        legend.append(f"{opening}{_NAMES[kind]}{closing}", style).append("  ")
    console.print(legend, soft_wrap=True)
    for index in picked:
        _show_document(console, dataset, index, view, color, args)


def _show_document(
    console: Console, dataset: ShardDataset, index: int, view: View, color: bool, args: argparse.Namespace
) -> None:
    item = shown(dataset, index, view)
    size, trained = len(item.tokens_T), int(np.isin(item.kinds_T, (Kind.TRAINED, Kind.CONTROL_TRAINED)).sum())
    facts: list[Any] = [f"document {index}", item.id, f"{size:,} tokens", f"{trained:,} trained"]
    if item.values:
        facts.append(f"markers at {' '.join(map(str, item.values))}")
    if not item.has_target:
        facts.append(f"no target in view {view}: not in any row")
    if size > args.row_tokens:
        facts.append(f"longer than a row of {args.row_tokens:,}: the over-long policy applies")
    console.print(Text(f"┌── {' · '.join(facts)}", "bold blue"), soft_wrap=True)
    console.print(picture(dataset, item, color), soft_wrap=True)
    if args.ids:
        console.print(Text("ids: " + " ".join(map(str, item.tokens_T.tolist()))), soft_wrap=True)
    console.print(Text(f"└── end of document {index}", "bold blue"), soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: print the folder. Returns 2 after a user's error."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.inspect", description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="DIR", help="a shard folder, such as …/train")
    parser.add_argument("--sample", type=int, default=3, metavar="N", help="how many documents to show (default: 3)")
    parser.add_argument("--index", type=int, nargs="+", default=[], metavar="I", help="show these documents instead")
    parser.add_argument("--view", choices=VIEWS, default="acsft", help="what a model sees of it (default: acsft)")
    parser.add_argument("--row-tokens", type=int, default=4096, help="row length for the fill (default: 4096)")
    parser.add_argument("--seed", type=int, default=1234, help="of packing and of the choice of samples")
    parser.add_argument("--ids", action="store_true", help="print the token ids too")
    parser.add_argument("--verify", action="store_true", help="compare all checksums first (reads every byte)")
    parser.add_argument("--no-color", action="store_true", help="mark kinds with brackets instead")
    args = parser.parse_args(argv)
    console = Console(color_system=None if args.no_color else "auto", highlight=False, markup=False, emoji=False)
    args.no_color = console.color_system is None or console.no_color  # also where the output is no terminal
    try:
        show(console, ShardReader(args.folder, verify=args.verify), args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
