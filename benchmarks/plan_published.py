"""Predicted against published training rates: ``python -m benchmarks.plan_published``, for docs/planner.md.

Figures of other programs, which overlap more or less of their communication and reduce gradients in another precision
than ours; these two are arguments of ``plan/timing.py``. Nothing else is adapted to a row but the two shares of the
peak in ``conf/hardware/h100.yaml`` that say which row they are fitted to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from steerlm_megatron.config.schema import EngineConfig, ModelConfig, ParallelConfig
from steerlm_megatron.plan.hardware import hardware
from steerlm_megatron.plan.timing import step_time
from steerlm_megatron.plan.workload import packed

NEMO = "NVIDIA/NeMo docs/source/performance/performance_summary.md (24.07)"
BRIDGE = "NVIDIA-NeMo/Megatron-Bridge docs/performance-summary-archive.md"
AUTOMODEL = "NVIDIA-NeMo/Automodel docs/performance-summary.mdx"
FOUNDRY = "mosaicml/llm-foundry scripts/train/benchmarking/README.md"
SQUAD = 200  # tokens of a question with its context, about

_MPT: dict[str, Any] = {"activation": "gelu", "norm": "layernorm", "vocab_multiple": 8, "tie_embeddings": True}
MODELS = {
    "Llama-2 7B": (ModelConfig(num_layers=32, hidden_size=4096, num_heads=32, ffn_hidden_size=11008), 32000),
    "Llama-2 13B": (ModelConfig(num_layers=40, hidden_size=5120, num_heads=40, ffn_hidden_size=13824), 32000),
    "Llama-2 70B": (
        ModelConfig(num_layers=80, hidden_size=8192, num_heads=64, num_query_groups=8, ffn_hidden_size=28672), 32000,
    ),
    "Llama-3 8B": (
        ModelConfig(num_layers=32, hidden_size=4096, num_heads=32, num_query_groups=8, ffn_hidden_size=14336), 128256,
    ),
    "Llama-3 70B": (
        ModelConfig(num_layers=80, hidden_size=8192, num_heads=64, num_query_groups=8, ffn_hidden_size=28672), 128256,
    ),
    "Nemotron 22B": (
        ModelConfig(
            num_layers=40, hidden_size=6144, num_heads=48, ffn_hidden_size=24576, activation="squared_relu"
        ), 256000,
    ),
    "MPT-7B": (ModelConfig(num_layers=32, hidden_size=4096, num_heads=32, ffn_hidden_size=16384, **_MPT), 50432),
    "MPT-13B": (ModelConfig(num_layers=40, hidden_size=5120, num_heads=40, ffn_hidden_size=20480, **_MPT), 50432),
    "MPT-30B": (ModelConfig(num_layers=48, hidden_size=7168, num_heads=56, ffn_hidden_size=28672, **_MPT), 50432),
    "MPT-70B": (ModelConfig(num_layers=80, hidden_size=8192, num_heads=64, ffn_hidden_size=32768, **_MPT), 50432),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A published figure. ``sharded``: weights are sharded over data-parallel ranks (FSDP), which our model of ZeRO 3
    stands for; ``again``: with activation checkpointing. ``why``: what a difference above 15 % comes from.
    """

    model: str
    gpus: int
    precision: str
    batch: int
    micro: int
    tokens: int
    tensor: int
    pipeline: int
    context: int
    chunks: int
    rate: int
    source: str
    squad: bool = False
    sharded: bool = False
    again: bool = False
    why: str = ""


def _mpt(model: str, gpus: int, batch: int, micro: int, tokens: int, rate: int, again: bool) -> Row:
    return Row(model, gpus, "bf16", batch, micro, tokens, 1, 1, 1, 1, rate, FOUNDRY, sharded=True, again=again)


