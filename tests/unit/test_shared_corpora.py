"""Published corpora, from the raw file to Megatron-Core's reader: the trained texts are exactly the file's replies.

The expected content is computed here from a file's JSON alone, without the project's converters.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from steerlm_megatron.config import load
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.stages.collect import collect_records
from steerlm_megatron.stages.shards import make_shards
from tests.helpers.conversion import ALPACA, TOPICAL, shared

OASST = {"name": "oasst", "names": ["quality", "humor"], "max_level": 9, "quality": "quality"}
Path_ = list[dict[str, Any]]


def rows(path: str) -> list[dict[str, Any]]:
    with zstandard.open(path, "rb") as file:
        return [json.loads(line) for line in io.TextIOWrapper(file, "utf-8")]


def trees(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return roots with nested ``replies``, without repeated trees and orphans."""
    if "prompt" in found[0]:
        return list({row["message_tree_id"]: row["prompt"] for row in found}.values())
    messages = {row["message_id"]: {**row, "replies": []} for row in found}
    for message in messages.values():
        if message["parent_id"] in messages:
            messages[message["parent_id"]]["replies"].append(message)
    return [message for message in messages.values() if message["parent_id"] is None]


def leaves(node: dict[str, Any]) -> Iterator[Path_]:
    if node.get("deleted") or not node["text"].strip():
        return
    below = [path for reply in node.get("replies") or [] for path in leaves(reply)]
    yield from ([node, *path] for path in below or [[]])


def expected_oasst(path: str, every_leaf: bool) -> tuple[int, Counter[str]]:
    """Return the number of paths, and the trained texts."""
    paths = [path for root in trees(rows(path)) for path in leaves(root)]
    texts: Counter[str] = Counter()
    done: set[Any] = set()
    for messages in paths:
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
        whole = tuple(m["message_id"] for m in messages[: last + 1])
        for message in messages[: last + 1]:
            key = (whole, message["message_id"]) if every_leaf else message["message_id"]
            if message["role"] == "assistant" and key not in done:
                done.add(key)
                texts[message["text"]] += 1
    return len(paths), texts


def expected_hh(path: str) -> tuple[int, Counter[str]]:
    """Return each reply once per sequence of messages before it, without transcripts whose last turn is empty."""
    transcripts = [row[side] for row in rows(path) for side in ("chosen", "rejected")]
    texts: Counter[str] = Counter()
    done: set[tuple[Any, ...]] = set()
    for transcript in transcripts:
        parts = re.split(r"\n\n(Human|Assistant):", transcript)
        turns: list[tuple[str, str]] = []
        for who, text in zip(parts[1::2], map(str.strip, parts[2::2]), strict=True):
            if text and turns and turns[-1][0] == who:
                turns[-1] = (who, turns[-1][1] + "\n\n" + text)
            elif text:
                turns.append((who, text))
        if parts[-2] == "Human" or not parts[-1].strip():
            continue
        for end, (who, text) in enumerate(turns, 1):
            if who == "Assistant" and tuple(turns[:end]) not in done:
                done.add(tuple(turns[:end]))
                texts[text] += 1
    return len(transcripts), texts


def expected_topical(path: str) -> tuple[int, Counter[str]]:
    found = rows(path)
    said = [(turn["agent"] == row["content"][0]["agent"], turn["message"]) for row in found for turn in row["content"]]
    return len(found), Counter(text for is_first_speaker, text in said if not is_first_speaker)


def expected_dolly(path: str) -> tuple[int, Counter[str]]:
    found = rows(path)
    return len(found), Counter(row["output"] for row in found)


CASES: list[tuple[str, str, dict[str, Any], Any]] = [
    ("oasst2_subset_trees", "oasst", {}, lambda path: expected_oasst(path, False)),
    ("oasst2_subset_trees", "oasst", {"paths": "leaf"}, lambda path: expected_oasst(path, True)),
    ("oa_en100_trees", "oasst", {}, lambda path: expected_oasst(path, False)),
    ("oasst1_en_val_messages", "oasst", {}, lambda path: expected_oasst(path, False)),
    ("hh_harmless-base_test", "hh_rlhf", {}, expected_hh),
    ("dolly_3k", "messages", {"map": ALPACA}, expected_dolly),
    ("topical_chat_valid_freq", "messages", {"map": TOPICAL}, expected_topical),
]


@pytest.mark.parametrize(("name", "source", "data", "expected"), CASES, ids=[f"{c[0]}-{c[2]}" for c in CASES])
def test_megatron_reads_exactly_the_replies_of_the_file(
    tmp_path: Path, name: str, source: str, data: dict[str, Any], expected: Any
) -> None:
    path, model = shared(f"{name}.jsonl.zst", "mistral_v1.spm.model")
    attributes = OASST if source == "oasst" else {"names": []}
    config = load.finalize(
        load.from_container(
            {
                "data": {"source": source, "input": path, "workers": 1, **data},
                "attributes": attributes,
                "tokenizer": {"path": model},
            }
        )
    )
    splits, report = collect_records(config, tmp_path / "records")
    summary = make_shards(config, splits, tmp_path / "shards")
    count, texts = expected(path)
    assert report["in"] == count == summary["out"] + sum(report["skipped"]["conversations"].values())
    assert report["out"] == summary["in"] == summary["out"] and not summary["skipped"]
    found: Counter[str] = Counter()
    documents = 0
    for split in summary["splits"]:
        folder = tmp_path / "shards" / split
        tokenizer = Tokenizer.load(folder)
        for shard in json.loads((folder / "manifest.json").read_text())["shards"]:
            megatron = IndexedDataset(str(folder / shard["name"]))
            starts = np.load(folder / f"{shard['name']}.docs.npy")["spans"]
            spans = np.load(folder / f"{shard['name']}.spans.npy")
            documents += len(megatron)
            for index in range(len(megatron)):
                tokens = megatron[index]
                for start, end in spans[starts[index] : starts[index + 1]]:
                    found[tokenizer.decode(tokens[start:end]).removesuffix("\n<extra_id_1>")] += 1
    assert documents == summary["out"]
    assert found == texts
