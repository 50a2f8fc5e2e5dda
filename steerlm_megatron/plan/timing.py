"""How long a step takes: products, attention, memory traffic, links, and idle stages, one after the other.

Owns: the model of time, of both engines. Does not own: rates (``hardware.py``), counts (``model/arithmetic.py``).
Invariant: a time is an amount by a rate; what is overlapped is said where it is left out. ``docs/planner.md`` compares
it with published figures.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from steerlm_megatron.config.schema import EngineConfig, ModelConfig, ParallelConfig
from steerlm_megatron.model.arithmetic import (
    BYTES,
    Widths,
    bubble,
    layer_parameters,
    model_flops,
    multiplied_parameters,
    padded_vocab_size,
    stage_layers,
    stage_parameters,
)
from steerlm_megatron.plan.hardware import Hardware
from steerlm_megatron.plan.workload import Workload

_ATTENTION_BACKWARD = 2.5  # products of its backward pass to those of its forward pass (arXiv 2307.08691 §4.1)
_OPTIMIZER_BYTES = 30  # AdamW per parameter: reads and writes 3 fp32 numbers, reads the gradient, writes a bf16 weight
_HOST_RATE = 2e10  # bytes per second of a rank's share of the host's memory, an assumption
_LOSS_PASSES = 6  # over the logits: written, read twice forward, read and written backward, read by the product


@dataclass(frozen=True)
class Link:
    """What a rank sends over one kind of link in a step, and how long that takes by itself."""

    over: str
    bytes: float
    seconds: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what it is spent on; they add up to ``seconds``. ``tokens``: useful ones of all ranks."""

    products: float
    attention: float
    memory: float
    communication: float
    idle: float
    reduction: float
    optimizer: float
    host: float
    micro_batches: int
    rows: int
    tokens: float
    flops: float
    links: dict[str, Link] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return (
            self.products + self.attention + self.memory + self.communication + self.idle + self.reduction
            + self.optimizer + self.host
        )  # fmt: skip


