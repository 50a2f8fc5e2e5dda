"""Small models, engines and micro-batches for tests that run inside ranks (``helpers.dist``)."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steerlm_megatron.config.schema import EngineConfig, ModelConfig, OptimConfig, ParallelConfig
from steerlm_megatron.data.batch import RowBatch
from steerlm_megatron.data.feed.collate import collate
from steerlm_megatron.data.groups import Groups
from steerlm_megatron.data.views import Sample
from steerlm_megatron.model.gpt import PackedGPTModel, build_model, freeze_trunk
from steerlm_megatron.model.lora import Lora, freeze
from steerlm_megatron.model.weights import fill, global_names, initial_weights, tensor_parallel_part
from steerlm_megatron.runtime import parallel
from steerlm_megatron.runtime.collectives import barrier
from steerlm_megatron.stages.train import engine_of
from steerlm_megatron.train.engine_mcore import MegatronEngine
from steerlm_megatron.train.group_objective import GroupObjective
from steerlm_megatron.train.objective import Objective, RegressionObjective, TokenObjective
from steerlm_megatron.train.sharded import ShardedWriter
from tests.helpers.reference import VOCAB, Document, Params, Target

ROW_TOKENS, MICRO_BATCHES, NAMES = 192, 4, ("a", "b", "c")
LABEL_WEIGHTS = {"b": 2.0}
# Weights large enough that attention is not uniform: else queries and keys have next to no gradient to compare.
MODEL = ModelConfig(
    hidden_size=64, num_layers=4, num_heads=4, num_query_groups=2, ffn_hidden_size=96, vocab_multiple=8, init_std=0.1
)
# All that Gemma 2 and 3 have, windows that documents are longer than, and caps that bite.
GEMMA = replace(
    MODEL, activation="geglu", norm="rmsnorm1p", post_norms=True, qk_norm=True, scale_embeddings=True,
    tie_embeddings=True, sliding_window=9, full_attention_layers=[1], rotary_local_base=500.0, query_pre_attn_scalar=24,
    attention_softcap=2.0, logit_softcap=5.0,
)  # fmt: skip
# Clips some steps and not others. Adam divides a gradient by its own size: where one is as small as its rounding error
# (1e-8, in a few of the 200,000 here), the error's sign decides the step, and with eps=1e-8 even the plain reference in
# float32 ends 4e-5 from itself in float64. eps=1e-5 takes that away, and is still a thousandth of a usual gradient.
OPTIM = {
    name: OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=2, weight_decay=0.1, clip_grad=clip, eps=1e-5)
    for name, clip in (("sft", 3.2), ("ap", 23.0), ("steerlm2", 26.0))
}
# Trained rows on both sides of the border between two tensor-parallel ranks (of 304 padded rows).
LORA = Lora(3, 6.0, ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), rows=(149, 155))


_ENGINES: list[tuple[ParallelConfig, Any]] = []


@dataclass(frozen=True)
class Case:
    """One engine: what it minimises (``sft``, ``ap`` or ``steerlm2``), how it is laid out, and what its model and step
    look like.
    """

    objective: str
    layout: ParallelConfig = field(default_factory=ParallelConfig)
    tied: bool = False
    gemma: bool = False  # a model with all that Gemma has, with tied embeddings too
    micro_batches: int = MICRO_BATCHES  # of a global step, all data-parallel ranks together
    dropout: float = 0.0
    recompute: str = "none"
    head_only: bool = False  # ap: nothing but the head is trained
    zero: int = 0  # stage of the DeepSpeed engine; 0: the Megatron-Core engine
    offload: str = "none"
    precision: str = "fp32"
    lora: Lora | None = None  # nothing but adapters (and a regression head) is trained
    head_lr: float | None = None
    overlap: bool = False  # gradients are reduced and weights gathered beside computing, in buckets of a layer or so

    @property
    def engine(self) -> EngineConfig:
        if self.zero:
            kind = {"name": "deepspeed", "zero_stage": self.zero, "offload": self.offload}
            return EngineConfig(**kind, recompute=self.recompute, precision=self.precision)
        if self.overlap:
            bucket = 1_000 if self.lora is not None else 5_000
            beside = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_parameters": bucket}
            return EngineConfig(recompute=self.recompute, precision=self.precision, **beside)
        return EngineConfig(recompute=self.recompute, precision=self.precision)

    @property
    def optim(self) -> OptimConfig:
        return replace(OPTIM[self.objective], head_lr=self.head_lr)

    @property
    def model(self) -> ModelConfig:
        return replace(GEMMA if self.gemma else MODEL, tie_embeddings=self.tied or self.gemma, dropout=self.dropout)


def row(step: int, number: int) -> RowBatch:
    """Micro-batch ``number`` of a step: ragged documents, one of one token; each row has its own number of targets.

    Half of the labels are missing. Row 3 of step 1 has no target at all.
    """
    g = torch.Generator().manual_seed(1000 * step + number)
    lengths = [1]
    while (left := ROW_TOKENS - sum(lengths)) > 0:
        lengths.append(min(int(torch.randint(3, 60, (1,), generator=g)), left))
    cu = torch.tensor([0, *lengths]).cumsum(0)
    tokens = torch.randint(0, VOCAB, (ROW_TOKENS,), generator=g)
    share = 0.0 if (step, number) == (1, 3) else 0.08 * (1 + number) ** 1.5
    mask = (torch.rand(ROW_TOKENS, generator=g) < share).float()
    mask[cu[1:] - 1] = 0
    pool = cu[1:] - 1 if share else cu[:0]
    values = torch.rand(len(pool), len(NAMES), generator=g) * 4
    values[torch.rand(values.shape, generator=g) < 0.15 * (1 + number)] = float("nan")
    return RowBatch(
        tokens_T=tokens,
        labels_T=torch.where(mask > 0, tokens.roll(-1), 0),
        loss_mask_T=mask,
        target_K=mask.nonzero().squeeze(1),
        positions_T=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=cu.to(torch.int32),
        pool_P=pool,
        values_PA=values,
        sample_ids=[f"{step}.{number}.{i}" for i in range(len(lengths))],
        useful_tokens=ROW_TOKENS,
        target_tokens=int(mask.sum()),
    )


def full_row(lengths: Sequence[int]) -> RowBatch:
    """Documents of these lengths, all targets, as one row without padding."""
    none = (np.zeros(0, np.int32), np.zeros((0, 0), np.float32))
    rows = [Sample(str(i), np.zeros(size, np.int32), np.ones(size, np.bool_), *none) for i, size in enumerate(lengths)]
    return collate([rows], sum(lengths))


def joined(rows: Sequence[RowBatch]) -> RowBatch:
    """Several rows end to end as one micro-batch."""
    starts = [ROW_TOKENS * i for i in range(len(rows))]
    ends = [r.cu_seqlens[1:] + at for r, at in zip(rows, starts, strict=True)]
    return RowBatch(
        *(torch.cat([getattr(r, name) for r in rows]) for name in ("tokens_T", "labels_T", "loss_mask_T")),
        torch.cat([r.target_K + at for r, at in zip(rows, starts, strict=True)]),
        torch.cat([r.positions_T for r in rows]),
        torch.cat([torch.zeros(1, dtype=torch.int32), *ends]),
        torch.cat([r.pool_P + at for r, at in zip(rows, starts, strict=True)]),
        torch.cat([r.values_PA for r in rows]),
        [name for r in rows for name in r.sample_ids],
        sum(r.useful_tokens for r in rows),
        sum(r.target_tokens for r in rows),
    )


def grouped_row(step: int, number: int) -> tuple[RowBatch, Groups]:
    """:func:`row` as groups of two or three responses, with weights and log-probabilities drawn at random. Samples are
    the documents that have a target.
    """
    batch, g = row(step, number), torch.Generator().manual_seed(7000 + 100 * step + number)
    bounds, tokens = batch.cu_seqlens.tolist(), batch.loss_mask_T.cumsum(0)
    targets = [
        int(tokens[end - 1]) - (int(tokens[start - 1]) if start else 0) for start, end in itertools.pairwise(bounds)
    ]
    there = [i for i, count in enumerate(targets) if count]
    names = [batch.sample_ids[i] for i in there]
    group_N = np.array([max(0, min(i, len(names) - 2)) // 2 for i in range(len(names))], np.int64)
    drawn = torch.randn(2, len(names), generator=g, dtype=torch.float64).numpy()
    logprob_N = -5.9 * np.array([targets[i] for i in there], np.float64) + drawn[1]
    groups = Groups(dict(zip(names, range(len(names)), strict=True)), group_N, 2 * drawn[0], logprob_N, "")
    return replace(batch, sample_ids=names), groups


def step_batches(step: int, micro_batches: int = MICRO_BATCHES, grouped: bool = False) -> list[RowBatch]:
    """This data-parallel rank's micro-batches of a global step, always the same rows in all; ``grouped``: with what
    SteerLM 2.0 has to know of them.
    """
    pairs = [grouped_row(step, i) for i in range(MICRO_BATCHES)]
    rows = [batch for batch, _ in pairs] if grouped else [row(step, i) for i in range(MICRO_BATCHES)]
    size = MICRO_BATCHES // micro_batches
    batches = rows if size == 1 else [joined(rows[i : i + size]) for i in range(0, len(rows), size)]
    if grouped:
        batches = [_all_groups([groups for _, groups in pairs]).attach(batch) for batch in batches]
    at = parallel.layout()
    return [batch.part(at.cp_rank, at.cp_size) for batch in batches[at.dp_rank :: at.dp_size]]


def _all_groups(parts: Sequence[Groups]) -> Groups:
    names = [name for part in parts for name in part.names]
    firsts = np.cumsum([0, *(part.count for part in parts)])
    return Groups(
        {name: number for number, name in enumerate(names)},
        np.concatenate([part.group_N + first for part, first in zip(parts, firsts, strict=False)]),
        np.concatenate([part.log_weight_N for part in parts]),
        np.concatenate([part.logprob_N for part in parts]),
        "",
    )


def grouped_documents(step: int) -> list[Document]:
    """Every sample of a step's groups by itself."""
    out = []
    for number in range(MICRO_BATCHES):
        batch, groups = grouped_row(step, number)
        share_N = np.exp(groups.log_weight_N)
        share_N /= np.bincount(groups.group_N, share_N)[groups.group_N]
        found = [one for one in documents([batch]) if one.mask_T.any()]
        for i, one in enumerate(found):
            target = Target(f"{number}.{groups.group_N[i]}", float(share_N[i]), float(groups.logprob_N[i]))
            out.append(replace(one, target=target))
    return out


