"""Measure how a Hugging Face folder becomes the ranks' parts of a model: seconds, bytes, and memory against its bound.

    torchrun --nproc-per-node 4 -m benchmarks.convert [--layout 2x2] [--gb 4] [--rounds 3] [--dir DIR]

``--layout`` is tensor × pipeline. The folder is a Llama's of about ``--gb`` GB in bf16, in shards, with random bytes
that are bf16 numbers; it is made in DIR, whose disk is measured, and removed. The page cache is emptied before a round
where the system lets us (root); else the figure is one of memory and says so. The bound of a rank's private memory is
its part of the model and the largest tensor. A plain read of the same files is measured beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.measure import Spread, commit, machine, markdown
from steerlm_megatron.config.schema import EngineConfig, ParallelConfig
from steerlm_megatron.model.gpt import build_model
from steerlm_megatron.model.hf import HFFolder
from steerlm_megatron.runtime import parallel
from steerlm_megatron.runtime.collectives import barrier, broadcast_object, gather_objects
from steerlm_megatron.runtime.parallel import layout

VOCAB, WIDTH, INNER = 32_000, 2_048, 5_632
LAYER = {
    "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (WIDTH, WIDTH), "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER), "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,),
}  # fmt: skip
LARGEST = 2 * VOCAB * WIDTH  # bytes of the largest tensor


def make(folder: Path, layers: int) -> int:
    """Write the folder, four layers a shard, and return its bytes of tensors."""
    generator = torch.Generator().manual_seed(1)

    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(0.02).bfloat16()

    names = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCAB, WIDTH),
    }
    shards = [dict(names)]
    for start in range(0, layers, 4):
        numbers = range(start, min(layers, start + 4))
        shards.append({f"model.layers.{i}.{name}.weight": shape for i in numbers for name, shape in LAYER.items()})
    index: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: tensor(shape) for name, shape in shard.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        total += sum(t.nbytes for t in tensors.values())
        index |= dict.fromkeys(shard, file)
    head = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(head), encoding="utf-8")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": INNER,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": VOCAB,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    os.sync()
    return total


def forget_files() -> bool:
    """Empty the page cache; return whether that was allowed."""
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1\n", encoding="ascii")
    except OSError:
        return False
    return True


def private_bytes() -> int:
    """Memory of this process that is no file's."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines["RssAnon"].split()[0]) * 1024


def convert(folder: Path, shape: ParallelConfig) -> dict[str, Any]:
    """Fill this rank's part. Collective over the world. Returns seconds, and bytes of part and memory."""
    barrier()
    began = time.perf_counter()
    opened = HFFolder.open(folder, "init_from")
    gpt = build_model(opened.model, shape, EngineConfig(precision="bf16"), VOCAB)
    before = most = private_bytes()
    for parameter, value in opened.weights(gpt, VOCAB):
        with torch.no_grad():
            parameter.copy_(value)
        most = max(most, private_bytes())
    barrier()
    part = sum(parameter.nbytes for parameter in gpt.parameters())
    return {"sec": time.perf_counter() - began, "part": part, "memory": most - before}


def plain_read(folder: Path) -> float:
    """Seconds of reading the files once, in this process."""
    began = time.perf_counter()
    buffer = bytearray(1 << 24)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", default="2x2", help="tensor x pipeline")
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir")
    parser.add_argument("--output", help="a Markdown file to write")
    args = parser.parse_args()
    tensor, pipeline = map(int, args.layout.split("x"))
    shape = ParallelConfig(tensor=tensor, pipeline=pipeline)
    parallel.initialize(shape, 1)
    main_rank = layout().is_main
    of_layer = 2 * sum(torch.Size(one).numel() for one in LAYER.values())
    layers = max(pipeline, round((args.gb * 1e9 - 2 * LARGEST) / of_layer / pipeline) * pipeline)
    folder = Path(broadcast_object(tempfile.mkdtemp(prefix="convert_", dir=args.dir) if main_rank else ""))
    try:
        total = broadcast_object(make(folder, layers) if main_rank else 0)
        rounds, reads, cold = [], [], True
        for _ in range(args.rounds):
            cold = broadcast_object(forget_files() if main_rank else True)
            rounds.append(gather_objects(convert(folder, shape)))
            if main_rank:
                forget_files()
                reads.append(plain_read(folder))
            barrier()
    finally:
        barrier()
        if main_rank:
            shutil.rmtree(folder)
    if main_rank:
        report(args, total, layers, rounds, reads, cold)
    parallel.shutdown()


def report(
    args: argparse.Namespace,
    total: int,
    layers: int,
    rounds: list[list[dict[str, Any]]],
    reads: list[float],
    cold: bool,
) -> None:
    """Print the figures, and write them."""
    seconds = Spread.of([max(rank["sec"] for rank in one) for one in rounds])
    plain = Spread.of(reads)
    over = max((rank["memory"] - rank["part"]) / LARGEST for one in rounds for rank in one)
    parts = [rank["part"] / 1e9 for rank in rounds[-1]]
    rows = [
        ["model", f"{layers} layers, {total / 1e9:.2f} GB in bf16, TP×PP = {args.layout}"],
        ["a rank's part", f"{min(parts):.2f} to {max(parts):.2f} GB"],
        ["seconds, the slowest rank", seconds.text(1)],
        ["GB/s of the files", f"{total / 1e9 / seconds.median:.2f}"],
        ["a plain read of the files, one process", f"{plain.text(1)} s, {total / 1e9 / plain.median:.2f} GB/s"],
        ["files in memory before", "no" if cold else "perhaps: the page cache could not be emptied"],
        ["private memory beyond the part", f"{over:.2f} × the largest tensor ({LARGEST / 1e6:.0f} MB), at most"],
        ["largest resident size of rank 0", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB"],
    ]
    text = "\n".join([
        "# From a Hugging Face folder to ranks", "",
        f"{machine()}; commit {commit()}; `torchrun --nproc-per-node {len(parts)} -m benchmarks.convert --layout "
        f"{args.layout} --gb {args.gb:g} --rounds {args.rounds}`", "", markdown(["", ""], rows), "",
    ])  # fmt: skip
    print(text)
    if args.output:
        Path(args.output).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