def step_time(
    model: ModelConfig,
    parallel: ParallelConfig,
    engine: EngineConfig,
    work: Workload,
    gpu: Hardware,
    ranks: int,
    vocab_size: int,
    rows_per_step: int,
    micro_rows: int = 1,
    head: bool = False,
    precision: str | None = None,
    trained: float = 1.0,
    tensor_overlap: float = 0.25,
    gradient_bytes: int = 4,
) -> StepTime:
    """Return the time of one optimizer step on ``ranks`` GPUs.

    * Products: 2·P·T operations forward and twice that backward, of them ``trained`` for weights; once more forward
      with full recomputation (arXiv 2205.05198 §5). Padding is computed like any token.
    * Attention: 2·N·H·Σs² forward (causal), 2.5 times that backward.
    * Memory: norms, residuals, RoPE, the activation and the loss read and write tensors at the memory's rate.
    * Tensor parallelism: four gathers or scatters of T·D a layer and pass (arXiv 2205.05198 §4.2.2), of which
      ``tensor_overlap`` are beside products (here, a gradient's beside that of the weights).
    * Context parallelism: keys and values of the row, forward and back.
    * Pipelines: activations between stages, and (p - 1) / (v·m) of the work idle (arXiv 2104.04473 §2.2).
    * Data parallelism: gradients of ``gradient_bytes`` scattered and weights gathered, (d - 1)/d of each
      (arXiv 1910.02054 §7), beside the last micro-batch's backward and the next forward pass; what is longer than these
      is waited for. ZeRO 3 gathers weights in both passes of each micro-batch, and all of it is waited for. Between
      nodes, the members of a group on a node share their network ports.
    """
    d = ranks // (parallel.tensor * parallel.pipeline * parallel.context)
    micro_rows = min(micro_rows, max(1, -(-rows_per_step // d)))
    step = _Step(
        model, parallel, engine, work, gpu, ranks, vocab_size, head, trained, micro_rows,
        micro_batches=-(-rows_per_step // (d * micro_rows)),
    )  # fmt: skip
    products, attention, memory = step.products(precision), step.attention(), step.memory()
    waited, computing = step.waited(tensor_overlap), products + attention + memory
    reduction = step.reduction(gradient_bytes, computing)
    optimizer, host = step.optimizer()
    m, useful = step.micro_batches, rows_per_step * work.tokens
    multiplied, width = multiplied_parameters(model, vocab_size, head), step.widths.N * step.widths.H
    flops = model_flops(multiplied, model.num_layers, width, 1, work.squares / work.tokens)
    return StepTime(
        products=products * m,
        attention=attention * m,
        memory=memory * m,
        communication=waited * m,
        idle=bubble(parallel.pipeline, parallel.virtual_pipeline or 1, m) * (computing + waited) * m,
        reduction=reduction,
        optimizer=optimizer,
        host=host,
        micro_batches=m,
        rows=rows_per_step,
        tokens=useful,
        flops=flops * useful,
        links=step.links,
    )


@dataclass
class _Step:
    """The parts of :func:`step_time`, in seconds of a micro-batch of the slowest stage, which has the output layer."""

    model: ModelConfig
    parallel: ParallelConfig
    engine: EngineConfig
    work: Workload
    gpu: Hardware
    ranks: int
    vocab_size: int
    head: bool
    trained: float
    micro_rows: int
    micro_batches: int
    links: dict[str, Link] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.widths, self.size = Widths.of(self.model), BYTES[self.engine.precision]
        self.layers = stage_layers(self.model, self.parallel)
        self.tokens = self.micro_rows * self.work.row_tokens / self.parallel.context
        self.targets = self.micro_rows * self.work.targets / self.parallel.context
        self.again = 1.0 if self.engine.recompute == "full" else 0.0  # forward passes for the backward pass
        self.group = self.ranks // (self.parallel.tensor * self.parallel.pipeline)  # ranks with the same parameters
        self.rate = 1e9 * self.gpu.memory_gb_per_sec * self.gpu.memory_share
        rows = padded_vocab_size(self.vocab_size, self.model.vocab_multiple, self.parallel.tensor)
        self.output = 0 if self.head else self.widths.D * rows // self.parallel.tensor

    @property
    def _zero(self) -> int:
        return self.engine.zero_stage if self.engine.name == "deepspeed" else 0

    @property
    def _split(self) -> int:
        """Ranks over which what lies between the layers is split."""
        return self.parallel.tensor if self.parallel.sequence else 1

    def _parameters(self, stage: int) -> int:
        return stage_parameters(self.model, self.parallel, stage, self.vocab_size, 1 if self.head else None)

    def products(self, precision: str | None) -> float:
        per_layer, gpu = layer_parameters(self.model, self.parallel.tensor), self.gpu
        passes = 1 + 1 + self.trained + self.again
        layers = (
            2 * self.layers * per_layer * self.tokens * passes / gpu.product_rate(precision or self.engine.precision)
        )
        return layers + 2 * self.output * self.targets * 3 / gpu.product_rate(self.engine.precision)

    def attention(self) -> float:
        w, squares = self.widths, self.micro_rows * self.work.squares / self.parallel.context
        passes = 1 + _ATTENTION_BACKWARD + max(self.again, self.engine.recompute != "none")
        scores = 2 * self.layers * w.N * w.H / self.parallel.tensor * squares * passes
        return scores / (self.gpu.peak(self.engine.precision) * self.gpu.attention_share)

    def memory(self) -> float:
        w = self.widths
        touched = 10 * w.D / self._split + (4 * w.H * (w.N + w.G) + w.mlp_in + w.F) / self.parallel.tensor
        layers = self.layers * touched * self.tokens * self.size * (3 + self.again)
        return (layers + _LOSS_PASSES * self.targets * self.output / w.D * self.size) / self.rate

    def _link(self, stride: int, members: int) -> tuple[str, float]:
        """Return the link, and its rate, of a group of ``members`` ranks that are ``stride`` apart."""
        gpu = self.gpu
        inside, between = (1e9 * x * gpu.link_share for x in (gpu.link_gb_per_sec, gpu.network_gb_per_sec))
        if stride * members <= gpu.gpus_per_node:
            return "NVLink", inside
        return "network", min(inside, between * max(1, gpu.gpus_per_node // stride))

    def _send(self, name: str, amount: float, stride: int, members: int) -> float:
        """Note ``amount`` bytes a micro-batch, and return their time."""
        over, speed = self._link(stride, members)
        self.links[name] = Link(over, amount * self.micro_batches, amount * self.micro_batches / speed)
        return amount / speed

    def waited(self, tensor_overlap: float) -> float:
        """Return how long products wait for tensors from other ranks."""
        w, p, waited = self.widths, self.parallel, 0.0
        if p.tensor > 1:
            one = self.tokens * w.D * self.size * (p.tensor - 1) / p.tensor
            times = 8 + (1 if p.sequence else 0) + 4 * self.again
            waited += self._send("tensor", self.layers * one * times, 1, p.tensor) * (1 - tensor_overlap)
        if p.context > 1:
            row = self.micro_rows * self.work.row_tokens
            one = 2 * row * w.G * w.H / p.tensor * self.size * (p.context - 1) / p.context
            waited += self._send("context", self.layers * one * (2 + self.again), p.tensor, p.context)
        if p.pipeline > 1:
            amount = 2 * self.tokens * w.D / self._split * self.size * (p.virtual_pipeline or 1)
            waited += self._send("pipeline", amount, self.ranks // p.pipeline, 2)
        return waited

    def reduction(self, gradient_bytes: int, computing: float) -> float:
        """Return how long a step waits for gradients and weights of other ranks, beside ``computing`` seconds."""
        if self.group == 1:
            return 0.0
        share, parameters = (self.group - 1) / self.group, self._parameters(self.parallel.pipeline - 1)
        over, speed = self._link(self.parallel.tensor, self.group)
        gathers = (2 + self.again) * self.micro_batches if self._zero == 3 else 1
        reduces = self.micro_batches if self._zero > 1 else 1
        scattered = parameters * self.trained * gradient_bytes * share * reduces
        gathered = parameters * self.size * share * gathers
        self.links["data"] = Link(over, scattered + gathered, (scattered + gathered) / speed)
        return max(0.0, (scattered + gathered) / speed - (0.0 if self._zero == 3 else computing))

    def optimizer(self) -> tuple[float, float]:
        """Return the seconds of an update on the GPU, and on the host where the optimizer is offloaded."""
        own = self._parameters(0) * self.trained / self.group
        if self.engine.name != "deepspeed" or self.engine.offload == "none":
            return own * _OPTIMIZER_BYTES / self.rate, 0.0
        bus, moved = 1e9 * self.gpu.host_gb_per_sec, own * (4 + self.size)
        if self.engine.offload == "all":
            moved += self._parameters(self.parallel.pipeline - 1) * self.size / self.group * 2 * self.micro_batches
        self.links["host"] = Link("PCIe", moved, moved / bus)
        return 0.0, moved / bus + own * _OPTIMIZER_BYTES / _HOST_RATE
