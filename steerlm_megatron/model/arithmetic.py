"""The arithmetic of a run, in closed form: parameters, floating-point operations, and bytes of everything that is kept.

Owns: every such formula, each with its source. Does not own: which hardware runs it and how fast (``plan/``), or what
really happened (``observe/metrics.py``). Invariants: nothing here needs torch, so that a login node computes it in
milliseconds; tests compare counts with the modules that are built, and bytes with what they hold.

Letters: L layers, D width of the residual stream, N query heads, G key/value heads, H width of a head, F width of the
MLP, V vocabulary rows, T tokens of a micro-batch; t, p, c, d the tensor-, pipeline-, context- and data-parallel sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from steerlm_megatron.config.schema import EngineConfig, ModelConfig, ParallelConfig

BYTES = {"fp32": 4, "bf16": 2}
# Elements, DeepSpeed's defaults: reduce_bucket_size, and of stage 3 max_live_parameters and prefetch_bucket_size.
ZERO_BUCKET, ZERO_LIVE, ZERO_PREFETCH = 500_000_000, 1_000_000_000, 50_000_000
_CROSS_ENTROPY_PART = 1 << 27  # bytes of float32 logits at a time on a GPU (model/cross_entropy.py)


@dataclass(frozen=True)
class Widths:
    """The sizes of a layer: L, D, N, G, H, F; ``mlp_in`` columns of the MLP's first product, gates included."""

    L: int
    D: int
    N: int
    G: int
    H: int
    F: int
    mlp_in: int

    @classmethod
    def of(cls, model: ModelConfig) -> Widths:
        head = model.head_dim or model.hidden_size // model.num_heads
        groups = model.num_query_groups or model.num_heads
        ffn = model.ffn_hidden_size
        columns = ffn * (2 if model.gated else 1)
        return cls(model.num_layers, model.hidden_size, model.num_heads, groups, head, ffn, columns)


# ---- parameters


