"""Compare preprocessing with its limit and its peer: ``python benchmarks/preprocess.py [--repeats N] [--only NAME…]``.

* ``speed``: ``preprocess`` with one worker (A), bare SentencePiece ``encode`` over the same messages (B), and the
algorithm of Megatron-LM's ``preprocess_data.py`` (C), which for each line parses it, encodes its text and passes it to
``IndexedDatasetBuilder``. D is C with the processes of that script: a pool of one process encodes (``imap``, 32 lines
at a time), the main process writes. They run in turns A B C D A B C D …; the figures are medians over CPU seconds of
the
  process and its children (wall clock in brackets), which a busy machine disturbs less, and ratios are taken turn by
  turn. All rates count the tokens of A: B encodes less than that (no roles, no label lines).
* ``workers``: wall clock with 1, 2, … workers.
* ``memory``: the peak of a process that preprocesses a corpus and one four times its size.
* ``packing``: 1,000,000 lengths. ``open``: a corpus of 10,000,000 documents. ``fill``: OASST paths at 4,096.

The corpora are those of ``../shared/data``; the tokenizer is Mistral's SentencePiece model from there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from data_tools import oasst
from data_tools.convert import Options, convert
from steerlm_megatron.config.schema import DataConfig
from steerlm_megatron.data.feed.dataset import ShardDataset
from steerlm_megatron.data.feed.packing import pack
from steerlm_megatron.data.shards import ShardWriter
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.data.views import TURN
from steerlm_megatron.data.write.blocks import Block
from steerlm_megatron.data.write.preprocess import preprocess
from steerlm_megatron.steer.records import Conversation, Message, read_json_lines, read_records, write_records
from steerlm_megatron.steer.templates import Template, join

DATA = Path(os.environ.get("STEERLM_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
MODEL = DATA / "mistral_v1.spm.model"
TEMPLATE = Template.from_config({"name": "steerlm", "system": "A chat between a curious user and an assistant."})
SCHEMA = oasst.OASST
CORPORA = {
    "oasst": ("oasst", ["oasst2_subset_trees", "oa_en100_trees"], Options(paths="leaf", valid_fraction=0)),
    "hh": ("hh_rlhf", ["hh_harmless-base_test", "hh_helpful-base_test"], Options(paths="leaf", valid_fraction=0)),
    "topical": (
        "messages",
        ["topical_chat_valid_freq", "topical_chat_valid_rare"],
        Options(map="turns=content,text=message,speaker=agent,id=conversation_id", valid_fraction=0),
    ),
    "dolly": (
        "messages", ["dolly_3k"], Options(map="prompt=instruction,context=input,response=output", valid_fraction=0)
    ),
}  # fmt: skip


def tokenizer() -> Tokenizer:
    return Tokenizer.from_path(MODEL, tuple(dict.fromkeys((*TEMPLATE.control_strings, TEMPLATE.label_marker))))


def together(folder: Path) -> Path:
    """Write all corpora into one file, with the texts of OASST1 in pairs, which alone is large enough for words to
    repeat.
    """
    path = folder / "all.jsonl"
    texts = [row["text"] for _, row in read_json_lines(DATA / "oasst1_en_train_texts.jsonl.zst")]
    pairs = (
        Conversation(f"text{number}", (Message("user", texts[number]), Message("assistant", texts[number + 1])))
        for number in range(0, len(texts) - 1, 2)
        if texts[number + 1].strip()
    )
    others = (
        Conversation(f"{name}-{each.id}", each.messages)
        for name in CORPORA
        for each in read_records(records_of(name, folder))
    )
    write_records(path, chain(pairs, others))
    return path


def records_of(name: str, folder: Path) -> Path:
    """Write a corpus of the shared data as a plain file of records, and return its path."""
    if name == "all":
        return together(folder)
    source, files, options = CORPORA[name]
    inputs = [str(DATA / f"{file}.jsonl.zst") for file in files]
    report = convert(source, inputs, str(folder / name), SCHEMA if source == "oasst" else None, options)
    path = folder / f"{name}.jsonl"
    write_records(path, read_records(report["train"]["file"]))
    return path


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Run ``work`` and return its CPU seconds, including those of children that ended, and its wall seconds."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    work()
    return cpu_seconds() - cpu, time.perf_counter() - wall


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def ours(path: Path, output: Path, workers: int = 1) -> dict[str, Any]:
    cfg = DataConfig(valid_fraction=0, workers=workers)
    return preprocess({"train": [path]}, output, tokenizer(), SCHEMA, TEMPLATE, cfg)


def megatron_way(path: Path, prefix: Path) -> None:
    """Tokenise one line per document, as each worker and the writer of ``tools/preprocess_data.py`` do."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    processor = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(len(processor)))
    with open(path, encoding="utf-8") as file:
        for line in file:
            ids = processor.encode(json.loads(line)["text"])
            builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")


