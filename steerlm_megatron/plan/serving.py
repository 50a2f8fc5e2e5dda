"""What a command that scores or draws takes of memory and time, before it runs: its plan, as text and as plain data.

Owns: the bytes of a rank, how many sequences its key/value cache holds, layouts that fit, what is said of them. Does
not own: formulas (``model/arithmetic.py``), times (``inference.py``), where the model's shape is from
(``stages/plan_serving.py``). Invariants: importing this module needs no torch; the cache is as large as the engine
makes it (``generate/cache_size.py``) on a GPU that has nothing else in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from steerlm_megatron.config.inference import GenerationConfig
from steerlm_megatron.config.schema import EngineConfig, ModelConfig, ParallelConfig
from steerlm_megatron.model.arithmetic import BYTES, Widths, kv_cache_bytes, stage_parameters
from steerlm_megatron.plan.hardware import Hardware
from steerlm_megatron.plan.inference import drawing_time, replicas_of, scoring_seconds
from steerlm_megatron.plan.memory import GIB, RESERVED
from steerlm_megatron.plan.report import aligned
from steerlm_megatron.plan.workload import Workload


@dataclass(frozen=True)
class Task:
    """What is asked of a model.

    Args:
        command: of ``steerlm``.
        draws: whether responses are drawn; else they are scored.
        sequences: of all of the work; None: unknown.
        prompt: tokens of a prompt, and ``response`` of a response, on average.
        pass_tokens: most tokens of a pass.
        outputs: tokens of a pass that have logits.
        generation: limits of drawing.
        workload: rows that are scored; None for drawing.
    """

    command: str
    draws: bool
    sequences: int | None
    prompt: float
    response: float
    pass_tokens: int
    outputs: int
    generation: GenerationConfig
    workload: Workload | None = None


@dataclass(frozen=True)
class Net:
    """A model whose shape alone is known; ``attributes`` of its regression head, None for a language model."""

    model: ModelConfig
    vocab_size: int
    attributes: int | None = None


@dataclass(frozen=True)
class Stage:
    """Bytes of a rank of one pipeline stage: ``cache`` of keys and values, ``work`` of a forward pass."""

    stage: int
    parameters: int
    weights: int
    cache: int
    work: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.work


@dataclass
class ServingPlan:
    """What ``steerlm plan`` says of a command that draws or scores. Bytes, seconds; ``notes`` are sentences.

    Args:
        blocks: of the cache, each of ``block_tokens`` slots; 0 for scoring.
        sequence: tokens of the longest sequence; ``holds`` of these have room at once.
        batch: sequences that are drawn together; ``step_seconds`` for a token of each.
        tokens_per_sec: of all replicas.
        seconds: of all of the work; None: not known how much there is.
    """

    task: Task
    layout: str
    ranks: int
    replicas: int
    hardware: Hardware
    stages: list[Stage]
    blocks: int = 0
    sequence: int = 0
    holds: int = 0
    batch: int = 0
    step_seconds: float = 0.0
    tokens_per_sec: float = 0.0
    seconds: float | None = None
    proposals: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """Bytes of the fullest stage with what a process takes beside tensors."""
        return max(stage.total for stage in self.stages) + RESERVED

    @property
    def lacking(self) -> str | None:
        """What there is no room for, in words; None if all fits: where responses are drawn, one sequence at least."""
        if self.peak > self.hardware.memory:
            return f"{self.peak / GIB:.1f} GiB of {self.hardware.memory / GIB:.1f}"
        if self.task.draws and not self.holds:
            return (
                f"generation.memory_fraction={self.task.generation.memory_fraction:g} of what is left beside the model "
                f"holds no sequence of {self.sequence:,} tokens"
            )
        return None

    @property
    def fits(self) -> bool:
        return self.lacking is None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        out = asdict(self)
        out |= {"command": self.task.command, "fits": self.fits, "peak_bytes": self.peak}
        for stage, plain in zip(self.stages, out["stages"], strict=True):
            plain["total"] = stage.total
        return out

    def text(self) -> str:
        """Return the plan for a terminal."""
        return "\n".join(_lines(self))


# Bytes that a forward pass takes beside weights and cache, on one of so many tensor-parallel ranks, and whether of the
# last stage, which has the output.
Work = Callable[[int, bool], int]


def serving_plan(
    net: Net, task: Task, parallel: ParallelConfig, engine: EngineConfig, gpu: Hardware, ranks: int, work_of: Work
) -> ServingPlan:
    """Return the plan of ``task`` on ``ranks`` GPUs, which hold as many replicas of the model as there is room for."""
    alone = replace(parallel, context=1, virtual_pipeline=None, data=None, sequence=False)
    model, precision = net.model, engine.precision
    bare = []
    for number in range(alone.pipeline):
        parameters = stage_parameters(model, alone, number, net.vocab_size, net.attributes)
        work = work_of(alone.tensor, number == alone.pipeline - 1)
        bare.append(Stage(number, parameters, parameters * BYTES[precision], 0, work))
    made = ServingPlan(
        task, _words(alone, engine, replicas_of(alone, ranks)), ranks, replicas_of(alone, ranks), gpu, bare
    )
    if task.draws:
        _add_cache(made, net, alone, precision)
        if made.fits:
            _add_drawing(made, net, alone, engine)
    else:
        assert task.workload is not None
        made.step_seconds = scoring_seconds(
            model, alone, engine, task.workload, gpu, ranks, net.vocab_size, made.replicas, net.attributes is not None
        )
        made.tokens_per_sec = made.replicas * task.workload.tokens / made.step_seconds
        if task.sequences is not None:
            made.seconds = task.sequences * (task.prompt + task.response) / made.tokens_per_sec
    return made


def _add_cache(made: ServingPlan, net: Net, parallel: ParallelConfig, precision: str) -> None:
    """Put the key/value cache into a plan, as large as the engine makes it."""
    wanted, size = made.task.generation, made.task.generation.block_tokens
    made.sequence = min(wanted.max_sequence_tokens, net.model.max_position)
    needed = -(-made.sequence // size)
    block = kv_cache_bytes(net.model, parallel, size, precision)
    # The engine looks at what is free before its first pass, of which memory_fraction leaves the room.
    free = made.hardware.memory - RESERVED - max(stage.weights for stage in made.stages)
    fitting = max(0, int(free * wanted.memory_fraction) // block)
    if wanted.max_cache_tokens is not None:
        made.blocks = max(-(-wanted.max_cache_tokens // size), needed)
    else:
        made.blocks = min(wanted.max_batch * needed, fitting)
    made.holds = made.blocks // needed
    made.stages = [replace(stage, cache=made.blocks * block) for stage in made.stages]


def _add_drawing(made: ServingPlan, net: Net, parallel: ParallelConfig, engine: EngineConfig) -> None:
    task, limits = made.task, made.task.generation
    many = float(task.sequences or made.replicas * limits.max_batch)
    time = drawing_time(
        net.model, parallel, engine, made.hardware, made.ranks, net.vocab_size, many, task.prompt, task.response,
        min(limits.max_batch, made.blocks * limits.block_tokens // max(1, round(task.prompt + task.response / 2))),
        limits.memory_fraction,
    )  # fmt: skip
    made.batch, made.step_seconds = time.batch, time.token_seconds
    made.tokens_per_sec = many * task.response / time.seconds
    made.seconds = None if task.sequences is None else time.seconds


def layouts(
    net: Net, task: Task, parallel: ParallelConfig, engine: EngineConfig, gpu: Hardware, ranks: int, work_of: Work
) -> Iterator[tuple[ParallelConfig, ServingPlan]]:
    """Yield all ways to spread a model over at most ``ranks`` GPUs, with the plan of each: ways in which tensor
    parallelism stays in a node and divides heads, and pipeline stages divide layers.
    """
    w = Widths.of(net.model)
    for tensor in range(1, min(ranks, gpu.gpus_per_node) + 1):
        if any(count % tensor for count in (w.N, w.G, w.F)) or gpu.gpus_per_node % tensor:
            continue
        for pipeline in range(1, ranks // tensor + 1):
            if w.L % pipeline or ranks % (tensor * pipeline):
                continue
            changed = replace(
                parallel, tensor=tensor, pipeline=pipeline, context=1, virtual_pipeline=None, data=None, sequence=False
            )
            yield changed, serving_plan(net, task, changed, engine, gpu, ranks, work_of)


def propose(made: ServingPlan, found: Iterable[tuple[ParallelConfig, ServingPlan]], top: int, asked: bool) -> None:
    """Add to a plan the ``top`` layouts that fit and give most tokens a second (``asked``), or, to a plan that does not
    fit, the fastest that does.
    """
    fitting = sorted(((p, one) for p, one in found if one.fits), key=_rank)
    if asked:
        made.proposals = [
            {"overrides": _overrides(p), "tokens_per_sec": one.tokens_per_sec, "step_seconds": one.step_seconds,
             "holds": one.holds, "bytes": one.peak}
            for p, one in fitting[:top]
        ]  # fmt: skip
    if not made.fits:
        near = f"this fits: {_overrides(fitting[0][0])}" if fitting else f"no layout of {made.ranks} GPUs fits"
        made.notes.append(near)


def _rank(pair: tuple[ParallelConfig, ServingPlan]) -> tuple[int, int]:
    """Return the place of a layout: of such as are within 3 % of each other, the one with fewer messages goes first,
    since their latency is not in the time.
    """
    parallel, plan = pair
    return -round(math.log(plan.tokens_per_sec) / 0.03), parallel.tensor * parallel.pipeline


def _overrides(parallel: ParallelConfig) -> str:
    return f"parallel.tensor={parallel.tensor} parallel.pipeline={parallel.pipeline}"


def _words(parallel: ParallelConfig, engine: EngineConfig, replicas: int) -> str:
    copies = f"{replicas} replica{'s' if replicas > 1 else ''}"
    return f"tensor {parallel.tensor}, pipeline {parallel.pipeline}, {copies}; {engine.precision}"


def _lines(plan: ServingPlan) -> Iterator[str]:
    gpu, task, limits = plan.hardware, plan.task, plan.task.generation
    yield f"{task.command} on {plan.ranks} x {gpu.name} ({gpu.memory / GIB:.1f} GiB): {plan.layout}"
    yield ""
    yield "memory of a rank, GiB"
    yield from aligned(
        ("stage", "parameters", "weights", "key/value cache", "a pass", "total"),
        [
            (str(s.stage), f"{s.parameters:,}", *(f"{x / GIB:.2f}" for x in (s.weights, s.cache, s.work, s.total)))
            for s in plan.stages
        ],
    )
    yield (
        f"{'fits' if plan.fits else 'DOES NOT FIT'}: {plan.peak / GIB:.2f} of {gpu.memory / GIB:.1f} GiB with "
        f"{RESERVED / GIB:.2f} for CUDA, NCCL and the allocator"
    )
    if task.draws:
        yield (
            f"key/value cache: {plan.blocks:,} blocks of {limits.block_tokens} tokens, for {plan.holds} sequences of "
            f"{plan.sequence:,} tokens at once (generation.max_batch={limits.max_batch})"
        )
    if plan.step_seconds:
        yield ""
        yield from _rates(plan)
    if plan.proposals:
        yield ""
        yield "fastest layouts that fit"
        yield from aligned(
            ("tokens/s", "ms a pass", "sequences", "GiB", "overrides"),
            [
                (f"{p['tokens_per_sec']:,.0f}", f"{1e3 * p['step_seconds']:.3g}", str(p["holds"] or "–"),
                 f"{p['bytes'] / GIB:.2f}", p["overrides"])
                for p in plan.proposals
            ],
        )  # fmt: skip
    yield from (f"note: {note}" for note in plan.notes)


def _rates(plan: ServingPlan) -> Iterator[str]:
    task = plan.task
    if task.draws:
        yield (
            f"a step: {1e3 * plan.step_seconds:.3g} ms for a token of each of {plan.batch} sequences; "
            f"{plan.tokens_per_sec:,.0f} tokens/s in all, prompts included in the time"
        )
    else:
        yield (
            f"a pass: {1e3 * plan.step_seconds:.3g} ms for {task.pass_tokens:,} tokens; "
            f"{plan.tokens_per_sec:,.0f} tokens/s in all"
        )
    if plan.seconds is not None:
        hours = plan.seconds / 3600
        what = f"responses of {task.response:,.0f} tokens to prompts of {task.prompt:,.0f}"
        if not task.draws:
            what = f"conversations of {task.prompt + task.response:,.0f} tokens"
        yield f"{task.sequences:,} {what}: {hours:.3g} hours, {hours * plan.ranks:,.3g} GPU-hours"
