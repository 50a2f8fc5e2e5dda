"""Whether a layout fits: bytes of every pipeline stage in closed form, and the layouts that do fit.

Owns: :func:`stage_memory`, the check before training and its message, neighbours of a layout. Does not own: formulas
(``model/arithmetic.py``), the real engine's bytes (``trace.py``), time (``timing.py``). Invariants: importing this
module needs no torch, and a check takes milliseconds; its figures are within some percent of the trace's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from steerlm_megatron.config.load import finalize, head_values, lays_out_training
from steerlm_megatron.config.schema import Config, ParallelConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.model.arithmetic import (
    Rows,
    State,
    activations,
    peak_activations,
    stage_parameters,
    state_bytes,
    zero_buffers,
)
from steerlm_megatron.plan.hardware import hardware

# A process on a GPU takes this beside tensors: CUDA's context and kernels, NCCL's buffers, the allocator's remains.
RESERVED = 2_000_000_000
GIB = 2**30


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of a pipeline stage at the peak of a step."""

    stage: int
    parameters: int
    trainable: int
    state: State
    activations: int
    logits: int
    buffers: int

    @property
    def total(self) -> int:
        """Bytes of tensors on the device."""
        return self.state.total + self.activations + self.buffers


@dataclass(frozen=True)
class Layout:
    """What the formulas need to know of a run: its ranks, its vocabulary, and a micro-batch. ``least``: only what is
    certain is counted, for a check that refuses nothing that fits.
    """

    ranks: int
    vocab_size: int
    attributes: int | None
    micro_batches: int
    targets: int
    least: bool = False

    def data(self, parallel: ParallelConfig) -> int:
        return max(1, self.ranks // (parallel.tensor * parallel.pipeline * parallel.context))


def stage_memory(config: Config, run: Layout, stage: int) -> StageMemory:
    """Return the bytes of a rank of ``stage``."""
    model, parallel, engine = config.model, config.parallel, config.engine
    head = run.attributes is not None
    parameters = stage_parameters(model, parallel, stage, run.vocab_size, run.attributes)
    trainable = parameters
    if config.train.trainable != "all":  # some adapters or the head: next to nothing beside the weights
        last = stage == parallel.pipeline - 1
        trainable = (run.attributes or 0) * (model.hidden_size + 1) if last else 0
    state = state_bytes(engine, parameters, trainable, run.data(parallel) * parallel.context)
    rows = config.train.micro_batch_rows
    batch = Rows(rows * config.train.row_tokens, min(run.targets, rows * config.train.row_tokens))
    kept = 0
    one = activations(model, parallel, engine, batch, run.vocab_size, head)
    if trainable == parameters:
        kept = peak_activations(model, parallel, engine, batch, stage, run.micro_batches, run.vocab_size, head)
    elif config.train.trainable == "head":
        kept = one.work  # nothing is kept of a frozen model
    buffers = 0
    if engine.name == "deepspeed" and trainable:
        buffers = zero_buffers(engine, parameters, trainable, least=run.least)
    logits = one.logits if stage == parallel.pipeline - 1 else 0
    return StageMemory(stage, parameters, trainable, state, kept, logits, buffers)


def largest(config: Config, run: Layout) -> StageMemory:
    """Return the stage that takes most."""
    return max((stage_memory(config, run, stage) for stage in range(config.parallel.pipeline)), key=lambda s: s.total)


def layout_of(
    config: Config,
    ranks: int,
    vocab_size: int,
    attributes: int | None = None,
    samples_per_row: float = 1.0,
    targets: int | None = None,
    least: bool = False,
) -> Layout:
    """Return what the formulas need. ``targets``: most tokens with loss in a row; None: all of them. ``least``: see
    :class:`Layout`.
    """
    p, t = config.parallel, config.train
    data = max(1, ranks // (p.tensor * p.pipeline * p.context))
    rows = max(1, round(t.global_batch_samples / samples_per_row))
    micro = min(t.micro_batch_rows, -(-rows // data))
    wanted = t.micro_batch_rows * (t.row_tokens if targets is None else targets)
    return Layout(ranks, vocab_size, attributes, -(-rows // (data * micro)), wanted, least)


def check_before_launch(config: Config, ranks: int) -> None:
    """Refuse a training command that cannot fit ``ranks`` GPUs of ``plan.hardware``, before a job exists; other
    commands pass, and so does everything with ``plan.check=false``. The configuration is finalised.

    Raises:
        UserError: with the nearest layout that fits.
    """
    if not config.plan.check or not lays_out_training(config):
        return
    gpu = hardware(config.plan.hardware)
    attributes = head_values(config)
    run = layout_of(config, ranks, config.plan.vocab_size or 1, attributes, targets=1, least=True)
    host = int(1e9 * gpu.host_memory_gb)
    refuse_what_cannot_fit(config, run, gpu.memory, f"plan.hardware={gpu.name}", host, gpu.gpus_per_node)


def refuse_what_cannot_fit(
    config: Config, run: Layout, memory: int, where: str, host_memory: int | None = None, ranks_on_host: int = 8
) -> None:
    """Raise ``UserError`` if the run cannot fit into ``memory`` bytes of each device.

    Every training command makes this check before it builds a model. It refuses what is certain: weights, gradients,
    optimizer and activations of the fullest stage are more than there is, with nothing left for anything else.

    Args:
        run: from :func:`layout_of`.
        memory: bytes of a device; of the host, divided by its ranks, where these compute on its CPU.
        where: what has so much, for the message.
        host_memory: bytes of a host, for what is offloaded there; None: unknown.
        ranks_on_host: ranks that share it.

    Raises:
        UserError: with the nearest layout of as many ranks that does fit.
    """
    fullest = largest(config, run)
    problem = None
    if fullest.total > memory:
        state = fullest.state
        problem = (
            f"{where} has {memory / GIB:.1f} GiB, and a rank of pipeline stage {fullest.stage} takes "
            f"{fullest.total / GIB:.1f}: weights {state.weights / GIB:.1f}, gradients {state.gradients / GIB:.1f}, "
            f"optimizer {state.optimizer / GIB:.1f}, activations {fullest.activations / GIB:.1f}"
            + (f", buffers {fullest.buffers / GIB:.1f}" if fullest.buffers else "")
        )
    elif host_memory is not None and fullest.state.host * ranks_on_host > host_memory:
        problem = (
            f"engine.offload={config.engine.offload} puts {fullest.state.host / GIB:.1f} GiB a rank into a host's "
            f"memory, {ranks_on_host * fullest.state.host / GIB:.1f} for {ranks_on_host} ranks; it has "
            f"{host_memory / GIB:.1f}"
        )
    if problem is None:
        return
    near = nearest_fitting(config, run, memory, host_memory, ranks_on_host)
    remedy = (
        f"this fits: {near}"
        if near
        else f"no layout of {run.ranks} rank{'s' if run.ranks > 1 else ''} fits: take more ranks or a smaller model"
    )
    raise UserError(f"{problem}; {remedy} (plan.check=false tries anyway)")


def nearest_fitting(
    config: Config, run: Layout, memory: int, host_memory: int | None = None, ranks_on_host: int = 8
) -> str | None:
    """Return the overrides of the layout with the fewest changes that fits; None if none of as many ranks does."""
    best: tuple[tuple[int, float], str] | None = None
    rows = run.micro_batches * run.data(config.parallel) * config.train.micro_batch_rows  # of a step, in any layout
    targets = run.targets // max(1, config.train.micro_batch_rows)
    for changed in candidates(config, run.ranks, ranks_on_host):
        words = differences(config, changed)
        cost = len(words), _slower(changed)
        if (best is not None and cost >= best[0]) or why_illegal(changed, run.ranks):
            continue
        micro = changed.train.micro_batch_rows
        data = run.data(changed.parallel)
        other = replace(run, micro_batches=max(1, -(-rows // (data * micro))), targets=targets * micro)
        full = largest(changed, other)
        if full.total + RESERVED > memory:
            continue
        if host_memory is None or full.state.host * ranks_on_host <= host_memory:
            best = cost, " ".join(words)
    return None if best is None else best[1]


def candidates(config: Config, ranks: int, gpus_per_node: int = 8, chunks: bool = False) -> Iterator[Config]:
    """Yield configurations that lay ``ranks`` out otherwise and may break rules: every tensor-parallel size within a
    node, pipeline size, context-parallel size up to a node's, kind of recomputation, and micro-batches of one row.

    Args:
        chunks: every number of interleaved chunks as well, and not only the configuration's.
    """
    model, p = config.model, config.parallel
    for tensor in _powers(min(ranks, gpus_per_node)):
        for context in dict.fromkeys((p.context, *(_powers(gpus_per_node) if chunks else ()))):
            for pipeline in range(1, model.num_layers + 1):
                if model.num_layers % pipeline or ranks % (tensor * context * pipeline):
                    continue
                if pipeline > 1 and config.engine.name == "deepspeed":
                    continue
                for virtual in _chunks(config, pipeline, chunks):
                    parallel = ParallelConfig(tensor, tensor > 1, pipeline, virtual, context)
                    for recompute in dict.fromkeys((config.engine.recompute, "none", "selective", "full")):
                        for micro in dict.fromkeys((config.train.micro_batch_rows, 1)):
                            yield replace(
                                config,
                                parallel=parallel,
                                engine=replace(config.engine, recompute=recompute),
                                train=replace(config.train, micro_batch_rows=micro),
                            )


def _chunks(config: Config, pipeline: int, all_of_them: bool) -> Iterator[int | None]:
    yield None
    if pipeline == 1:
        return
    layers = config.model.num_layers // pipeline
    for virtual in range(2, layers + 1):
        if layers % virtual == 0 and (all_of_them or virtual == config.parallel.virtual_pipeline):
            yield virtual


def _slower(config: Config) -> float:
    """Return a number that grows with what a layout costs in time, to choose between as many changes."""
    again = {"none": 0.0, "selective": 0.1, "full": 1.0}[config.engine.recompute]
    return again + 0.2 * config.parallel.tensor + 0.15 * config.parallel.pipeline


def why_illegal(config: Config, ranks: int) -> str:
    """Return the first rule that a layout of ``ranks`` breaks; empty if none."""
    try:
        finalize(config, ranks)
    except UserError as error:
        return str(error).splitlines()[0]
    return ""


def differences(before: Config, after: Config) -> list[str]:
    """Return the overrides that make ``after`` of ``before``, of the keys that a layout has."""
    words = []
    for section, keys in (
        ("parallel", ("tensor", "sequence", "pipeline", "virtual_pipeline", "context")),
        ("engine", ("recompute",)),
        ("train", ("micro_batch_rows",)),
    ):
        for key in keys:
            old, new = getattr(getattr(before, section), key), getattr(getattr(after, section), key)
            if old != new:
                words.append(f"{section}.{key}={'null' if new is None else str(new).lower()}")
    if before.parallel.data is not None and words:
        words.append("parallel.data=null")
    return words


def _powers(limit: int) -> list[int]:
    return [1 << n for n in range(limit.bit_length()) if 1 << n <= limit]