def documents(batches: Sequence[RowBatch]) -> list[Document]:
    """Every document of ``batches`` by itself."""
    out = []
    for batch in batches:
        bounds = batch.cu_seqlens.tolist()
        for start, end in zip(bounds, bounds[1:], strict=False):
            pooled = (batch.pool_P >= start) & (batch.pool_P < end)
            out.append(
                Document(
                    batch.tokens_T[start:end],
                    batch.labels_T[start:end],
                    batch.loss_mask_T[start:end],
                    batch.pool_P[pooled] - start,
                    batch.values_PA[pooled],
                )
            )
    return out


def objective(case: Case) -> Objective:
    if case.objective == "steerlm2":
        return GroupObjective()
    return RegressionObjective(NAMES, LABEL_WEIGHTS) if case.objective == "ap" else TokenObjective()


def build(case: Case, seed: int = 5) -> list[PackedGPTModel]:
    """This rank's chunks with the weights that :func:`make` starts from."""
    chunks = _build(case)
    fill(_weights(case, chunks, seed))
    return chunks


def _build(case: Case) -> list[PackedGPTModel]:
    attributes = len(NAMES) if case.objective == "ap" else None
    virtual = case.layout.virtual_pipeline
    chunks = [
        build_model(
            case.model, case.layout, case.engine, VOCAB, attributes, vp_stage=i if virtual else None, lora=case.lora
        )
        for i in range(virtual or 1)
    ]
    for chunk in chunks:
        if case.head_only:
            freeze_trunk(chunk)
        if case.lora is not None:
            freeze(chunk)
    return chunks


