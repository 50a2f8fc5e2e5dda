"""A plan as text and as plain data.

Owns: what is said of a plan, in which order, and units. Does not own: any figure of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from steerlm_megatron.plan.hardware import Hardware
from steerlm_megatron.plan.memory import GIB, RESERVED
from steerlm_megatron.plan.methods import Method, table
from steerlm_megatron.plan.timing import StepTime
from steerlm_megatron.plan.workload import Workload


@dataclass
class Stage:
    """Bytes of a rank of one pipeline stage. ``traced``: activations are those of the real modules, run on ``meta``."""

    stage: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    host: int
    traced: bool

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


@dataclass(frozen=True)
class StepCost:
    """What a step of ``run`` costs: ``tokens`` and ``flops`` of all GPUs, ``seconds`` of wall time. ``work``: what it
    has a model do, in words.
    """

    step: str
    work: str
    tokens: float
    flops: float
    seconds: float


@dataclass
class Plan:
    """What ``steerlm plan`` says. Bytes, seconds; ``notes`` are sentences."""

    command: str
    layout: str
    ranks: int
    hardware: Hardware
    stages: list[Stage]
    work: Workload | None = None
    time: StepTime | None = None
    steps: int | None = None
    checkpoint_bytes: int = 0
    checkpoint_seconds: float = 0.0
    proposals: list[dict[str, Any]] = field(default_factory=list)
    fallen: Mapping[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    steps_of_run: list[StepCost] = field(default_factory=list)
    methods: list[Method] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """Bytes of the fullest stage with what a process takes beside tensors."""
        return max(stage.total for stage in self.stages) + RESERVED

    @property
    def lacking(self) -> str | None:
        """What there is no room for, in words; None if all fits."""
        return None if self.fits else f"{self.peak / GIB:.1f} GiB of {self.hardware.memory / GIB:.1f}"

    @property
    def fits(self) -> bool:
        return self.peak <= self.hardware.memory

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        out = asdict(self)
        out["fits"], out["peak_bytes"] = self.fits, self.peak
        out["methods"] = [method.to_dict() for method in self.methods]
        for stage, plain in zip(self.stages, out["stages"], strict=True):
            plain["total"] = stage.total
        if self.time is not None:
            out["time"]["seconds"] = self.time.seconds
            out["time"] |= self.rates()
        return out

    def rates(self) -> dict[str, float]:
        """Return what follows from the time of a step; hours where the number of steps is known."""
        assert self.time is not None
        seconds, peak = self.time.seconds, self.hardware.peak("bf16")
        rates = {
            "tokens_per_sec": self.time.tokens / seconds,
            "tokens_per_sec_per_gpu": self.time.tokens / seconds / self.ranks,
            "mfu": self.time.flops / seconds / (self.ranks * peak),
        }
        if self.steps is not None:
            rates["hours"] = self.steps * seconds / 3600
            rates["gpu_hours"] = rates["hours"] * self.ranks
        return rates


def text(plan: Plan) -> str:
    """Return the plan for a terminal."""
    gpu = plan.hardware
    lines = [
        f"{plan.command} on {plan.ranks} x {gpu.name} ({gpu.memory / GIB:.1f} GiB): {plan.layout}",
        "",
        "memory of a rank, GiB",
        *aligned(
            ("stage", "parameters", "weights", "gradients", "optimizer", "activations", "of it logits", "buffers",
             "total", "pinned host"),
            [
                (str(s.stage), f"{s.parameters:,}", *(_gib(x) for x in (
                    s.weights, s.gradients, s.optimizer, s.activations, s.logits, s.buffers, s.total, s.host)))
                for s in plan.stages
            ],
        ),
        f"{'fits' if plan.fits else 'DOES NOT FIT'}: {_gib(plan.peak)} of {gpu.memory / GIB:.1f} GiB with "
        f"{_gib(RESERVED)} for CUDA, NCCL and the allocator",
    ]  # fmt: skip
    if plan.checkpoint_bytes:
        lines.append(
            f"checkpoint: {_gib(plan.checkpoint_bytes)} GiB, written in {plan.checkpoint_seconds:.0f} s at "
            f"{gpu.disk_gb_per_sec:g} GB/s a node"
        )
    if plan.time is not None and plan.work is not None:
        lines += ["", *_time(plan, plan.time, plan.work)]
    if plan.steps_of_run:
        lines += ["", *_steps(plan)]
    if plan.methods:
        header, rows = table(plan.methods)
        lines += ["", "by count of passes, each of one sequence", *aligned(header, rows, words=3)]
    if plan.proposals:
        lines += ["", "fastest layouts that fit", *aligned(
            ("s/step", "tokens/s", "MFU", "GiB", "overrides"),
            [(f"{p['seconds']:.3g}", f"{p['tokens_per_sec']:,.0f}", f"{p['mfu']:.1%}", _gib(p["bytes"]), p["overrides"])
             for p in plan.proposals],
        )]  # fmt: skip
    if plan.fallen:
        lines += ["", "others fall:", *(f"  {count:>5}  {why}" for why, count in
                                         sorted(plan.fallen.items(), key=lambda item: -item[1]))]  # fmt: skip
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def _time(plan: Plan, time: StepTime, work: Workload) -> Iterable[str]:
    rates, seconds = plan.rates(), time.seconds
    yield (
        f"a step: {seconds:.3g} s for {time.rows} rows of {work.row_tokens} tokens (fill {work.fill:.3f}) in "
        f"{time.micro_batches} micro-batches; {rates['tokens_per_sec']:,.0f} tokens/s, "
        f"{rates['tokens_per_sec_per_gpu']:,.0f} a GPU, MFU {rates['mfu']:.1%}"
    )
    parts = (
        ("products", time.products), ("attention", time.attention), ("memory traffic", time.memory),
        ("waiting for tensor, context and pipeline ranks", time.communication), ("idle stages", time.idle),
        ("gradients and weights beyond what overlaps", time.reduction), ("optimizer", time.optimizer),
        ("host", time.host),
    )  # fmt: skip
    yield "  " + ", ".join(f"{name} {value / seconds:.0%}" for name, value in parts if value / seconds >= 0.005)
    for name, link in time.links.items():
        yield f"  {name}: {_gib(int(link.bytes))} GiB a rank and step over {link.over}, {link.seconds:.3g} s"
    if plan.steps is not None:
        yield (
            f"{plan.steps} steps: {rates['hours']:.3g} hours, {rates['gpu_hours']:,.1f} GPU-hours "
            f"(documents: {work.source})"
        )


def _steps(plan: Plan) -> Iterable[str]:
    """Yield the table of the steps of a run, and their sum."""
    costs = plan.steps_of_run
    whole = StepCost("all", "", *(sum(getattr(one, name) for one in costs) for name in ("tokens", "flops", "seconds")))
    yield f"what the steps of run cost on {plan.ranks} x {plan.hardware.name}"
    yield from aligned(
        ("step", "work", "tokens", "FLOP", "hours", "GPU-hours", "FLOP/s a GPU"),
        [
            (
                one.step, one.work, f"{one.tokens:,.0f}", f"{one.flops:.3g}", f"{one.seconds / 3600:.3g}",
                f"{one.seconds / 3600 * plan.ranks:.3g}", f"{one.flops / one.seconds / plan.ranks:.3g}",
            )
            for one in [*costs, whole]
        ],
        words=2,
    )  # fmt: skip


def _gib(size: int | float) -> str:
    return f"{size / GIB:.2f}"


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 0) -> list[str]:
    """Return the lines of a table whose first ``words`` columns stand left, and numbers right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    last = len(head) - 1
    return [
        "  "
        + "  ".join(
            f"{cell:{'<' if i < words else '>'}{widths[i]}}" if i < last or len(head) > 6 else cell
            for i, cell in enumerate(row)
        )
        for row in (head, *rows)
    ]