class PooledEncoder:
    """The ``Encoder`` of ``tools/preprocess_data.py``, which lives in the process of a pool."""

    processor: Any = None

    def start(self) -> None:
        PooledEncoder.processor = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))

    def encode(self, line: str) -> tuple[list[int], list[int], int]:
        ids = PooledEncoder.processor.encode(json.loads(line)["text"])
        return ids, [len(ids)], len(line)


def megatron_pool(path: Path, prefix: Path) -> None:
    """Do ``megatron_way`` with the pool that ``tools/preprocess_data.py --workers 1`` makes."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    encoder = PooledEncoder()
    size = len(sentencepiece.SentencePieceProcessor(model_file=str(MODEL)))
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(size))
    with multiprocessing.get_context("fork").Pool(1, initializer=encoder.start) as pool:
        with open(path, encoding="utf-8") as file:
            for ids, lengths, _ in pool.imap(encoder.encode, file, 32):
                builder.add_document(ids, lengths)
        pool.close()
        pool.join()
    builder.finalize(f"{prefix}.idx")


def speed(folder: Path, repeats: int) -> None:
    import megatron.core.datasets.indexed_dataset  # noqa: F401  (the import takes seconds that are not to be measured)

    print(f"\n### Speed, one worker: medians of {repeats} interleaved runs\n")
    heads = "A ours, tokens/s", "B bare encode", "C Megatron-LM's way", "D in its pool", "A/B", "A/C", "A/D"
    print(f"| corpus | conversations | tokens | {' | '.join(heads)} |\n|{'---|' * 10}")
    for name in (*CORPORA, "all"):
        path = records_of(name, folder)
        conversations = list(read_records(path))
        texts = [message.content for conversation in conversations for message in conversation.messages]
        lines = folder / f"{name}.text.jsonl"
        with open(lines, "w", encoding="utf-8") as file:
            for conversation in conversations:
                file.write(json.dumps({"text": join(TEMPLATE.render(conversation, SCHEMA))}) + "\n")
        bare = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))
        runs: dict[str, list[tuple[float, float]]] = {"A": [], "B": [], "C": [], "D": []}
        for turn in range(repeats):
            output = folder / f"{name}.out{turn}"
            runs["A"].append(timed(partial(ours, path, output)))
            runs["B"].append(timed(partial(bare.encode, texts, num_threads=1)))
            runs["C"].append(timed(partial(megatron_way, lines, folder / "c")))
            runs["D"].append(timed(partial(megatron_pool, lines, folder / "d")))
        tokens = ShardDataset.open(folder / f"{name}.out0" / "train").manifest["counts"]["tokens"]
        cells = [rate(tokens, runs[key]) for key in "ABCD"]
        ratios = [ratio(runs[key], runs["A"]) for key in "BCD"]
        print(f"| {name} | {len(conversations):,} | {tokens:,} | {' | '.join([*cells, *ratios])} |", flush=True)


def rate(tokens: int, runs: Sequence[tuple[float, float]]) -> str:
    cpu, wall = (statistics.median(tokens / run[kind] for run in runs) for kind in (0, 1))
    return f"{cpu:,.0f} ({wall:,.0f})"


def ratio(slow: Sequence[tuple[float, float]], fast: Sequence[tuple[float, float]]) -> str:
    each = sorted(a[0] / b[0] for a, b in zip(slow, fast, strict=True))
    return f"{statistics.median(each):.2f} [{each[0]:.2f}–{each[-1]:.2f}]"


def workers(folder: Path, repeats: int) -> None:
    path = grown(folder, 16)
    megabytes, cores = path.stat().st_size / 1e6, os.cpu_count()
    print(f"\n### Workers ({cores} cores, shared), {megabytes:.0f} MB of records: wall seconds, median [range]\n")
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(repeats):
        for count, found in seconds.items():
            output = folder / f"workers{count}.{turn}"
            found.append(timed(partial(ours, path, output, count))[1])
    for count, found in seconds.items():
        print(f"* {count}: {statistics.median(found):.2f} [{min(found):.2f}–{max(found):.2f}]", flush=True)


def grown(folder: Path, times: int) -> Path:
    """Write the records of all corpora ``times`` times, with distinct ids."""
    path = folder / f"grown{times}.jsonl"
    parts = [records_of(name, folder) for name in ("hh", "dolly")]
    write_records(
        path,
        (
            Conversation(f"{turn}-{part.name}-{each.id}", each.messages)
            for turn in range(times)
            for part in parts
            for each in read_records(part)
        ),
    )
    return path


def memory(folder: Path, repeats: int) -> None:
    print("\n### Memory: peak of a whole process, one worker\n")
    for times in (2, 8, 24, 48):
        path = grown(folder, times)
        command = [sys.executable, __file__, "--peak-of", str(path), str(folder / f"peak{times}")]
        peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
        print(f"* {path.stat().st_size / 1e6:.0f} MB of records: {int(peak) / 1024:.0f} MiB", flush=True)


def packing(folder: Path, repeats: int) -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.0, 1_000_000).astype(np.int64), 5, 4096)
    found = sorted(timed(lambda: pack(lengths, 4096, 1))[1] for _ in range(repeats))
    rows = len(pack(lengths, 4096, 1)[0]) - 1
    print(
        f"\n### Packing 1,000,000 lengths: {statistics.median(found):.2f} s [{found[0]:.2f}–{found[-1]:.2f}], "
        f"fill {lengths.sum() / rows / 4096:.4f}"
    )


def opening(folder: Path, repeats: int) -> None:
    count, size = 10_000_000, 4
    with ShardWriter(folder / "many", tokenizer(), SCHEMA, TEMPLATE, 4_000_000) as writer:
        for start in range(0, count, 250_000):
            writer.add_block(synthetic(start, 250_000, size))
        writer.commit({"in": count, "out": count, "skipped": {}}, [])
    found = []
    for _ in range(repeats):
        code = (
            "import sys, time\n"
            "from steerlm_megatron.data.feed.dataset import ShardDataset\nstart = time.perf_counter()\n"
            f"data = ShardDataset.open(sys.argv[1])\nassert len(data) == {count}\n"
            f"data.sample({count // 2}, 'acsft')\nprint(time.perf_counter() - start)"
        )
        command = [sys.executable, "-c", code, str(folder / "many")]
        found.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    print(
        f"\n### Opening 10,000,000 documents and reading one: {statistics.median(found):.3f} s "
        f"[{min(found):.3f}–{max(found):.3f}]"
    )


def synthetic(start: int, count: int, size: int) -> Block:
    turns = np.zeros(count, TURN)
    turns["end"], turns["role"], turns["weight"] = size, 1, 1
    ids = b"".join(b"%08d" % number for number in range(start, start + count))
    each, one = np.full(count, size, np.int32), np.ones(count, np.int32)
    return Block(
        np.full(count * size, 300, np.uint16),
        each,
        turns,
        one,
        np.full((count, len(SCHEMA.names)), 1, np.float32),
        np.tile(np.array([[1, size]], np.int32), (count, 1)),
        one,
        np.zeros((count, 2), np.int32),
        np.frombuffer(ids, np.uint8),
        np.full(count, 8, np.int32),
        np.zeros(count, np.int64),
    )


def fill(folder: Path, repeats: int) -> None:
    print("\n### Fill of OASST paths at 4,096\n")
    for paths in ("leaf", "reply"):
        inputs = [str(DATA / f"{file}.jsonl.zst") for file in CORPORA["oasst"][1]]
        report = convert("oasst", inputs, str(folder / paths), SCHEMA, Options(paths=paths, valid_fraction=0))
        ours(Path(report["train"]["file"]), folder / f"{paths}.shards")
        plan = ShardDataset.open(folder / f"{paths}.shards" / "train").plan("acsft", 4096, 1).report()
        print(f"* paths={paths}: {json.dumps(plan)}", flush=True)


PARTS: dict[str, Callable[[Path, int], None]] = {
    "speed": speed, "workers": workers, "memory": memory, "packing": packing, "open": opening, "fill": fill,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        ours(Path(args.peak_of[0]), Path(args.peak_of[1]))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](Path(folder), args.repeats)


if __name__ == "__main__":
    main()