ROWS = (
    Row("Llama-2 7B", 8, "fp8", 32, 1, 4096, 1, 1, 1, 1, 17120, NEMO, True,
        why="as fast as its pre-training row below, which has ten times the attention: something else bounds it"),
    Row("Llama-2 13B", 8, "fp8", 32, 1, 4096, 1, 4, 1, 1, 9741, NEMO, True),
    Row("Llama-2 70B", 16, "fp8", 32, 1, 4096, 4, 4, 1, 1, 1833, NEMO, True),
    Row("Llama-3 70B", 32, "fp8", 32, 1, 4096, 4, 4, 1, 5, 1638, BRIDGE + " (26.06)", True),
    Row("Llama-2 7B", 8, "fp8", 128, 1, 4096, 1, 1, 1, 1, 16847, NEMO),
    Row("Llama-2 13B", 16, "fp8", 128, 1, 4096, 1, 4, 1, 10, 8646, NEMO),
    Row("Llama-2 70B", 64, "fp8", 128, 1, 4096, 4, 4, 1, 20, 1707, NEMO),
    Row("Nemotron 22B", 64, "fp8", 256, 2, 4096, 2, 4, 1, 10, 4256, NEMO),
    Row("Llama-3 8B", 8, "fp8", 128, 1, 8192, 1, 1, 2, 1, 12036, NEMO),
    Row("Llama-3 70B", 64, "fp8", 128, 1, 8192, 4, 4, 2, 5, 1533, NEMO),
    Row("Llama-3 70B", 64, "fp8", 128, 1, 8192, 4, 8, 1, 5, 1619, BRIDGE + " (25.09)"),
    Row("Llama-3 8B", 8, "fp8", 128, 1, 8192, 1, 1, 1, 1, 14451, BRIDGE + " (25.11)", sharded=True,
        why="Megatron-FSDP gathers weights beside computing; the model waits for ZeRO 3's"),
    Row("Llama-3 70B", 64, "bf16", 128, 1, 8192, 1, 1, 2, 1, 867, AUTOMODEL, sharded=True),
    _mpt("MPT-7B", 8, 48, 6, 2048, 10643, False),
    _mpt("MPT-7B", 8, 256, 16, 4096, 8611, True),
    _mpt("MPT-13B", 8, 240, 10, 4096, 4717, True),
    _mpt("MPT-13B", 8, 16, 2, 2048, 4792, False),
    _mpt("MPT-13B", 64, 128, 2, 2048, 4800, False),
    _mpt("MPT-30B", 32, 1344, 14, 2048, 2308, True),
    _mpt("MPT-30B", 8, 504, 3, 2048, 2002, True),
    _mpt("MPT-30B", 8, 168, 1, 4096, 1802, True),
    _mpt("MPT-70B", 64, 2048, 8, 2048, 1039, True),
)  # fmt: skip


def predicted(row: Row) -> float:
    """Return tokens per second and GPU, padding included as published rates have it."""
    model, vocab_size = MODELS[row.model]
    virtual = row.chunks if row.chunks > 1 else None
    parallel = ParallelConfig(row.tensor, row.tensor > 1, row.pipeline, virtual, row.context)
    engine = EngineConfig(precision="bf16", recompute="full" if row.again else "none")
    if row.sharded:
        engine = EngineConfig(name="deepspeed", zero_stage=3, precision="bf16", recompute=engine.recompute)
    lengths = np.full(1000, SQUAD if row.squad else row.tokens, np.int64)
    work = packed(lengths, row.tokens, 1.0, None, row.source)
    time = step_time(
        model, parallel, engine, work, hardware("h100"), row.gpus, vocab_size, row.batch, row.micro,
        precision=row.precision, tensor_overlap=0.8, gradient_bytes=2,
    )  # fmt: skip
    return row.batch * row.tokens / time.seconds / row.gpus


def main() -> None:
    """Print a line per row."""
    print("| model | GPUs, layout | | tokens/s/GPU published | predicted | | source |")
    print("|---|---|---|---|---|---|---|")
    for row in ROWS:
        rate = predicted(row)
        layout = f"{row.gpus}, {row.tensor}x{row.pipeline}x{row.context}" + (f" VP{row.chunks}" * (row.chunks > 1))
        kind = "SFT, packed SQuAD" if row.squad else "FSDP" if row.sharded else "pre-training"
        kind = f"{kind}, {row.precision}, {row.tokens}" + (", checkpointing" if row.again else "")
        why = f"; {row.why}" if abs(rate / row.rate - 1) > 0.15 else ""
        print(f"| {row.model} | {layout} | {kind} | {row.rate:,} | {rate:,.0f} | {rate / row.rate - 1:+.1%}{why} | "
              f"{row.source} |")  # fmt: skip


if __name__ == "__main__":
    main()