def padded_vocab_size(vocab_size: int, multiple: int, tensor: int) -> int:
    """Return the rows of the embedding: ``vocab_size`` rounded up so that tensor parallelism divides it.

    ``multiple`` is 128 by default, as in Megatron: the result is then the same for every power-of-two ``tensor``, which
    is what lets a checkpoint move between layouts.
    """
    unit = math.lcm(multiple, tensor)
    return -(-vocab_size // unit) * unit


def layer_parameters(model: ModelConfig, tensor: int = 1) -> int:
    """Return the parameters of one layer on one of ``tensor`` ranks.

    Matrices: queries, keys and values D·H·(N+2G), projection N·H·D, MLP D·F twice, three times with a gate
    (arXiv 1706.03762 §3.2-3.3, arXiv 2002.05202 §2). Column-parallel biases are split as their rows, row-parallel ones
    and norms are whole on every rank (arXiv 1909.08053 §3).
    """
    w = Widths.of(model)
    qkv = w.H * (w.N + 2 * w.G)
    split = w.D * qkv + w.N * w.H * w.D + w.D * w.mlp_in + w.F * w.D
    whole = (4 if model.post_norms else 2) * norm_parameters(model)
    if model.bias:
        split += qkv + w.mlp_in
        whole += 2 * w.D
    elif model.qkv_bias:
        split += qkv
    if model.qk_norm:
        whole += 2 * norm_parameters(model, w.H)
    return split // tensor + whole


def norm_parameters(model: ModelConfig, width: int | None = None) -> int:
    """Return the parameters of one norm: a weight, and a bias unless it is RMSNorm (arXiv 1910.07467 eq. 4)."""
    return (1 if model.norm.startswith("rmsnorm") else 2) * (width or model.hidden_size)


def stage_layers(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Return the layers of a pipeline stage; all stages have as many, in all of their chunks together."""
    return model.num_layers // parallel.pipeline


def stage_parameters(
    model: ModelConfig, parallel: ParallelConfig, stage: int, vocab_size: int, attributes: int | None = None
) -> int:
    """Return the parameters on one rank of pipeline stage ``stage``.

    The first stage has the embedding, the last one the final norm and the output layer, or a regression head of
    ``attributes`` outputs. With tied embeddings the output layer of another stage than the first is a copy.
    """
    count = stage_layers(model, parallel) * layer_parameters(model, parallel.tensor)
    first, last = stage == 0, stage == parallel.pipeline - 1
    embedding = padded_vocab_size(vocab_size, model.vocab_multiple, parallel.tensor) * model.hidden_size
    count += embedding // parallel.tensor if first else 0
    if last:
        count += norm_parameters(model)
        if attributes is not None:
            count += attributes * (model.hidden_size + 1)
        elif not (model.tie_embeddings and first):
            count += embedding // parallel.tensor
    return count


def model_parameters(model: ModelConfig, vocab_size: int, attributes: int | None = None) -> int:
    """Return the parameters of the whole model, rows of padding included."""
    return stage_parameters(model, ParallelConfig(), 0, vocab_size, attributes)


def multiplied_parameters(model: ModelConfig, vocab_size: int, head: bool = False) -> int:
    """Count the parameters that every token is multiplied with: all but the input embedding and the norms.

    ``head``: a regression head is in the place of the output layer; it is applied to few positions and left out.
    """
    w = Widths.of(model)
    matrices = w.D * w.H * (2 * w.N + 2 * w.G) + w.D * (w.mlp_in + w.F)
    return w.L * matrices + (0 if head else w.D * vocab_size)


# ---- floating-point operations


def model_flops(
    num_parameters: int,
    num_layers: int,
    hidden_size: int,
    tokens: int,
    sum_squared_lengths: float,
    *,
    training: bool = True,
) -> float:
    """Return the floating-point operations of a causal transformer on ``tokens`` packed tokens.

    Training (forward + backward) takes ``6·N·T + 6·L·h·Σ sᵢ²``, the forward pass a third of it (arXiv 2204.02311
    appendix B, with half of the attention scores, as causality has it). Recomputation is not counted, since this is the
    numerator of MFU and not of HFU.

    Args:
        num_parameters: N, all parameters that a token is multiplied with (no input embedding).
        num_layers: L.
        hidden_size: h, the width of attention (heads x head dimension).
        tokens: T, useful tokens; padding is not counted.
        sum_squared_lengths: Σ sᵢ² over the documents, in tokens².
    """
    total = 6.0 * num_parameters * tokens + 6.0 * num_layers * hidden_size * sum_squared_lengths
    return total if training else total / 3.0


def forward_flops(
    model: ModelConfig, vocab_size: int, tokens: float, sum_squared_lengths: float, outputs: float
) -> float:
    """Return the floating-point operations of forward passes in which ``outputs`` of the ``tokens`` have logits.

    It is :func:`model_flops` without a backward pass, where the output layer (2·D·V a token) counts for the tokens that
    it computes: in training for each, of a prompt for the last one, under a regression head for none. A response of d
    tokens to a prompt of p has p + d - 1 tokens that are computed, of which d have logits: the keys and values of each
    token are computed once, and each sees all before it, as in one pass over the whole (arXiv 1911.02150 §2.4).
    """
    w = Widths.of(model)
    layers = 2.0 * multiplied_parameters(model, vocab_size, head=True) * tokens
    return layers + 2.0 * w.L * w.N * w.H * sum_squared_lengths + 2.0 * w.D * vocab_size * outputs


# ---- bytes of weights, gradients and optimizer


def adam_bytes(precision: str, ranks: int) -> float:
    """Return the optimizer's bytes per parameter: two moments in fp32, and with bf16 weights the fp32 ones, split over
    ``ranks`` (ZeRO 1, arXiv 1910.02054 §5.1; Megatron-LM's distributed optimizer: 6 + 12/d bytes with the gradients).
    """
    return (12 if precision == "bf16" else 8) / ranks


@dataclass(frozen=True)
class State:
    """Bytes that one rank keeps from step to step, on its device and (``host_*``) in host memory."""

    weights: int
    gradients: int
    optimizer: int
    host_optimizer: int = 0
    host_weights: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer

    @property
    def host(self) -> int:
        return self.host_optimizer + self.host_weights


def state_bytes(engine: EngineConfig, parameters: int, trainable: int, ranks: int) -> State:
    """Return what a rank with ``parameters``, ``trainable`` of them, keeps; ``ranks`` hold the same parameters.

    Without the padding of buffers, some hundred elements each.

    * ``megatron``: weights, fp32 gradients of all that is trained, and its share of AdamW (:func:`adam_bytes`).
    * ``deepspeed`` (arXiv 1910.02054 §5): stage 1 splits the optimizer, stage 2 gradients too, stage 3 weights too.
      Gradients have the weights' precision in stage 1, and are fp32 in stages 2 and 3, where micro-batches add up in a
      rank's share. Its fp32 weights are a copy even if the model is fp32. Offloading (arXiv 2101.06840 §4) keeps the
      optimizer and the share of gradients in host memory, ``all`` the weights too.
    """
    size = BYTES[engine.precision]
    if engine.name != "deepspeed":
        optimizer = int(trainable * adam_bytes(engine.precision, ranks))
        return State(parameters * size, trainable * 4, optimizer)
    weights, share = parameters * size, -(-trainable // ranks)
    optimizer = 12 * share
    gradients = trainable * size if engine.zero_stage == 1 else 4 * share
    if engine.zero_stage == 3:
        weights = -(-weights // ranks)
    if engine.offload == "none":
        return State(weights, gradients, optimizer)
    kept = trainable * size if engine.zero_stage == 1 else 0
    host = optimizer + (0 if engine.zero_stage == 1 else gradients)
    if engine.offload == "all":
        return State(0, kept, 0, host, weights)
    return State(weights, kept, 0, host)


def zero_buffers(
    engine: EngineConfig, parameters: int, trainable: int, *, overlap: bool = True, least: bool = False
) -> int:
    """Return the bytes of ZeRO's buffers on one rank, beside what :func:`state_bytes` counts.

    DeepSpeed allocates the bucket in which gradients are reduced as a whole: in stage 3 in the fp32 of communication,
    else in the weights' precision and, with ``overlap`` (on GPUs), twice. In stage 3, gathered weights stay as long as
    there are fewer than its limit, and those that are fetched ahead are there twice, as they come and in their shape.
    ``least``: only what is there on every device, one bucket.
    """
    size, bucket = BYTES[engine.precision], min(ZERO_BUCKET, trainable)
    gathered = size * (min(ZERO_LIVE, parameters) + min(ZERO_PREFETCH, parameters))
    if engine.zero_stage == 3:
        return 4 * bucket + (0 if least else gathered)
    return bucket * size * (2 if overlap and not least else 1)


def checkpoint_bytes(
    model: ModelConfig, vocab_size: int, precision: str, attributes: int | None = None, trainable: int | None = None
) -> int:
    """Return the bytes of a checkpoint: weights, and for every trainable parameter (default: all) fp32 weights and two
    moments (``train/engine_mcore.py`` and ``train/engine_deepspeed.py`` write the same tensors).
    """
    count = model_parameters(model, vocab_size, attributes)
    return count * BYTES[precision] + 12 * (count if trainable is None else trainable)


def kv_cache_bytes(model: ModelConfig, parallel: ParallelConfig, tokens: int, precision: str) -> int:
    """Return the bytes of keys and values of ``tokens`` slots on one rank: 2·L·G·H a slot (arXiv 1911.02150 §2.4)."""
    w = Widths.of(model)
    layers = stage_layers(model, parallel)
    return 2 * layers * -(-w.G // parallel.tensor) * w.H * tokens * BYTES[precision]


# ---- bytes of activations


@dataclass(frozen=True)
class Rows:
    """A micro-batch: its ``tokens`` of all context-parallel ranks, and how many of them have an output (``targets``).

    ``slots``: of the padded copies that attention makes of its documents without a kernel for ragged ones; 0: it has
    one. ``keys``: that a context-parallel rank attends to; 0: as many as a row without document boundaries has.
    """

    tokens: int
    targets: int
    slots: int = 0
    keys: int = 0


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank of one micro-batch: what is kept of a ``layer``; what a stage of a pipeline keeps of its
    output (``ends``); what the ``last`` stage keeps beside its layers; what the backward pass of a layer (``work``) and
    of the loss, logits included, take beside what is kept.
    """

    layer: int
    ends: int
    last: int
    work: int
    loss: int
    logits: int


def activations(
    model: ModelConfig, parallel: ParallelConfig, engine: EngineConfig, rows: Rows, vocab_size: int, head: bool = False
) -> Activations:
    """Return what a micro-batch's forward pass keeps for its backward pass.

    Counted as in arXiv 2205.05198 §4 (eqs. 1, 2 and 4), for these modules: flash attention keeps q, k, v, the output
    and a float32 per query and head (arXiv 2205.14135 §3.1) in the place of scores; SwiGLU keeps its input; dropout a
    byte per element. Without recomputation a layer keeps::

        T·( 4·D/s + ((N+2G) + (N+G) + N)·H/t + (mlp_in + F)/t )  elements + 4·T·N/t bytes

    with s = t under sequence parallelism, else 1. ``selective`` drops what attention keeps beside its input and output,
    ``full`` keeps the layer's input alone. Context parallelism divides T by c, and its attention sees the keys of the
    whole row (``model/context.py``).
    """
    w, size, t = Widths.of(model), BYTES[engine.precision], parallel.tensor
    s = t if parallel.sequence else 1
    T = rows.tokens // parallel.context
    targets = -(-rows.targets // parallel.context)
    heads, queries, keys = w.H * (w.N + 2 * w.G) // t, w.N * w.H // t, w.G * w.H // t
    residual, mixed, mlp = T * w.D * size, T * heads * size, T * (w.mlp_in + w.F) // t * size
    # q and k turned by RoPE, the output and its log-sums; v is a part of what was mixed
    attention = mixed + T * (2 * queries + keys) * size + 4 * T * w.N // t
    if parallel.context > 1:  # keys and values from all ranks of the row, in the place of this rank's own
        attention = T * 2 * queries * size + 2 * (rows.keys or _row_keys(rows, parallel)) * keys * size
    elif rows.slots:  # copies of q, k, v and the output with documents padded to batches
        attention += rows.slots * (heads + queries) * size - T * (queries + keys) * size
    norms = (6 if model.post_norms else 4) * residual // s  # their inputs and outputs; the latter products need
    masks = 2 * T * w.D // s if model.dropout > 0 else 0
    kept = norms + attention + mlp + masks
    # A backward pass has gradients of neighbours beside what is kept, whole sequences of what was split, one matrix.
    matrix = max(w.mlp_in * w.D, w.F * w.D) // t * size
    work = 2 * residual // s + (residual if s > 1 else 0) + T * w.mlp_in // t * size + matrix
    if engine.recompute == "full":
        work, kept = work + kept - norms // 4, residual // s
    elif engine.recompute == "selective":
        kept = norms + mixed + T * queries * size + mlp + masks
        work = max(work, attention - mixed + 2 * residual // s)
    rows_V = 0 if head else padded_vocab_size(vocab_size, model.vocab_multiple, t) // t
    logits, wanted = targets * rows_V * size, targets * w.D * size
    parts = min(2 * _CROSS_ENTROPY_PART, 4 * targets * rows_V)  # of float32, one made while the one before is there
    loss = logits + wanted + max(parts, rows_V * w.D * size + wanted)
    last = 2 * residual // s + wanted
    if s == 1:  # behind the last attention, the last layer computes tokens with an output alone (model/gpt.py)
        spared = 1 - min(1.0, targets / T)
        last -= int(spared * (2 * residual + (0 if engine.recompute == "full" else norms // 2 + mlp)))
    return Activations(kept, residual // s, last, work, loss, logits)


def _row_keys(rows: Rows, parallel: ParallelConfig) -> int:
    """Return how many keys a context-parallel rank attends to at most: its second chunk ends a row that is one
    document, and its first chunk has keys as well.
    """
    return rows.tokens + rows.tokens // (2 * parallel.context)


def in_flight(pipeline: int, chunks: int, stage: int, micro_batches: int) -> int:
    """Return of how many micro-batches stage ``stage`` keeps one chunk's activations at a time, over its ``chunks``.

    One forward, one backward (arXiv 2104.04473 §2.2): p - stage, at most all. Interleaved, warm-up runs
    2·(p - stage - 1) + (v - 1)·p chunks ahead, and one more is at work.
    """
    if pipeline == 1:
        return 1
    if chunks == 1:
        return min(micro_batches, pipeline - stage)
    return min(micro_batches * chunks, 2 * (pipeline - stage - 1) + (chunks - 1) * pipeline + 1)


def bubble(pipeline: int, chunks: int, micro_batches: int) -> float:
    """Return idle over busy time of a pipeline: (p - 1) / (v·m) (arXiv 2104.04473 §2.2)."""
    return (pipeline - 1) / (chunks * micro_batches)


def peak_activations(
    model: ModelConfig,
    parallel: ParallelConfig,
    engine: EngineConfig,
    rows: Rows,
    stage: int,
    micro_batches: int,
    vocab_size: int,
    head: bool = False,
) -> int:
    """Return the most bytes of activations on a rank of ``stage``: what is kept of all micro-batches in flight, and the
    work of one backward pass.
    """
    chunks = parallel.virtual_pipeline or 1
    one = activations(model, parallel, engine, rows, vocab_size, head)
    layers = stage_layers(model, parallel) // chunks
    flying = in_flight(parallel.pipeline, chunks, stage, micro_batches)
    each = layers * one.layer + (one.ends if parallel.pipeline > 1 else 0)
    total = flying * each
    if stage < parallel.pipeline - 1:
        gradient = embedding_bytes(model, parallel, engine, vocab_size) if stage == 0 else 0
        return max(total + one.work, total - each + gradient)
    return total + one.last + max(one.work, one.loss)


def embedding_bytes(model: ModelConfig, parallel: ParallelConfig, engine: EngineConfig, vocab_size: int) -> int:
    """Return the bytes of the embedding on one rank of the first stage, and of its gradient before that is added up."""
    rows = padded_vocab_size(vocab_size, model.vocab_multiple, parallel.tensor) // parallel.tensor
    return rows * model.hidden_size * BYTES[engine.precision]


def squares(lengths: Sequence[int]) -> float:
    """Return Σ s² over documents, with which the work of attention grows."""
    return float(sum(length * length for length in lengths))
