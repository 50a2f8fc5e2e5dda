"""Predicted against measured memory: ``python -m benchmarks.plan_memory [CASE ...]``, for docs/planner.md.

Every case is trained for one step on real ranks (gloo, CPU), where each rank counts the bytes of its weights, gradients
and optimizer, and of all other tensors at their peak. Beside that stands what ``plan/trace.py`` says of the same rank
without computing anything (of DeepSpeed's engine: activations alone, and the formulas of ``model/arithmetic.py``).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from steerlm_megatron.config.schema import Config, EngineConfig, ModelConfig, OptimConfig, ParallelConfig
from steerlm_megatron.data.batch import RowBatch
from steerlm_megatron.model.arithmetic import zero_buffers
from steerlm_megatron.model.gpt import build_model
from steerlm_megatron.plan.memory import layout_of, stage_memory
from steerlm_megatron.plan.trace import Held, batch_of, held_by, tensors_of, trace
from steerlm_megatron.plan.tracker import Tracker, storages
from steerlm_megatron.runtime import parallel
from steerlm_megatron.stages.train import engine_of
from steerlm_megatron.train.objective import TokenObjective
from tests.helpers.dist import run_ranks

VOCAB, ROW_TOKENS, MICRO_BATCHES, LENGTHS, SHARE = 2000, 1024, 4, (600, 300, 100), 0.5
MODEL = ModelConfig(hidden_size=256, num_layers=8, num_heads=8, num_query_groups=4, ffn_hidden_size=704)


@dataclass(frozen=True)
class Case:
    """One small run: its layout, its engine, and how many ranks it has."""

    ranks: int = 1
    layout: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(precision="bf16"))
    model: ModelConfig = field(default_factory=lambda: MODEL)

    @property
    def config(self) -> Config:
        config = Config(command="train_sft", model=self.model, parallel=self.layout, engine=self.engine)
        config.train.row_tokens, config.model.max_position = ROW_TOKENS, ROW_TOKENS
        return config

    @property
    def micro_batches(self) -> int:
        p = self.layout
        return MICRO_BATCHES // max(1, self.ranks // (p.tensor * p.pipeline * p.context))


def _zero(stage: int, **more: Any) -> EngineConfig:
    return EngineConfig(name="deepspeed", zero_stage=stage, precision="bf16", **more)


CASES = {
    "1 rank, fp32": Case(engine=EngineConfig(precision="fp32")),
    "1 rank": Case(),
    "recompute=selective": Case(engine=EngineConfig(precision="bf16", recompute="selective")),
    "recompute=full": Case(engine=EngineConfig(precision="bf16", recompute="full")),
    "data 2": Case(2),
    "tensor 2": Case(2, ParallelConfig(tensor=2)),
    "tensor 2, sequence": Case(2, ParallelConfig(tensor=2, sequence=True)),
    "pipeline 2": Case(2, ParallelConfig(pipeline=2)),
    "pipeline 2 x 2": Case(2, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    "context 2": Case(2, ParallelConfig(context=2)),
    "tensor 2, sequence, pipeline 2": Case(4, ParallelConfig(tensor=2, sequence=True, pipeline=2)),
    "data 2, tensor 2, recompute=full": Case(
        4, ParallelConfig(tensor=2), EngineConfig(precision="bf16", recompute="full")
    ),
    "data 2, ZeRO 1": Case(2, engine=_zero(1)),
    "data 2, ZeRO 2": Case(2, engine=_zero(2)),
    "data 2, ZeRO 3": Case(2, engine=_zero(3)),
}


def batch() -> RowBatch:
    """The micro-batch of every case, with half of its tokens trained."""
    return batch_of(LENGTHS, 1, ROW_TOKENS, share=SHARE)


def measure(case: Case) -> Held:
    """What this rank really holds, and the peak of its other tensors in a step. Collective over the world."""
    layout = parallel.initialize(case.layout, 1)
    count = case.layout.virtual_pipeline or 1
    chunks = [
        build_model(case.model, case.layout, case.engine, VOCAB, vp_stage=i if count > 1 else None)
        for i in range(count)
    ]
    for chunk in chunks:
        for parameter in chunk.parameters():
            torch.nn.init.zeros_(parameter)
    engine: Any = engine_of(case.engine)(chunks, TokenObjective(), OptimConfig(), case.engine, 1)
    batches = [batch().part(layout.cp_rank, layout.cp_size)] * case.micro_batches
    if case.engine.name == "deepspeed":
        held, known = held_by_zero(engine)
        with Tracker(known) as tracker:
            engine.train_step(batches)
        held.activations = tracker.peak  # ZeRO's gradients among them, which come and go
        return held
    held = held_by(engine)
    with Tracker(tensors_of(engine)) as tracker:
        for wrapped in engine.chunks:
            wrapped.train()
            wrapped.zero_grad_buffer()
        engine._run(batches, forward_only=False)
    held.activations = tracker.peak
    return held


def held_by_zero(engine: Any) -> tuple[Held, list[torch.Tensor]]:
    """Weights and optimizer of a DeepSpeed engine, and all tensors that it holds before a step."""
    parameters = list(engine.parameters.values())
    weights = [p.ds_tensor if engine.stage == 3 else p for p in parameters]
    masters = list(engine._partitions())
    moments = [t for p in masters for t in engine.adam.state[p].values() if isinstance(t, torch.Tensor)]
    held = Held(
        parameters=sum(engine.shapes[name].numel() for name in engine.parameters),
        weights=sum(storages(weights).values()),
        optimizer=sum(storages([*masters, *moments]).values()),
    )
    known = [*weights, *masters, *moments, *parameters, *(p.grad for p in parameters if p.grad is not None)]
    return held, known


def predict(case: Case, rank: int) -> Held:
    """What the plan says of the same rank. In a process that has no groups."""
    if case.engine.name == "deepspeed":
        run = layout_of(case.config, case.ranks, VOCAB)
        stage = stage_memory(case.config, run, 0)
        buffers = zero_buffers(case.engine, stage.parameters, stage.trainable, overlap=False)  # as on CPUs
        plain = replace(case, engine=replace(case.engine, name="megatron"))
        return Held(
            parameters=stage.parameters, weights=stage.state.weights, gradients=stage.state.gradients,
            optimizer=stage.state.optimizer, activations=predict(plain, rank).activations + buffers,
        )  # fmt: skip
    batches = [batch()] * case.micro_batches
    return trace(case.config, TokenObjective(), VOCAB, None, batches, "cpu", rank, case.ranks)


def main(names: list[str]) -> None:
    """Print a line per case and kind of rank."""
    print("| run | rank | weights | gradients | optimizer | peak, predicted | peak, measured | |")
    print("|---|---|---|---|---|---|---|---|")
    for name, case in CASES.items():
        if names and name not in names:
            continue
        found = run_ranks(case.ranks, measure, case)
        for rank in (0,) if case.layout.pipeline == 1 else (0, case.ranks - 1):
            (said,) = run_ranks(1, predict, case, rank)
            real = found[rank]
            cells = [_cell(getattr(said, key), getattr(real, key)) for key in ("weights", "gradients", "optimizer")]
            if not real.gradients:
                cells[1] = "in the peak"
            peaks = f"{said.peak:,} | {real.peak:,} | {said.peak / real.peak - 1:+.1%}"
            print(f"| {name} | {rank} | {' | '.join(cells)} | {peaks} |", flush=True)


def _cell(said: int, real: int) -> str:
    """Return the measured bytes, and the predicted ones if these differ."""
    return f"{real:,}" if said == real else f"{real:,} (predicted {said:,})"


if __name__ == "__main__":
    main(sys.argv[1:])
