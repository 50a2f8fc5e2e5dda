"""How long scoring and drawing take, by the rates that a training step's time is made of.

Owns: the two models of time. Does not own: rates (``hardware.py``), the parts of a pass (``timing.py``), counts
(``model/arithmetic.py``). Invariant: both are lower bounds: the host's work between steps, and the latency of
collectives, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from steerlm_megatron.config.schema import EngineConfig, ModelConfig, ParallelConfig
from steerlm_megatron.model.arithmetic import BYTES, kv_cache_bytes, stage_parameters
from steerlm_megatron.plan.hardware import Hardware
from steerlm_megatron.plan.timing import step_time
from steerlm_megatron.plan.workload import Workload


def replicas_of(parallel: ParallelConfig, ranks: int) -> int:
    """Return how many copies of the model draw or score side by side: ranks that share a row in training are copies."""
    return max(1, ranks // (parallel.tensor * parallel.pipeline))


def scoring_seconds(
    model: ModelConfig,
    parallel: ParallelConfig,
    engine: EngineConfig,
    work: Workload,
    gpu: Hardware,
    ranks: int,
    vocab_size: int,
    rows: float,
    head: bool = True,
) -> float:
    """Return the seconds of forward passes over ``rows`` rows like those of ``work``.

    A third of the products, memory traffic and messages of a training step, and 1 of 3.5 parts of its attention
    (arXiv 2307.08691 §4.1). A row is in one pipeline stage at a time, and the other stages wait.
    """
    alone = replace(parallel, context=1, virtual_pipeline=None, data=1)
    plain = replace(engine, name="megatron", recompute="none", offload="none")
    one = step_time(
        model, alone, plain, work, gpu, parallel.tensor * parallel.pipeline, vocab_size, 1, 1, head, tensor_overlap=0.0
    )
    stage = (one.products + one.memory + one.communication) / 3 + one.attention / 3.5
    return rows / replicas_of(parallel, ranks) * parallel.pipeline * stage


@dataclass(frozen=True)
class Drawing:
    """The time of drawing: ``batch`` sequences of a replica at a time, ``token_seconds`` for a token of each."""

    batch: int
    token_seconds: float
    seconds: float


def drawing_time(
    model: ModelConfig,
    parallel: ParallelConfig,
    engine: EngineConfig,
    gpu: Hardware,
    ranks: int,
    vocab_size: int,
    sequences: float,
    prompt: float,
    response: float,
    max_batch: int,
    memory_fraction: float = 0.9,
) -> Drawing:
    """Return the time of drawing ``sequences`` responses of ``response`` tokens to prompts of ``prompt`` tokens.

    A step gives every sequence of a batch a token. It takes the longer of reading (a stage's weights once, and the keys
    and values of the batch, arXiv 1911.02150 §2.4) and of its products, 2·P·B; stages take turns. Prompts take their
    products. A batch is ``max_batch`` sequences, or as many as have room beside the weights.
    """
    precision, alone = engine.precision, replace(parallel, context=1, virtual_pipeline=None)
    last = stage_parameters(model, alone, parallel.pipeline - 1, vocab_size)
    weights = last * BYTES[precision]
    longest = kv_cache_bytes(model, alone, round(prompt + response), precision)
    room = max(0.0, memory_fraction * gpu.memory - weights)
    replicas = replicas_of(parallel, ranks)
    batch = int(max(1, min(max_batch, room // max(1, longest), -(-sequences // replicas))))
    cached = kv_cache_bytes(model, alone, round(batch * (prompt + response / 2)), precision)
    read = (weights + cached) / (1e9 * gpu.memory_gb_per_sec * gpu.memory_share)
    rate = gpu.product_rate(precision)
    token = parallel.pipeline * max(read, 2 * last * batch / rate)
    prompts = parallel.pipeline * 2 * last * prompt * batch / rate
    return Drawing(batch, token, sequences / replicas / batch * (response * token + prompts))
