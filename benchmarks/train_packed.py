"""Compare training on packed rows with Hugging Face ``transformers``, in useful tokens per second.

    python -m benchmarks.train_packed [--shape 27m] [--dtype fp32] [--task sft|ap] [--rounds 9] [--shards DIR]

Every contestant starts from the same weights and takes an optimizer step (AdamW, fused; clipping) on the same
documents; a step's time is all of it. The peer runs in three configurations: length-sorted padding; pack-512 (documents
cut into rows of 512 that attend across them, which is fast but not the same mathematics); rows of complete documents
with one SDPA call per document. Tokens are counted once per document, padding never. In attribute prediction, a
document's several responses are trained in one pass; the peer, a sequence classifier, sees one sequence per response.
In bf16, ours keeps fp32 main weights and moments; the peer has bf16 ones only, which is less work. Before anything is
timed, the first step's losses of the exact configurations are compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import peers
from benchmarks.measure import Spread, commit, gemm_peak, interleave, machine, markdown, rates, ratio
from benchmarks.peers import Doc
from steerlm_megatron.config.schema import EngineConfig, ModelConfig, OptimConfig, ParallelConfig
from steerlm_megatron.data.batch import RowBatch
from steerlm_megatron.data.feed.collate import collate
from steerlm_megatron.data.feed.dataset import ShardDataset
from steerlm_megatron.data.feed.packing import pack
from steerlm_megatron.data.views import Sample
from steerlm_megatron.model.arithmetic import model_flops
from steerlm_megatron.model.gpt import PackedGPTModel, build_model
from steerlm_megatron.model.weights import initialize
from steerlm_megatron.runtime import parallel
from steerlm_megatron.runtime.device import device, dtype_of, has_cuda
from steerlm_megatron.train.engine_mcore import MegatronEngine
from steerlm_megatron.train.objective import RegressionObjective, TokenObjective

SHAPES = {
    "tiny": ModelConfig(name="tiny", max_position=4096),
    "27m": ModelConfig("27m", num_layers=6, hidden_size=512, num_heads=8, ffn_hidden_size=1408),
    "1b": ModelConfig("1b", num_layers=16, hidden_size=2048, num_heads=32, num_query_groups=8, ffn_hidden_size=8192),
    "3b": ModelConfig("3b", num_layers=28, hidden_size=3072, num_heads=24, num_query_groups=8, ffn_hidden_size=8192),
}
OPTIM = OptimConfig(lr=1e-5, min_lr=1e-5, schedule="constant", warmup_steps=0, weight_decay=0.01)
ATTRIBUTES = ("quality", "toxicity", "humor", "creativity", "violence", "helpfulness", "not_appropriate")


def main() -> None:
    args = _arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    parallel.initialize(ParallelConfig(), seed=0)
    docs, origin = documents(args.shards, args.tokens, args.vocab, args.row_tokens, regression=args.task == "ap")
    steps, losses, flops = contestants(args, docs)
    exact = {name: loss for name, loss in losses.items() if "pack-512" not in name}
    print("first losses: " + ", ".join(f"{name} {loss:.5f}" for name, loss in losses.items()), flush=True)
    low, high = min(exact.values()), max(exact.values())
    if high - low > (1e-4 if args.dtype == "fp32" else 2e-2) * abs(high):
        raise SystemExit("the exact configurations do not compute the same loss: nothing is compared")
    peak = gemm_peak(dtype_of(args.dtype))
    seconds = interleave(steps, args.rounds, warmup=1)
    text = report(args, docs, origin, seconds, flops, peak, {name: losses[name] for name in steps})
    print(text)
    if args.output:
        with open(args.output, "a", encoding="utf-8") as file:
            file.write(text + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="27m")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--task", choices=("sft", "ap"), default="sft")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=16384, help="useful tokens of a step, about")
    parser.add_argument("--row-tokens", type=int, default=2048)
    parser.add_argument("--micro-rows", type=int, default=1, help="rows of a micro-batch; the peer gets as many tokens")
    parser.add_argument("--peer", default="", help="only peers with this in their name, where memory is short")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--shards", help="shard folder whose documents are taken; without it, log-normal lengths")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--output", help="append the report to this file")
    return parser.parse_args()


def documents(shards: str | None, tokens: int, vocab: int, longest: int, regression: bool) -> tuple[list[Doc], str]:
    """Return about ``tokens`` tokens of documents of at most ``longest``, and where their lengths and targets come
    from.
    """
    g = torch.Generator().manual_seed(0)
    out: list[Doc] = []
    if shards:
        data = ShardDataset.open(Path(shards))
        order = np.random.default_rng(0).permutation(len(data))
        samples = (data.sample(int(i), "ap" if regression else "sft", longest, "truncate_left_turns") for i in order)
        shapes = (
            (len(s.tokens_T), torch.from_numpy(np.asarray(s.loss_mask_T)), torch.from_numpy(s.pool_P.astype(np.int64)))
            for s in samples
            if s is not None
        )
    else:
        lengths = np.random.default_rng(0).lognormal(5.2, 0.9, 100_000).clip(16, longest).astype(int)
        shapes = ((int(n), torch.arange(n) >= n // 3, torch.tensor([n - 1])) for n in lengths)
    for size, target, ends in shapes:
        ids = torch.randint(1, vocab, (size,), generator=g)
        out.append(Doc(ids, target.bool(), ends, torch.rand(len(ends), len(ATTRIBUTES), generator=g) * 9))
        if sum(len(d.tokens) for d in out) >= tokens:
            break
    return out, "lengths and targets of OASST shards" if shards else "log-normal lengths (seed 0)"


def our_samples(docs: Sequence[Doc], regression: bool) -> list[Sample]:
    """Return the documents as samples for our collate."""
    samples = []
    for i, doc in enumerate(docs):
        pool = doc.ends.numpy().astype(np.int32) if regression else np.zeros(0, np.int32)
        values = doc.values.numpy() if regression else np.zeros((0, 0), np.float32)
        samples.append(Sample(str(i), doc.tokens.numpy(), doc.target.numpy(), pool, values))
    return samples


def our_batches(docs: Sequence[Doc], row_tokens: int, regression: bool, micro_rows: int = 1) -> list[RowBatch]:
    """Return micro-batches of ``micro_rows`` packed rows, as the loader makes them."""
    samples = our_samples(docs, regression)
    offsets, order = pack(np.array([len(d.tokens) for d in docs]), row_tokens, seed=0)
    rows = [[samples[i] for i in order[a:b]] for a, b in zip(offsets, offsets[1:], strict=False)]
    rows += [[]] * (-len(rows) % micro_rows)
    micro = [rows[i : i + micro_rows] for i in range(0, len(rows), micro_rows)]
    batches = [collate(part, row_tokens, len(ATTRIBUTES) if regression else 0) for part in micro]
    return [batch.pin() for batch in batches] if has_cuda() else batches


def contestants(
    args: argparse.Namespace, docs: Sequence[Doc]
) -> tuple[dict[str, Callable[[], object]], dict[str, float], float]:
    """Return step functions by name, the loss of each one's first step, and the floating-point operations of a step."""
    regression, model = args.task == "ap", SHAPES[args.shape]
    engine = EngineConfig(precision=args.dtype)
    attributes = len(ATTRIBUTES) if regression else None
    ours = initialize(build_model(model, ParallelConfig(), engine, args.vocab, attributes), model, args.vocab, seed=1)
    if regression:
        ours.output_layer.regression.weight.data.normal_(0, 0.02)
    wanted = {name: a for name, a in _PEERS[args.task].items() if args.peer in name}
    if not wanted:
        raise SystemExit(f"--peer {args.peer!r}: none of {', '.join(_PEERS[args.task])}")
    theirs = {name: _peer(ours, model, args, attention) for name, attention in wanted.items()}
    flops = _flops(ours, model, docs, regression)
    objective = RegressionObjective(ATTRIBUTES, {}) if regression else TokenObjective()
    trainer = MegatronEngine([ours], objective, OPTIM, engine, steps=10_000)
    mine = our_batches(docs, args.row_tokens, regression, args.micro_rows)
    steps: dict[str, Callable[[], object]] = {"steerlm_megatron": lambda: float(trainer.train_step(mine).loss)}
    for name, peer in theirs.items():
        batches = [{k: _moved(v) for k, v in b.items()} for b in _peer_batches(name, docs, args, regression)]
        optimizer = torch.optim.AdamW(peer.parameters(), lr=OPTIM.lr, betas=(OPTIM.beta1, OPTIM.beta2),
                                      eps=OPTIM.eps, weight_decay=OPTIM.weight_decay, fused=True)  # fmt: skip
        steps[name] = peers.train_step(peer, optimizer, batches, OPTIM.clip_grad)
    losses = {name: float(step()) for name, step in steps.items()}  # type: ignore[arg-type]
    return steps, losses, flops


