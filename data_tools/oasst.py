"""Convert OpenAssistant exports into conversation records: nested trees (``*.trees.jsonl``) and flat message files.

A nested file has a tree a line (``prompt`` with ``replies``); a flat one has a message a line (``message_id``,
``parent_id``), in any order; ``oasst_trees.py`` reads both, plain, ``.gz`` or ``.zst``.

Pruning: a message that is deleted (its text may be null), has no text, or is in a language that is not wanted ends its
path, and the messages below it are removed too. The same holds for a message of a flat file whose parent is missing (an
orphan). If a tree or message occurs again, the first occurrence counts.

A message with a negative review (``review_result`` false) is kept, for its labels say how bad it is, and counted (note
``review_result_false``), as are labels outside the schema.

Paths: every path from the root to a leaf of the pruned tree is cut after its last assistant message; siblings are in
file order. ``reply`` emits only the paths that no other one continues, and a reply that an earlier path already had
gets weight 0 (context only), so that every reply is trained exactly once. ``leaf`` emits every path in full, all of
weight 1, as the released SteerLM script does, but none twice.

The report adds up:

* messages = messages_used + Σ skipped.messages
* trees = trees_used + Σ skipped.trees
* paths = conversations + Σ skipped.paths
* reply_occurrences (assistant messages over all paths) = trained_replies + repeated_replies_avoided;
  under ``reply``, trained_replies = replies (the distinct assistant messages used)
* lines = the objects read, each a tree or a message; rejected_lines (``on_error="skip"``) are counted separately.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.oasst_trees import Node, preorder, read_trees
from data_tools.rows import Row, read_file
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.lines import OnError, Rejected
from steerlm_megatron.steer.records import Conversation, Message, expand_paths, write_records

OASST = AttributeSchema(
    name="oasst",
    names=("quality", "toxicity", "humor", "creativity", "violence", "helpfulness", "not_appropriate"),
    max_level=9,
)
PATHS = ("reply", "leaf")
_REJECTED_SHOWN = 100


def new_report() -> dict[str, Any]:
    """Return a report in which everything is zero; the module docstring says what adds up to what."""
    counts = ("lines", "rejected_lines", "trees", "trees_used", "messages", "messages_used", "paths", "conversations")
    more = ("replies", "labelled_replies", "trained_replies", "reply_occurrences", "repeated_replies_avoided")
    report: dict[str, Any] = dict.fromkeys(counts + more, 0)
    report["languages"], report["notes"] = Counter(), Counter()
    report["skipped"] = {"trees": Counter(), "messages": Counter(), "paths": Counter()}
    return report


def read(
    inputs: Sequence[str],
    schema: AttributeSchema,
    paths: str,
    languages: Sequence[str],
    report: dict[str, Any],
    on_error: OnError = "error",
    rejected: Rejected | None = None,
    take: Callable[[Conversation], Conversation | None] = lambda conversation: conversation,
    files: Iterable[Iterable[tuple[str, Row]]] | None = None,
) -> Iterator[tuple[str, Conversation]]:
    """Yield ``(tree id, conversation)``, streamed: nested files in the order given, then the trees of the flat files.

    Args:
        inputs: files or globs.
        schema: labels in [0, 1] become ``value * schema.max_level``; only names of the schema are kept.
        paths: ``reply`` or ``leaf``.
        languages: kept languages (``pt`` keeps ``pt-BR`` too); empty: all.
        report: from ``new_report``; filled on the way.
        on_error: ``skip`` puts a malformed line into ``rejected`` and goes on.
        rejected: receives ``("file:line", reason)``.
        take: filters a path; if it returns None, the path is left out, and its replies are trained in the next path
            that has them.
        files: rows to read instead of ``inputs``, with the position of each.

    Raises:
        UserError: a malformed line, naming ``file:line``; a file of neither kind.
    """
    wanted = frozenset(language.lower() for language in languages)
    seen_trees: set[str] = set()
    if files is None:
        files = (read_file(path, on_error, rejected) for path in expand_paths(inputs))
    for tree_id, root, size in read_trees(files, schema, report, on_error, rejected):
        report["trees"] += 1
        if tree_id in seen_trees:
            report["skipped"]["trees"]["repeated"] += 1
            report["skipped"]["messages"]["repeated"] += size
            continue
        seen_trees.add(tree_id)
        kept = _prune(root, wanted, report)
        found = False
        for path in _conversation_paths(kept, paths == "leaf", report):
            found = True
            new = [node for node in path if not node.done]
            taken = take(_conversation(path, tree_id, paths == "leaf", report))
            if taken is not None:
                yield tree_id, taken
                continue
            for node in new:
                node.done = False
        if found:
            report["trees_used"] += 1
        else:
            report["skipped"]["trees"]["no_reply" if kept else "pruned"] += 1


def _prune(root: Node, languages: frozenset[str], report: dict[str, Any]) -> list[Node]:
    """Remove unwanted messages from the tree, and count them; return the messages that are left, parents first."""
    skipped = report["skipped"]["messages"]
    kept: list[Node] = []
    stack = [root]
    while stack:
        node = stack.pop()
        reason = _unwanted(node, languages)
        if reason:
            skipped[reason] += 1
            skipped["below_skipped"] += sum(1 for _ in preorder(node)) - 1
            if node.parent is not None:
                node.parent.children.remove(node)
            continue
        kept.append(node)
        stack.extend(reversed(node.children))
    for node in reversed(kept):  # children before parents
        node.answered = any(child.is_reply or child.answered for child in node.children)
        if not node.is_reply and not node.answered:
            skipped["no_reply"] += 1
    return kept


def _unwanted(node: Node, languages: frozenset[str]) -> str:
    """Return why a message ends its path, or ``""``."""
    if node.deleted:
        return "deleted"
    if not node.text or node.text.isspace():
        return "empty"
    if languages:
        lang = node.lang.lower()
        if lang not in languages and lang.split("-")[0] not in languages:
            return "language"
    if node.parent is None and node.is_reply:
        return "begins_with_assistant"
    return ""


def _conversation_paths(kept: list[Node], every_leaf: bool, report: dict[str, Any]) -> Iterator[list[Node]]:
    """Yield root-to-leaf paths, each cut after its last assistant message; paths that add nothing are only counted.

    A path that another one continues comes last, and only if a reply in it is not ``done`` by then, since the other one
    may have been left out.
    """
    skipped = report["skipped"]["paths"]
    ends: set[str] = set()  # last messages of the emitted paths; in a tree they identify the path
    continued: list[list[Node]] = []
    for leaf in kept:
        if leaf.children:
            continue
        report["paths"] += 1
        path = _ancestors(leaf)
        length = len(path)
        while path and not path[-1].is_reply:
            path.pop()
        if not path:
            skipped["single_message" if length == 1 else "no_reply"] += 1
            continue
        replies = sum(node.is_reply for node in path)
        report["reply_occurrences"] += replies
        end = path[-1]
        if end.id in ends:
            skipped["repeated"] += 1
            report["repeated_replies_avoided"] += replies
            continue
        if end.answered and not every_leaf:
            continued.append(path)
            continue
        ends.add(end.id)
        yield path
    for path in continued:
        if path[-1].id not in ends and any(node.is_reply and not node.done for node in path):
            ends.add(path[-1].id)
            yield path
        else:
            skipped["repeated"] += 1
            report["repeated_replies_avoided"] += sum(node.is_reply for node in path)


def _ancestors(node: Node | None) -> list[Node]:
    """Return the path from the root to ``node``."""
    path: list[Node] = []
    while node is not None:
        path.append(node)
        node = node.parent
    return path[::-1]


def _conversation(path: list[Node], tree_id: str, every_leaf: bool, report: dict[str, Any]) -> Conversation:
    messages: list[Message] = []
    for node in path:
        weight = 1
        if not node.used:
            node.used = True
            report["messages_used"] += 1
            if node.is_reply:
                report["replies"] += 1
                report["labelled_replies"] += node.attributes is not None
        if node.done and node.is_reply and not every_leaf:
            weight = 0
        node.done = True
        if node.is_reply:
            report["trained_replies" if weight else "repeated_replies_avoided"] += 1
        messages.append(Message("assistant" if node.is_reply else "user", node.text, node.attributes, weight))
    report["conversations"] += 1
    return Conversation(path[-1].id, tuple(messages), "oasst", {"tree_id": tree_id, "lang": path[0].lang})


# The whole conversion


def split(tree_ids: Sequence[str], valid_fraction: float, seed: int) -> set[str]:
    """Return the trees of the validation set: the last ``max(1, round(fraction * n))`` of the shuffled distinct ids.

    Ids are sorted before shuffling, so that the order of the files does not matter. Fewer than two trees, or a fraction
    of 0, give no validation set; at least one tree is left for training.
    """
    if not 0 <= valid_fraction < 1:
        raise UserError(f"data.valid_fraction={valid_fraction} must be in [0, 1)")
    ids = sorted(set(tree_ids))
    if valid_fraction == 0 or len(ids) < 2:
        return set()
    random.Random(seed).shuffle(ids)
    return set(ids[-min(len(ids) - 1, max(1, round(valid_fraction * len(ids)))) :])


def convert(
    inputs: list[str],
    output_dir: str,
    schema: AttributeSchema,
    paths: str = "reply",
    languages: Sequence[str] = (),
    valid_fraction: float = 0.05,
    seed: int = 10,
    on_error: str = "error",
) -> dict[str, Any]:
    """Convert OpenAssistant files into ``train.jsonl.zst`` and ``valid.jsonl.zst`` in ``output_dir``, split by trees.

    The split is over the trees that give a conversation. The files are read twice: once to learn these trees, once to
    write. Without a validation set there is no ``valid.jsonl.zst`` (one of an earlier run is removed).

    Returns:
        The report (module docstring), with ``train`` and ``valid`` (``file``, ``trees``, ``conversations``) and the
        first ``rejected`` lines.

    Raises:
        UserError: a wrong option, a malformed line, or no conversation at all.
    """
    if paths not in PATHS:
        raise UserError(f"data.paths={paths!r}; legal: {' '.join(PATHS)}")
    if on_error not in ("error", "skip"):
        raise UserError(f"data.on_error={on_error!r}; legal: error skip")
    split((), valid_fraction, seed)  # checks the fraction before the long work
    mode: OnError = "skip" if on_error == "skip" else "error"
    report = new_report()
    rejected: Rejected = []
    tree_ids = dict.fromkeys(tree for tree, _ in read(inputs, schema, paths, languages, report, mode, rejected))
    report["rejected_lines"] = len(rejected)
    report["rejected"] = [{"line": where, "reason": reason} for where, reason in rejected[:_REJECTED_SHOWN]]
    if not tree_ids:
        raise UserError(f"{' '.join(inputs)}: no conversation is left: {_why_empty(report, languages)}")
    valid_trees = split(tuple(tree_ids), valid_fraction, seed)
    valid: list[Conversation] = []  # the small validation set is kept in memory while the training set is written

    def training() -> Iterator[Conversation]:
        for tree, conversation in read(inputs, schema, paths, languages, new_report(), mode):
            if tree in valid_trees:
                valid.append(conversation)
            else:
                yield conversation

    train_file, valid_file = Path(output_dir, "train.jsonl.zst"), Path(output_dir, "valid.jsonl.zst")
    count = write_records(train_file, training())
    report["train"] = {"file": str(train_file), "trees": len(tree_ids) - len(valid_trees), "conversations": count}
    if valid:
        write_records(valid_file, valid)
        report["valid"] = {"file": str(valid_file), "trees": len(valid_trees), "conversations": len(valid)}
    else:
        valid_file.unlink(missing_ok=True)
        report["valid"] = {"file": None, "trees": 0, "conversations": 0}
    report["languages"] = dict(report["languages"].most_common())
    report["notes"] = dict(sorted(report["notes"].items()))
    report["skipped"] = {unit: dict(reasons.most_common()) for unit, reasons in report["skipped"].items()}
    return report


def _why_empty(report: dict[str, Any], languages: Sequence[str]) -> str:
    reasons = ", ".join(f"{reason} {count}" for reason, count in report["skipped"]["messages"].most_common())
    text = f"{report['messages']} messages ({reasons or 'none skipped'}), {report['rejected_lines']} lines rejected"
    if languages:
        found = " ".join(name for name, _ in report["languages"].most_common(12))
        text += f"; data.languages={list(languages)}, the files have: {found or 'none'}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m data_tools.oasst IN... --output DIR``: print the report as JSON; return 2 after an error."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.oasst", description=__doc__.split("\n")[0])
    parser.add_argument("inputs", nargs="+", metavar="IN", help="trees or message files, or globs; .jsonl .gz .zst")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for train.jsonl.zst and valid.jsonl.zst")
    parser.add_argument("--paths", choices=PATHS, default="reply", help="train each reply once, or every path in full")
    parser.add_argument("--languages", nargs="*", default=[], metavar="LANG", help="keep only these (default: all)")
    parser.add_argument("--valid-fraction", type=float, default=0.05, help="share of the trees (default: 0.05)")
    parser.add_argument("--seed", type=int, default=10, help="of the split (default: 10)")
    parser.add_argument("--on-error", choices=("error", "skip"), default="error", help="what a malformed line does")
    parser.add_argument("--names", nargs="+", default=OASST.names, metavar="NAME", help="labels kept (default: 7)")
    parser.add_argument("--max-level", type=int, default=9, help="labels of 1.0 become this value (default: 9)")
    args = parser.parse_args(argv)
    try:
        schema = AttributeSchema("oasst", tuple(args.names), args.max_level, quality=args.names[0])
        report = convert(
            args.inputs, args.output, schema, args.paths, args.languages, args.valid_fraction, args.seed, args.on_error
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
