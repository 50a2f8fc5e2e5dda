"""The fastest layouts of so many GPUs, and why the others fall.

Owns: going through layouts, their order, the reasons. Does not own: whether one fits (``memory.py``) or how long it
takes (``timing.py``).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace

from steerlm_megatron.config.schema import Config
from steerlm_megatron.plan.hardware import Hardware
from steerlm_megatron.plan.memory import GIB, RESERVED, Layout, StageMemory, candidates, largest, why_illegal
from steerlm_megatron.plan.timing import StepTime, step_time
from steerlm_megatron.plan.workload import Workload


@dataclass(frozen=True)
class Proposal:
    """A layout that fits, with its fullest stage and its step."""

    config: Config
    memory: StageMemory
    time: StepTime


@dataclass(frozen=True)
class Found:
    """Proposals, fastest first, and how many layouts fell for each reason."""

    proposals: list[Proposal]
    fallen: Counter[str]
    tried: int


def search(config: Config, gpu: Hardware, work: Workload, ranks: int, vocab_size: int, attributes: int | None) -> Found:
    """Return the layouts of ``ranks`` GPUs that fit, fastest first.

    A step keeps its rows: with more data-parallel ranks than rows, some would compute padding, and such a layout falls.
    """
    rows = work.rows_per_step(config.train.global_batch_samples)
    fallen: Counter[str] = Counter()
    found: list[Proposal] = []
    tried = 0
    for changed in candidates(config, ranks, gpu.gpus_per_node, chunks=True):
        tried += 1
        p, micro = changed.parallel, changed.train.micro_batch_rows
        if said := why_illegal(changed, ranks):
            fallen[_rule(said)] += 1
            continue
        data = ranks // (p.tensor * p.pipeline * p.context)
        if data > rows:
            fallen[f"more replicas than the {rows} rows of a step"] += 1
            continue
        count = -(-rows // (data * min(micro, -(-rows // data))))
        if (p.virtual_pipeline or 1) > 1 and count < p.pipeline:
            fallen["fewer micro-batches than interleaved stages take in a round"] += 1
            continue
        run = Layout(ranks, vocab_size, attributes, count, work.most_targets * micro)
        memory = largest(changed, run)
        if memory.total + RESERVED > gpu.memory:
            fallen[_too_large(memory, gpu)] += 1
            continue
        if memory.state.host * gpu.gpus_per_node > 1e9 * gpu.host_memory_gb:
            fallen["offloaded state beyond the host's memory"] += 1
            continue
        time = step_time(
            changed.model, p, changed.engine, work, gpu, ranks, vocab_size, rows, micro, attributes is not None
        )
        found.append(Proposal(replace(changed), memory, time))
    found.sort(key=lambda one: one.time.seconds)
    if found:
        fallen["slower than the proposals"] = max(0, len(found) - config.plan.top)
    return Found(found[: config.plan.top], +fallen, tried)


def _rule(said: str) -> str:
    """Return the rule of an error without the layout's own numbers, so that layouts fall for it together."""
    return re.sub(r"=[^ ;]+", "", said.split(";")[0]).strip()


def _too_large(memory: StageMemory, gpu: Hardware) -> str:
    room = gpu.memory - RESERVED
    if memory.state.total > room:
        return f"weights, gradients and optimizer alone take more than {room / GIB:.0f} GiB"
    return f"activations beside weights, gradients and optimizer take more than {room / GIB:.0f} GiB"