# The peer's configurations, with the attention that each uses.
_PEERS = {
    "sft": {
        "transformers, sorted padding": "sdpa",
        "transformers, pack-512": "sdpa",
        "transformers, packed, SDPA per document": "per_document_sdpa",
    },
    "ap": {"transformers, sorted padding": "sdpa"},
}


def _peer(ours: PackedGPTModel, model: ModelConfig, args: argparse.Namespace, attention: str) -> torch.nn.Module:
    if args.dtype == "bf16" and torch.cuda.is_available() and attention == "sdpa":
        attention = _best_cuda_attention()
    peer = peers.llama(model, args.vocab, attention, len(ATTRIBUTES) if args.task == "ap" else None)
    peers.copy_weights(ours, peer, model)
    return peer.to(device(), dtype_of(args.dtype)).train()


def _best_cuda_attention() -> str:
    try:
        import flash_attn  # noqa: F401 — the peer's fastest, where it is installed
    except ImportError:
        return "sdpa"
    return "flash_attention_2"


def _peer_batches(name: str, docs: Sequence[Doc], args: argparse.Namespace, regression: bool) -> list[peers.Batch]:
    slots = args.row_tokens * args.micro_rows
    if "sorted" in name:
        return list(peers.sorted_padding(peers.unrolled(docs) if regression else docs, slots, regression))
    if "pack-512" in name:
        return list(peers.chopped(docs, 512, slots))
    return list(peers.packed(docs, slots))