def _weights(case: Case, chunks: Sequence[PackedGPTModel], seed: int) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Initial weights. A regression head gets some as well: with zeros the trunk would have no gradients."""
    out = []
    for chunk in chunks:
        out += list(initial_weights(chunk, case.model, VOCAB, seed))
        if case.objective == "ap" and chunk.post_process:
            out += head_weights(chunk)
        if case.lora is not None:
            out += adapter_weights(chunk)
    return out


def adapter_weights(chunk: PackedGPTModel) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Weights of adapters that change what a model computes (they start with B = 0), the same at every layout."""
    out = []
    for name, p in global_names(chunk):
        if name.endswith((".lora_b", ".rows")):
            shape = list(p.shape)
            if getattr(p, "tensor_model_parallel", False):
                shape[p.partition_dim] *= parallel.layout().tp_size
            if name == "output_layer.rows" and chunk.share_embeddings_and_output_weights:
                name = "embedding.word_embeddings.rows"
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            out.append((p, tensor_parallel_part(torch.empty(shape).normal_(0.0, 0.1, generator=generator), p)))
    return out


def head_weights(
    chunk: PackedGPTModel, scale: float = 0.1, bias: float = 2.0
) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Weights and a bias of a regression head that are the same at every layout."""
    head = chunk.output_layer.regression
    drawn = torch.empty(head.weight.shape).normal_(0.0, scale, generator=torch.Generator().manual_seed(9))
    return [(head.weight, drawn), (head.bias, torch.full(head.bias.shape, bias))]


def make(case: Case, seed: int = 5, steps: int = 8) -> Any:
    """The engine of a case on the ranks that were started. Collective over the world."""
    while _ENGINES and _ENGINES[-1][0] != case.layout:
        _ENGINES.pop()[1].close()  # its groups go now, and their threads with them
    parallel.initialize(case.layout, seed)
    chunks = _build(case)
    weights = _weights(case, chunks, seed)
    engine = engine_of(case.engine)(chunks, objective(case), case.optim, case.engine, steps)
    engine.fill(weights)
    _ENGINES.append((case.layout, engine))
    return engine


def bare(engine: MegatronEngine) -> list[PackedGPTModel]:
    """The engine's chunks without their wrappers."""
    return [next(m for m in chunk.modules() if isinstance(m, PackedGPTModel)) for chunk in engine.chunks]


