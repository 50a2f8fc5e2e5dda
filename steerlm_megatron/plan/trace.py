"""What one rank of a run holds: the real engine on ``meta``, one rank of pretended ones, for one step.

Owns: building the rank, the batches of a plan, running Megatron-Core's own schedule over them, the bytes of every kind.
Does not own: closed formulas (``model/arithmetic.py``), what a byte costs (``timing.py``). Invariant: nothing here
depends on what kind of model it is: parameters, gradients and optimizer are counted on the objects that training makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from steerlm_megatron.config.schema import Config, EngineConfig, ModelConfig, ParallelConfig
from steerlm_megatron.data.batch import RowBatch
from steerlm_megatron.data.feed.collate import collate
from steerlm_megatron.data.views import Sample
from steerlm_megatron.model.arithmetic import Rows, activations, embedding_bytes, in_flight
from steerlm_megatron.model.attention import PackedAttention
from steerlm_megatron.model.gpt import PackedGPTModel, build_model, freeze_trunk
from steerlm_megatron.model.inputs import on_device
from steerlm_megatron.model.lora import Lora, freeze
from steerlm_megatron.plan.tracker import Tracker, flash_on_meta, storages, varlen_on_meta
from steerlm_megatron.runtime.device import standing_in
from steerlm_megatron.runtime.parallel import pretended
from steerlm_megatron.train.engine_mcore import MegatronEngine
from steerlm_megatron.train.objective import Objective


@dataclass
class Held:
    """Bytes of one rank, by what they are for. ``trainable`` counts parameters whose gradient is taken."""

    parameters: int = 0
    trainable: int = 0
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    moved: dict[tuple[str, tuple[int, ...]], tuple[int, int]] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """The most bytes at a time in a step's forward and backward passes."""
        return self.weights + self.gradients + self.optimizer + self.activations