def _moved(value: object) -> object:
    return value.to(device()) if isinstance(value, torch.Tensor) else value


def _flops(ours: PackedGPTModel, model: ModelConfig, docs: Sequence[Doc], regression: bool) -> float:
    """Return the FLOPs of a step by the exact formula (docs/numerics.md), in which embeddings multiply nothing."""
    skipped = ("embedding.", "output_layer.") if regression else ("embedding.",)
    multiplied = sum(p.numel() for n, p in ours.named_parameters() if p.dim() > 1 and not n.startswith(skipped))
    lengths = [len(doc.tokens) for doc in docs]
    return model_flops(
        multiplied, model.num_layers, model.hidden_size, sum(lengths), float(sum(n * n for n in lengths))
    )


def report(
    args: argparse.Namespace, docs: Sequence[Doc], origin: str, seconds: dict[str, list[float]], flops: float,
    peak: float, losses: dict[str, float],
) -> str:  # fmt: skip
    """Return the section of ``train_packed.md``."""
    useful = sum(len(doc.tokens) for doc in docs)
    ours, *others = seconds
    best = min(others, key=lambda name: Spread.of(seconds[name]).median)
    rows = []
    for name, times in seconds.items():
        share = flops / Spread.of(times).median / peak
        beside = "" if name == ours else ratio(seconds[ours], times).text(2)
        rows.append([name, rates(times, useful).text(), f"{share:.0%}", beside, f"{losses[name]:.4f}"])
    header = ["", "useful tokens/s (quartiles)", "of GEMM peak", "steerlm_megatron is × faster", "first loss"]
    faster = ratio(seconds[ours], seconds[best]).text(2)
    scored = f", {sum(len(doc.ends) for doc in docs)} scored responses" if args.task == "ap" else ""
    return (
        f"### {args.shape}, {args.dtype}, {args.task}\n\n`python -m benchmarks.train_packed --shape {args.shape} "
        f"--dtype {args.dtype} --task {args.task} --rounds {args.rounds} --tokens {args.tokens} "
        f"--row-tokens {args.row_tokens}{f' --micro-rows {args.micro_rows}' if args.micro_rows > 1 else ''}"
        f"{' --shards …' if args.shards else ''}` at {commit()}; {machine()}; "
        f"{len(docs)} documents, {useful:,} tokens a step{scored}, {origin}; GEMM peak {peak / 1e9:,.0f} GFLOP/s.\n\n"
        f"{markdown(header, rows)}\n\n"
        f"Against its best line here ({best.removeprefix('transformers, ')}): **{faster}×**.\n"
    )


if __name__ == "__main__":
    main()
