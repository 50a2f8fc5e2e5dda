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
    w, size, t, c = Widths.of(model), BYTES[engine.precision], parallel.tensor, parallel.context
    d = ranks // (t * parallel.pipeline * c)
    micro_rows = min(micro_rows, max(1, -(-rows_per_step // d)))
    m = -(-rows_per_step // (d * micro_rows))
    layers, T = stage_layers(model, parallel), micro_rows * work.row_tokens / c
    squares, targets = micro_rows * work.squares, micro_rows * work.targets / c
    again = {"full": 1.0, "selective": 0.0, "none": 0.0}[engine.recompute]
    last = parallel.pipeline - 1
    # the slowest stage is the one that has the output layer
    per_layer = layer_parameters(model, t)
    output = 0 if head else w.D * padded_vocab_size(vocab_size, model.vocab_multiple, t) // t
    passes = 1 + 1 + trained + again
    products = 2 * layers * per_layer * T * passes / gpu.product_rate(precision or engine.precision)
    products += 2 * output * targets * 3 / gpu.product_rate(engine.precision)
    scores = (
        2 * layers * w.N * w.H / t * squares / c * (1 + _ATTENTION_BACKWARD + max(again, engine.recompute != "none"))
    )
    attention = scores / (gpu.peak(engine.precision) * gpu.attention_share)
    rate = 1e9 * gpu.memory_gb_per_sec * gpu.memory_share
    s = t if parallel.sequence else 1
    touched = 10 * w.D / s + (4 * w.H * (w.N + w.G) + w.mlp_in + w.F) / t
    memory = layers * touched * T * size * (3 + again) / rate
    memory += 0 if head else _LOSS_PASSES * targets * output / w.D * size / rate
    inside, between = (1e9 * x * gpu.link_share for x in (gpu.link_gb_per_sec, gpu.network_gb_per_sec))
    links: dict[str, Link] = {}
    waited = 0.0

    def link(stride: int, members: int) -> tuple[str, float]:
        """Return the link, and its rate, of a group of ``members`` ranks that are ``stride`` apart."""
        if stride * members <= gpu.gpus_per_node:
            return "NVLink", inside
        return "network", min(inside, between * max(1, gpu.gpus_per_node // stride))

    def send(name: str, amount: float, stride: int, members: int) -> float:
        """Note ``amount`` bytes a micro-batch, and return their time."""
        over, speed = link(stride, members)
        links[name] = Link(over, amount * m, amount * m / speed)
        return amount / speed

    if t > 1:
        one = T * w.D * size * (t - 1) / t
        times = 8 + (1 if parallel.sequence else 0) + 4 * again
        waited += send("tensor", layers * one * times, 1, t) * (1 - tensor_overlap)
    if c > 1:
        one = 2 * micro_rows * work.row_tokens * w.G * w.H / t * size * (c - 1) / c
        waited += send("context", layers * one * (2 + again), t, c)
    if parallel.pipeline > 1:
        chunks = parallel.virtual_pipeline or 1
        waited += send("pipeline", 2 * T * w.D / s * size * chunks, ranks // parallel.pipeline, 2)
    zero3 = engine.name == "deepspeed" and engine.zero_stage == 3
    parameters = stage_parameters(model, parallel, last, vocab_size, 1 if head else None)
    reduction = 0.0
    group = d * c
    if group > 1:
        share = (group - 1) / group
        over, speed = link(t, group)
        gathers = (2 + again) * m if zero3 else 1
        reduces = m if engine.name == "deepspeed" and engine.zero_stage > 1 else 1
        scattered = parameters * trained * gradient_bytes * share * reduces
        gathered = parameters * size * share * gathers
        links["data"] = Link(over, scattered + gathered, (scattered + gathered) / speed)
        hidden = 0.0 if zero3 else products + attention + memory
        reduction = max(0.0, (scattered + gathered) / speed - hidden)
    own = stage_parameters(model, parallel, 0, vocab_size, 1 if head else None) * trained / group
    optimizer, host = own * _OPTIMIZER_BYTES / rate, 0.0
    if engine.name == "deepspeed" and engine.offload != "none":
        moved = own * (4 + size)
        host = moved / (1e9 * gpu.host_gb_per_sec) + own * _OPTIMIZER_BYTES / (2e10)  # 20 GB/s of a CPU core's share
        optimizer = 0.0
        links["host"] = Link("PCIe", moved, moved / (1e9 * gpu.host_gb_per_sec))
        if engine.offload == "all":
            fetched = parameters * size / group * 2 * m
            host += fetched / (1e9 * gpu.host_gb_per_sec)
            links["host"] = Link("PCIe", moved + fetched, (moved + fetched) / (1e9 * gpu.host_gb_per_sec))
    idle = bubble(parallel.pipeline, parallel.virtual_pipeline or 1, m) * (products + attention + memory + waited) * m
    useful = rows_per_step * work.tokens
    flops = model_flops(
        multiplied_parameters(model, vocab_size, head), model.num_layers, w.N * w.H, 1, work.squares / work.tokens
    )
    return StepTime(
        products=products * m,
        attention=attention * m,
        memory=memory * m,
        communication=waited * m,
        idle=idle,
        reduction=reduction,
        optimizer=optimizer,
        host=host,
        micro_batches=m,
        rows=rows_per_step,
        tokens=useful,
        flops=flops * useful,
        links=links,
    )
