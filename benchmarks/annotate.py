"""Compare scoring of responses with Hugging Face ``LlamaForSequenceClassification``, in samples per second.

    python -m benchmarks.annotate [--shape 27m] [--dtype fp32] [--rounds 9] [--shards DIR] [--output FILE.md]

Both start from token ids and the same weights and end with float values on the CPU. Ours packs complete documents into
rows, as ``steerlm annotate`` does, and scores all responses of a conversation in one pass; the peer, a sequence
classifier, gets one sequence per response, in batches sorted by length and padded. Of several batch sizes its best
counts. Before anything is timed, the values are compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import peers
from benchmarks.measure import Spread, commit, interleave, machine, markdown, rates, ratio
from benchmarks.peers import Doc
from benchmarks.train_packed import ATTRIBUTES, SHAPES, documents, our_samples
from steerlm_megatron.config.schema import EngineConfig, ParallelConfig
from steerlm_megatron.data.feed.collate import collate
from steerlm_megatron.model.gpt import PackedGPTModel, build_model
from steerlm_megatron.model.predict import predict_values
from steerlm_megatron.model.weights import initialize
from steerlm_megatron.runtime import parallel
from steerlm_megatron.runtime.device import device, dtype_of
from steerlm_megatron.stages.scoring import default_batch_tokens, rows_by_length

OURS = "steerlm_megatron"


def main() -> None:
    args = _arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    parallel.initialize(ParallelConfig(), seed=0)
    docs, origin = documents(args.shards, args.tokens, args.vocab, args.longest, regression=True)
    runs = contestants(args, docs)
    values = {name: run() for name, run in runs.items()}
    tolerance = 1e-3 if args.dtype == "fp32" else 0.2
    for name, found in values.items():
        worst = float(np.abs(found - values[OURS]).max())
        print(f"{name}: values differ by at most {worst:.1e}", flush=True)
        if worst > tolerance:
            raise SystemExit(f"{name} does not compute the same values: nothing is compared")
    seconds = interleave(runs, args.rounds, warmup=1)
    text = report(args, docs, origin, seconds)
    print(text)
    if args.output:
        with open(args.output, "a", encoding="utf-8") as file:
            file.write(text + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="27m")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of all documents, about")
    parser.add_argument("--longest", type=int, default=2048, help="longest document, in tokens")
    parser.add_argument("--batch-tokens", type=int, default=default_batch_tokens(), help="ours: scoring.batch_tokens")
    parser.add_argument(
        "--slots", type=int, nargs="+", default=[1024, 2048, 8192], help="the peer's batch sizes, in tokens"
    )
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--shards", help="shard folder whose documents are taken; without it, log-normal lengths")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--output", help="append the report to this file")
    return parser.parse_args()


def contestants(args: argparse.Namespace, docs: Sequence[Doc]) -> dict[str, Callable[[], np.ndarray]]:
    """Return functions by name that score all documents as float32 [responses, A] in the order of ``docs``."""
    model = SHAPES[args.shape]
    engine = EngineConfig(precision=args.dtype)
    ours = initialize(
        build_model(model, ParallelConfig(), engine, args.vocab, len(ATTRIBUTES)), model, args.vocab, seed=1
    )
    ours.output_layer.regression.weight.data.normal_(0, 0.02)
    peer = peers.llama(model, args.vocab, "sdpa", len(ATTRIBUTES))
    peers.copy_weights(ours, peer, model)
    ours.to(dtype_of(args.dtype)).eval()
    peer.to(device(), dtype_of(args.dtype)).eval()
    alone = peers.unrolled(docs)
    runs: dict[str, Callable[[], np.ndarray]] = {OURS: lambda: _ours(ours, docs, args.batch_tokens)}
    for slots in args.slots:
        runs[f"transformers, sorted, {slots:,} tokens a batch"] = partial(_theirs, peer, alone, slots)
    return runs


@torch.inference_mode()
def _ours(model: PackedGPTModel, docs: Sequence[Doc], batch_tokens: int) -> np.ndarray:
    samples = our_samples(docs, regression=True)
    lengths = [len(doc.tokens) for doc in docs]
    firsts = np.cumsum([0, *(len(doc.ends) for doc in docs)])
    out = np.empty((firsts[-1], len(ATTRIBUTES)), np.float32)
    for members in rows_by_length(lengths, batch_tokens):
        total = sum(lengths[i] for i in members)
        values = predict_values(model, collate([[samples[i] for i in members]], total, len(ATTRIBUTES)))
        assert values is not None
        out[np.concatenate([np.arange(firsts[i], firsts[i + 1]) for i in members])] = values.numpy()
    return out


@torch.inference_mode()
def _theirs(model: Any, docs: Sequence[Doc], slots: int) -> np.ndarray:
    parts = []
    for batch in peers.sorted_padding(docs, slots, regression=True):
        ids, mask = batch["input_ids"].to(device()), batch["attention_mask"].to(device())
        hidden_BSD = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        parts.append(model.score(hidden_BSD[torch.arange(len(ids)), batch["ends"]]).float().cpu())
    out = np.empty((len(docs), len(ATTRIBUTES)), np.float32)
    out[sorted(range(len(docs)), key=lambda i: len(docs[i].tokens))] = torch.cat(parts).numpy()
    return out


def report(args: argparse.Namespace, docs: Sequence[Doc], origin: str, seconds: dict[str, list[float]]) -> str:
    """Return the section of ``annotate.md``."""
    useful = sum(len(doc.tokens) for doc in docs)
    responses = sum(len(doc.ends) for doc in docs)
    best = min((name for name in seconds if name != OURS), key=lambda name: Spread.of(seconds[name]).median)
    rows = [
        [
            name, rates(times, responses).text(1), rates(times, useful).text(),
            "" if name == OURS else ratio(seconds[OURS], times).text(2),
        ]
        for name, times in seconds.items()
    ]  # fmt: skip
    header = ["", "responses/s (quartiles)", "useful tokens/s", "steerlm_megatron is × faster"]
    faster = ratio(seconds[OURS], seconds[best]).text(2)
    return (
        f"### {args.shape}, {args.dtype}\n\n`python -m benchmarks.annotate --shape {args.shape} --dtype {args.dtype} "
        f"--rounds {args.rounds} --tokens {args.tokens} --batch-tokens {args.batch_tokens}"
        f"{' --shards …' if args.shards else ''}` at {commit()}; {machine()}; "
        f"{len(docs)} conversations with {responses} responses, {useful:,} tokens, {origin}.\n\n"
        f"{markdown(header, rows)}\n\n"
        f"Against its best line here ({best.removeprefix('transformers, ')}): **{faster}×**.\n"
    )


if __name__ == "__main__":
    main()