def held_by(engine: MegatronEngine) -> Held:
    """Count the bytes of an engine's weights, gradients and optimizer: of each storage once, and of views of weights
    (the fp32 ones that are updated in place) as weights.
    """
    parameters = [p for chunk in engine.chunks for p in chunk.parameters()]
    buffers = [b for chunk in engine.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    weights = storages(parameters)
    gradients = storages(b.grad_data for b in buffers)
    others: list[torch.Tensor] = []
    for inner in engine._inner_optimizers():
        for group in inner.param_groups:
            others += group["params"]
        for state in inner.state.values():
            others += [value for value in state.values() if isinstance(value, torch.Tensor)]
    optimizer = {key: size for key, size in storages(others).items() if key not in weights}
    return Held(
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        weights=sum(weights.values()),
        gradients=sum(gradients.values()),
        optimizer=sum(optimizer.values()),
    )


def tensors_of(engine: MegatronEngine) -> list[torch.Tensor]:
    """Return what an engine keeps between steps."""
    kept = [p for chunk in engine.chunks for p in chunk.parameters()]
    kept += [b.grad_data for chunk in engine.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return [*kept, *engine.live_tensors()]


def batch_of(lengths: Sequence[int], rows: int, row_tokens: int, attributes: int = 0, share: float = 1.0) -> RowBatch:
    """Return a micro-batch of ``rows`` equal rows with documents of ``lengths``, a ``share`` of each with loss (its
    end), and with ``attributes`` one scored position a document.
    """
    samples = []
    for number, length in enumerate(lengths):
        mask = np.arange(length) >= round(length * (1 - share))
        pool = np.array([length - 1] if attributes else [], np.int32)
        values = np.ones((len(pool), attributes), np.float32)
        samples.append(Sample(str(number), np.zeros(length, np.int32), mask, pool, values))
    return collate([samples] * rows, row_tokens, attributes)


def planned_engine(engine: EngineConfig, kind: str) -> EngineConfig:
    """Return the engine's settings with what it would choose by itself on ``kind`` ("cuda" or "cpu")."""
    gpu = kind == "cuda"
    reduce, gather = engine.overlap_grad_reduce, engine.overlap_param_gather
    return replace(
        engine,
        compile=False,
        attention="sdpa",
        overlap_grad_reduce=gpu if reduce is None else reduce,
        overlap_param_gather=gpu if gather is None else gather,
    )


def trace(
    config: Config,
    objective: Objective,
    vocab_size: int,
    attributes: int | None,
    batches: Sequence[RowBatch],
    kind: str = "cuda",
    rank: int = 0,
    world: int = 1,
) -> Held:
    """Return what rank ``rank`` of ``world`` holds at the peak of a step over ``batches``.

    Args:
        objective: of the training command.
        attributes: of the regression head; None: a language model.
        batches: this replica's micro-batches on the host, of complete rows; none: nothing is run.
        kind: whose kernels run: "cuda" or "cpu".
    """
    with standing_in(kind), pretended(config.parallel, rank, world) as at:
        settings = planned_engine(config.engine, kind)
        count = config.parallel.virtual_pipeline or 1
        chunks = [
            build_model(
                config.model, config.parallel, settings, vocab_size, attributes, stage if count > 1 else None,
                where="meta", lora=adapters_of(config),
            )
            for stage in range(count)
        ]  # fmt: skip
        for chunk in chunks:
            make_trainable(chunk, config)
        if kind == "cuda" and config.engine.attention != "sdpa" and config.engine.precision == "bf16":
            _take_varlen(chunks)
        engine = MegatronEngine(chunks, objective, config.optim, settings, steps=1)
        held = held_by(engine)
        if not batches:
            engine.close()
            return held
        mine = [batch.part(at.cp_rank, at.cp_size) for batch in batches]
        with flash_on_meta(), Tracker(tensors_of(engine)) as tracker:
            for chunk in engine.chunks:
                chunk.train()
                chunk.zero_grad_buffer()
            engine._run(mine, forward_only=False)
        engine.close()
    held.activations, held.moved = tracker.peak, tracker.moved
    return held


def trace_deep(
    config: Config,
    objective: Objective,
    vocab_size: int,
    attributes: int | None,
    batch: RowBatch,
    micro_batches: int,
    kind: str,
    rank: int,
    world: int,
) -> Held:
    """Return :func:`trace` of a deep model and many micro-batches in little time.

    The state is that of all layers. Activations are those of one micro-batch through two and through three layers, from
    which they go on in a straight line: every layer keeps as much, of every micro-batch that is in flight
    (``model.arithmetic.in_flight``), and each of these but the one at work keeps its output as well.
    """
    p = config.parallel
    stage, chunks = rank // (world // p.pipeline), p.virtual_pipeline or 1
    held = trace(config, objective, vocab_size, attributes, [], kind, rank, world)
    first = stage < p.pipeline - 1  # of its vocabulary, only the embedding's gradient takes memory in a step
    vocabulary = min(vocab_size, config.model.vocab_multiple) if first else vocab_size
    two, three = (
        trace(
            replace(
                config,
                model=replace(config.model, num_layers=p.pipeline * depth),
                parallel=replace(p, virtual_pipeline=None),
            ),
            objective, vocabulary, attributes, [batch], kind, rank, world,
        )
        for depth in (2, 3)
    )  # fmt: skip
    flying = in_flight(p.pipeline, chunks, stage, micro_batches)
    layers = flying * (config.model.num_layers // (p.pipeline * chunks))
    tokens = Rows(batch.row_tokens, 1)
    ends = activations(config.model, p, config.engine, tokens, vocab_size, attributes is not None).ends
    layer = three.activations - two.activations
    held.activations = two.activations + (layers - 2) * layer + (flying - 1) * ends
    if stage == 0 and first:
        others = (flying - 1) * (layers // flying * layer + ends)
        held.activations = max(held.activations, others + embedding_bytes(config.model, p, config.engine, vocab_size))
    return held


def forward_peak(
    model: ModelConfig,
    tensor: int,
    engine: EngineConfig,
    vocab_size: int,
    attributes: int | None,
    batch: RowBatch,
    kind: str = "cuda",
    labels: bool = False,
) -> int:
    """Return the most bytes that one of ``tensor`` ranks holds beside its weights in a forward pass without gradients.

    Two layers are built on ``meta``, since nothing of a layer outlives it.

    Args:
        batch: on the host, of complete rows. A language model has logits for its ``target_K``, a regression model
            values for its ``pool_P``.
        kind: whose kernels run: "cuda" or "cpu".
        labels: whether a language model gives the log-probabilities of the next tokens, in the place of logits.
    """
    layout = ParallelConfig(tensor=tensor)
    with standing_in(kind), pretended(layout, 0, tensor):
        settings = planned_engine(engine, kind)
        shape = replace(model, num_layers=2, full_attention_layers=[n for n in model.full_attention_layers if n < 2])
        chunk = build_model(shape, layout, settings, vocab_size, attributes, where="meta").eval()
        if kind == "cuda" and engine.attention != "sdpa" and engine.precision == "bf16":
            _take_varlen([chunk])
        here, packed = on_device(batch)
        packed.output_index_K = here.target_K if attributes is None else here.pool_P
        wanted = here.labels_T.index_select(0, here.target_K)[None] if labels and attributes is None else None
        with torch.no_grad(), flash_on_meta(), Tracker(chunk.parameters()) as tracker:
            chunk(here.tokens_T[None], here.positions_T[None], None, labels=wanted, packed_seq_params=packed)
    return tracker.peak


def _take_varlen(chunks: Sequence[PackedGPTModel]) -> None:
    """Let attention take the memory of the kernel that ``engine.attention`` has on GPUs, if it can."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, PackedAttention) and module.dropout == 0.0 and module.softcap is None:
                module.attend = varlen_on_meta


def make_trainable(chunk: PackedGPTModel, config: Config) -> None:
    """Freeze what ``train.trainable`` does not train."""
    if config.train.trainable == "head":
        freeze_trunk(chunk)
    elif config.train.trainable == "lora":
        freeze(chunk)


def adapters_of(config: Config) -> Lora | None:
    """Return the adapters of a run; which rows of the vocabulary it trains, some, is known with the tokenizer only."""
    said = config.lora
    if config.train.trainable != "lora":
        return None
    return Lora(said.rank, said.alpha, tuple(said.targets), said.dropout, (0, 0))


def stages(config: Config, world: int) -> list[int]:
    """Return the first rank of every pipeline stage; ranks are numbered as ``runtime.parallel`` does."""
    return [stage * (world // config.parallel.pipeline) for stage in range(config.parallel.pipeline)]