@dataclass
class Shard:
    """One rank's part of a parameter: where it is split (None: it is whole), in how many interleaved parts."""

    tensor: torch.Tensor
    axis: int | None
    stride: int
    tp_rank: int


def shards(chunks: Sequence[PackedGPTModel]) -> dict[str, Shard]:
    """This rank's parameters under the names that they have in the unsplit model."""
    at, out = parallel.layout(), {}
    for chunk in chunks:
        for name, p in global_names(chunk):
            split = at.tp_size > 1 and getattr(p, "tensor_model_parallel", False)
            tensor, axis = p.detach().clone(), p.partition_dim if split else None
            out[name] = Shard(tensor, axis, getattr(p, "partition_stride", 1) if split else 1, at.tp_rank)
    return out


def shards_of(engine: Any) -> dict[str, Shard]:
    """This rank's tensor-parallel part of every parameter, ZeRO's partitions put together."""
    if isinstance(engine, MegatronEngine):
        return shards(bare(engine))
    at, out = parallel.layout(), {}
    for name, p in engine.parameters.items():
        split = at.tp_size > 1 and getattr(p, "tensor_model_parallel", False)
        stride = getattr(p, "partition_stride", 1) if split else 1
        out[name] = Shard(put_together(engine, name).cpu(), p.partition_dim if split else None, stride, at.tp_rank)
    return out


def put_together(engine: Any, name: str) -> torch.Tensor:
    """A parameter of the DeepSpeed engine put together from ZeRO's partitions: fp32, or as the model has it if it is
    frozen. Collective over the data-parallel group.
    """
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    parameter = engine.parameters[name]
    if parameter.requires_grad:
        return safe_get_full_fp32_param(parameter)
    with zero.GatheredParameters([parameter], enabled=engine.stage == 3):
        return parameter.detach().clone()


def saved(engine: Any, folder: Path) -> Path:
    """``folder``, with the engine's state written into it as a run does. Collective over the world."""
    if engine.layout.is_main:
        folder.mkdir(parents=True)
    barrier()
    write = ShardedWriter().begin(engine.checkpoint_state(), folder)
    barrier()  # Megatron-Core looks for leftovers in the folder: nobody writes before that
    write.run()
    barrier()
    write.finalize()
    barrier()
    return folder


def unsplit(by_rank: Sequence[dict[str, Shard]]) -> Params:
    """The whole model's parameters from those of all ranks. Copies of one part must be equal, bit by bit."""
    parts: dict[str, dict[int, Shard]] = {}
    for found in by_rank:
        for name, shard in found.items():
            known = parts.setdefault(name, {}).setdefault(shard.tp_rank if shard.axis is not None else 0, shard)
            assert torch.equal(known.tensor, shard.tensor), f"{name} differs between ranks that hold the same part"
    out = {}
    for name, by_tp in parts.items():
        first = by_tp[0]
        if first.axis is None:
            out[name] = first.tensor
            continue
        pieces = [by_tp[rank].tensor.chunk(first.stride, first.axis) for rank in sorted(by_tp)]
        out[name] = torch.cat([rank[i] for i in range(first.stride) for rank in pieces], first.axis)
    return out
