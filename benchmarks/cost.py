"""What the steps of a run cost on this machine, and what the passes of published runs come to, for cost.md.

    python -m benchmarks.cost [--shape 1m 27m] [--steps 8] [--output FILE.md]    # runs all four steps of SteerLM
    python -m benchmarks.cost --published                                        # computes nothing but counts

A run is ``steerlm run experiment=quickstart`` in a process of its own, with another model and few steps; every figure
is of the ``summary.json`` of its steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import commit, machine, markdown
from benchmarks.plan_published import MODELS
from steerlm_megatron.plan.methods import Method, Net, Texts, dpo, ppo, scored, trained

# The shapes of benchmarks/train_packed.py and benchmarks/sample.py, all with the embedded corpus's vocabulary of 640.
SHAPES: dict[str, tuple[str, ...]] = {
    "1m": (),
    "27m": ("model.num_layers=6", "model.hidden_size=512", "model.num_heads=8", "model.ffn_hidden_size=1408"),
    "135m": (
        "model.num_layers=30", "model.hidden_size=576", "model.num_heads=9", "model.num_query_groups=3",
        "model.ffn_hidden_size=1536",
    ),
}  # fmt: skip
RUN = (
    "experiment=quickstart", "train.validate_rows=2", "evaluate.max_prompts=2", "evaluate.levels=[0,4]",
    "evaluate.examples=1", "tracking=none",
)  # fmt: skip

A100, SHARE = 312e12, 0.4  # FLOP/s of BF16 by the data sheet, and what of it training is taken to reach
# GPU-hours of Table 6 in arXiv 2311.09528 (Llama-2 70B, 32 nodes of 8 A100).
PUBLISHED = {"SFT": 1024.0, "SteerLM": 1536.0, "DPO": 2048.0, "PPO": 7168.0}


def main() -> None:
    """Run what the command line asks for, and print or append the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["1m", "27m"])
    parser.add_argument("--steps", type=int, default=8, help="of each training")
    parser.add_argument("--samples", type=int, default=16, help="of a step (train.global_batch_samples)")
    parser.add_argument("--conversations", type=int, default=400, help="of the corpus")
    parser.add_argument("--prompts", type=int, default=16, help="of bootstrapping")
    parser.add_argument("--published", action="store_true", help="print the comparison with published GPU-hours alone")
    parser.add_argument("--output", help="append the tables to this file")
    args = parser.parse_args()
    if args.published:
        texts = [published()]
    else:
        texts = [measured(shape, args) for shape in args.shape]
    for text in texts:
        print(text, flush=True)
        if args.output:
            with open(args.output, "a", encoding="utf-8") as file:
                file.write(f"{text}\n")


def measured(shape: str, args: argparse.Namespace) -> str:
    """Return the section of a run of this shape."""
    overrides = (
        *RUN, *SHAPES[shape], f"train.steps={args.steps}", f"train.global_batch_samples={args.samples}",
        f"data.demo_conversations={args.conversations}", f"bootstrap.prompts={args.prompts}",
    )  # fmt: skip
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="cost_") as folder:
        command = [sys.executable, "-m", "steerlm_megatron", "run", *overrides, f"run_dir={folder}/run"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        cost = json.loads((Path(folder) / "run" / "summary.json").read_text(encoding="utf-8"))["cost"]
    rows = [_row(name, one) for name, one in [*cost["steps"].items(), ("all", cost)]]
    header = [
        "step", "device-s", "of it work", "useful tokens", "drawn", "FLOP by formula", "GFLOP/s",
        "peak memory, GiB", "latency p50, p95",
    ]  # fmt: skip
    return (
        f"### {shape}\n\n`steerlm run {' '.join(overrides)}` at {commit()}; {machine()}; load before and after: "
        f"{before:.1f}, {os.getloadavg()[0]:.1f}.\n\n{markdown(header, rows)}\n"
    )


def _row(name: str, cost: Mapping[str, Any]) -> list[str]:
    rate, latency = cost["flops_per_device_sec"], cost["latency_sec"] or {}
    quantiles = [latency[key] for key in ("p50", "p95") if latency.get(key) is not None]
    return [
        name,
        f"{cost['device_sec']:,.1f}",
        f"{cost['work_device_sec']:,.1f}",
        f"{cost['useful_tokens']:,}",
        f"{cost['tokens'].get('drawn', 0):,}",
        f"{cost['flops']:.3g}",
        "" if rate is None else f"{rate / 1e9:.1f}",
        f"{cost['peak_memory_gib']:.2f}",
        ", ".join(f"{seconds:.2f} s" for seconds in quantiles),
    ]


def helpsteer() -> list[Method]:
    """Return the passes of the runs in Table 6 of arXiv 2311.09528, as far as the paper says them (§4.4, §4.5).

    SFT and ACSFT take 800 steps of 128 samples; the predictor is a 13B model with as many; DPO sees HH-RLHF's 160,800
    pairs once; PPO takes 800 steps of 512 rollouts with the 13B reward model that NVIDIA released with it
    (NV-Llama2-13B-RLHF-RM), from which a critic of the same size starts. Lengths are not published: OASST samples are
    taken to have 800 tokens, HH-RLHF's prompts and responses 200 each.
    """
    policy = Net("70B", *MODELS["Llama-2 70B"])
    predictor, critic, reward = (Net(name, *MODELS["Llama-2 13B"], head=True) for name in ("13B", "critic", "reward"))
    steps = Texts(800 * 128, 400, 400)
    pairs, rollouts = Texts(160_800, 200, 200), Texts(800 * 512, 200, 200)
    sft = trained("SFT", policy, steps, 1, "arXiv 2311.09528 §4.5")
    steered = (
        trained("attribute prediction", predictor, steps, 1, "arXiv 2311.09528 §4.4"),
        scored("annotation", predictor, Texts(56_000, 400, 400), "arXiv 2311.09528 §4.4"),
        trained("attribute-conditioned SFT", policy, steps, 1, "arXiv 2311.09528 §4.4"),
    )
    return [
        Method("SFT", (sft,)),
        Method("SteerLM", steered),
        Method("DPO", dpo(policy, steps, pairs, sft_epochs=1).passes[1:]),
        Method("PPO", ppo(policy, critic, reward, steps, pairs, rollouts, sft_epochs=1).passes[1:]),
    ]


def published() -> str:
    """Return the table of published GPU-hours beside those of the passes, without the SFT before DPO and PPO."""
    methods = {method.name: method for method in helpsteer()}
    base = methods["SFT"].flops
    rows = [
        [
            name,
            f"{method.flops:.3g}",
            f"{method.flops / (A100 * SHARE) / 3600:,.0f}",
            f"{PUBLISHED[name]:,.0f}",
            f"{method.flops / base:.1f}",
            f"{PUBLISHED[name] / PUBLISHED['SFT']:.1f}",
            f"{method.flops / (PUBLISHED[name] * 3600) / A100:.1%}",
        ]
        for name, method in methods.items()
    ]
    header = [
        "run", "FLOP by passes", "A100-hours at 40 %", "published", "to SFT, by passes", "to SFT, published",
        "of the peak, if both are right",
    ]  # fmt: skip
    return markdown(header, rows) + "\n"


if __name__ == "__main__":
    main()
