"""Low-rank adapters (LoRA, arXiv 2106.09685) of a model whose own weights are frozen, and trained rows of its tables.

Owns: the linear layers with an adapter, the embedding and output layer with trained rows, freezing, merging. Does not
own: what a run trains (``stages/train.py``), adapters in Hugging Face's format (``hf/peft.py``).
Invariant: with B and the rows at zero, where they start, the model is the frozen one; and merging is local to a rank.

A linear layer W x becomes W x + (alpha / rank) · B A x with A [rank, in] and B [out, rank]. In tensor parallelism no
more than rank numbers a token are exchanged:

* W split by rows (queries, keys and values; the first layer of the MLP): B is split as W, A is the same on all ranks.
  The gradient of A x is summed over the ranks. With sequence parallelism A x is computed of a rank's own tokens and
  gathered.
* W split by columns (the attention's projection, the second layer of the MLP): A is split as W, the parts of A x are
  summed (with sequence parallelism scattered as well), and B is the same on all ranks.

A row of a table is W[i] + rows[i - first]: a difference, so that it starts at zero, and weight decay draws it to the
frozen row. With tied embeddings one difference serves both tables.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint

_LEAVES = ("lora_a", "lora_b", "rows")
_EMBEDDING_ROWS = "embedding.word_embeddings.rows"


@dataclass(frozen=True)
class Lora:
    """What a model's adapters are like.

    Args:
        rank: of each adapter.
        alpha: an adapter's output is multiplied by alpha / rank.
        targets: the linear layers with one, of ``LORA_TARGETS``.
        dropout: of an adapter's input, in training.
        rows: first and one after the last row of the vocabulary that is trained; equal for none.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0
    rows: tuple[int, int] = (0, 0)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @classmethod
    def from_dict(cls, said: dict[str, Any]) -> Lora:
        """The inverse of :meth:`to_dict`."""
        first, last = said["rows"]
        return cls(said["rank"], said["alpha"], tuple(said["targets"]), said["dropout"], (first, last))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"targets": list(self.targets), "rows": list(self.rows)}


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name is part of an adapter, or trained rows."""
    return name.rpartition(".")[2] in _LEAVES


def initial_std(shape: Sequence[int]) -> float:
    """Standard deviation of A [rank, in] at the start: that of Kaiming's uniform distribution with a = √5, which is
    the usual start of adapters. Its bound is 1 / √in.
    """
    return 1 / math.sqrt(3 * shape[1])


class _Adapted(torch.nn.Module):
    """What both kinds of linear layers with an adapter have in common."""

    weight: torch.nn.Parameter
    lora_a: torch.nn.Parameter | None
    lora_b: torch.nn.Parameter | None
    config: Any

    lora: Lora

    @classmethod
    def of(cls, lora: Lora) -> type[Any]:
        """The class whose layers have these adapters: Megatron-Core's specs take classes."""
        return type(cls.__name__, (cls,), {"lora": lora})

    def _add_adapter(self, config: Any) -> None:
        lora, (outputs, inputs) = self.lora, self.weight.shape
        self.scale, self.lora_dropout = lora.scale, lora.dropout
        self.lora_a = torch.nn.Parameter(torch.empty(lora.rank, inputs, dtype=config.params_dtype))
        self.lora_b = torch.nn.Parameter(torch.empty(outputs, lora.rank, dtype=config.params_dtype))

    def _dropped(self, x: torch.Tensor, own_features: bool) -> torch.Tensor:
        """``x`` with the adapter's dropout. Ranks that hold different features draw different masks, and so do those
        that hold different tokens: under sequence parallelism the whole block runs in the tensor-parallel random
        stream already.
        """
        if not self.training or self.lora_dropout == 0.0:
            return x
        split = own_features and not self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if split else nullcontext():
            return F.dropout(x, self.lora_dropout)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter to the weight, in float32, and remove it."""
        if self.lora_a is None or self.lora_b is None:
            return
        total = self.weight.float() + self.scale * (self.lora_b.float() @ self.lora_a.float())
        self.weight.copy_(total)
        self.lora_a = self.lora_b = None

    def _sharded(self, out: dict[str, Any], prefix: str, offsets: tuple, leaf: str, axis: int) -> dict[str, Any]:
        """``out``, a layer's sharded state, with the adapter's split half as such."""
        parameter = getattr(self, leaf)
        if parameter is None:
            return out
        key = f"{prefix}{leaf}"
        groups = {
            "tp_group": parallel_state.get_tensor_model_parallel_group(),
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        entry = make_tp_sharded_tensor_for_checkpoint(parameter, key, axis, prepend_offsets=offsets, **groups)
        if parameter.partition_stride == 2:  # [gate; up], each split on its own
            more: dict[str, Any] = {}
            if "tp_group" in inspect.signature(apply_swiglu_sharded_factory).parameters:  # Megatron-Core 0.19
                more = {"tp_group": groups["tp_group"], "dp_group": groups["dp_cp_group"]}
            entry = apply_swiglu_sharded_factory(entry, offsets, **more)
        return out | {key: entry}


class LoraColumn(_Adapted, ColumnParallelLinear):
    """A layer that is split by rows of its weight, with an adapter."""

    def __init__(self, input_size: int, output_size: int, **kwargs: Any) -> None:
        ColumnParallelLinear.__init__(self, input_size, output_size, **kwargs)
        self._add_adapter(kwargs["config"])
        assert self.lora_a is not None and self.lora_b is not None
        self.lora_a.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        set_tensor_model_parallel_attributes(self.lora_b, True, 0, kwargs.get("stride", 1))

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[T, 1, in] → ([T, 1, out / tensor], bias), T of this rank's tokens with sequence parallelism."""
        output, bias = ColumnParallelLinear.forward(self, input_, *args, **kwargs)
        if self.lora_a is None or self.lora_b is None:
            return output, bias
        inner = F.linear(self._dropped(input_, own_features=False), self.lora_a)
        if self.sequence_parallel:
            inner = tensor_parallel.gather_from_sequence_parallel_region(inner)
        else:
            inner = tensor_parallel.copy_to_tensor_model_parallel_region(inner)
        return output + self.scale * F.linear(inner, self.lora_b), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The layer's, with B split by its rows."""
        out = ColumnParallelLinear.sharded_state_dict(self, prefix, sharded_offsets, metadata)
        return self._sharded(out, prefix, sharded_offsets, "lora_b", 0)


class LoraRow(_Adapted, RowParallelLinear):
    """A layer that is split by columns of its weight, with an adapter."""

    def __init__(self, input_size: int, output_size: int, **kwargs: Any) -> None:
        RowParallelLinear.__init__(self, input_size, output_size, **kwargs)
        self._add_adapter(kwargs["config"])
        assert self.lora_a is not None and self.lora_b is not None
        set_tensor_model_parallel_attributes(self.lora_a, True, 1, 1)
        self.lora_b.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[T, 1, in / tensor] → ([T, 1, out], bias), T of this rank's tokens with sequence parallelism."""
        output, bias = RowParallelLinear.forward(self, input_)
        if self.lora_a is None or self.lora_b is None:
            return output, bias
        inner = F.linear(self._dropped(input_, own_features=True), self.lora_a)
        if self.sequence_parallel:
            inner = tensor_parallel.reduce_scatter_to_sequence_parallel_region(inner)
        else:
            inner = tensor_parallel.reduce_from_tensor_model_parallel_region(inner)
        return output + self.scale * F.linear(inner, self.lora_b), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The layer's, with A split by its columns."""
        out = RowParallelLinear.sharded_state_dict(self, prefix, sharded_offsets, metadata)
        return self._sharded(out, prefix, sharded_offsets, "lora_a", 1)


def _trained_rows(lora: Lora, config: TransformerConfig) -> torch.nn.Parameter | None:
    first, last = lora.rows
    if first == last:
        return None
    rows = torch.nn.Parameter(torch.empty(last - first, config.hidden_size, dtype=config.params_dtype))
    rows.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return rows


@torch.no_grad()
def _merge_rows(weight: torch.nn.Parameter, rows: torch.Tensor, lora: Lora) -> None:
    """Add trained rows to this rank's part of a table, in float32."""
    at = _here(lora, weight.shape[0])
    if at is not None:
        part, ours = at
        weight[part] = (weight[part].float() + rows[ours].float()).to(weight.dtype)


def _here(lora: Lora, per_rank: int) -> tuple[slice, slice] | None:
    """Which rows of this rank's part of a table are trained, and which of the trained rows they are."""
    start = parallel_state.get_tensor_model_parallel_rank() * per_rank
    low, high = max(lora.rows[0], start), min(lora.rows[1], start + per_rank)
    if low >= high:
        return None
    return slice(low - start, high - start), slice(low - lora.rows[0], high - lora.rows[0])


class LoraEmbedding(VocabParallelEmbedding):
    """The embedding of a model with adapters: frozen, but for trained rows."""

    def __init__(self, base: VocabParallelEmbedding, lora: Lora, config: TransformerConfig) -> None:
        super().__init__(
            base.num_embeddings,
            base.embedding_dim,
            init_method=config.embedding_init_method,
            reduce_scatter_embeddings=base.reduce_scatter_embeddings,
            config=config,
            tp_group=base.tp_group,
        )
        self.weight = base.weight  # with what Megatron-Core has noted on it
        self.lora, self.rows = lora, _trained_rows(lora, config)

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] → [B, T, D]; with sequence parallelism this rank's part of [T, B, D]."""
        output = super().forward(input_)
        if self.rows is not None:
            ids = input_
            if self.reduce_scatter_embeddings:
                ids = ids.t().chunk(self.tp_group.size())[self.tp_group.rank()]
            at = ids - self.lora.rows[0]
            trained = (at >= 0) & (at < self.rows.shape[0])
            output = output + torch.where(trained[..., None], self.rows[at.clamp(0, self.rows.shape[0] - 1)], 0)
        if self.training and torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()  # recomputation has no gradients of layers whose input needs none
        return output

    def merge(self) -> None:
        """Add the trained rows to the table, in float32, and remove them."""
        if self.rows is not None:
            _merge_rows(self.weight, self.rows, self.lora)
        self.rows = None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The embedding's, with the trained rows, which every rank has."""
        out = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return out if self.rows is None else out | {f"{prefix}rows": _replicated(self.rows, f"{prefix}rows")}


class LoraOutput(ColumnParallelLinear):
    """The output layer of a model with adapters: frozen, but for trained rows.

    Args:
        base: the layer in the place of which this one is.
        embedding: of a tied model, on the stage that has both, whose trained rows are these, too.
        tied: whether the model is tied; on a last stage of its own the rows are then a copy of the first stage's.
    """

    def __init__(
        self,
        base: ColumnParallelLinear,
        lora: Lora,
        config: TransformerConfig,
        embedding: LoraEmbedding | None,
        tied: bool,
    ) -> None:
        super().__init__(
            base.input_size,
            base.output_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=base.gather_output,
            skip_weight_param_allocation=True,
            tp_group=base.tp_group,
        )
        self.weight = base.weight
        self.lora, self.tied = lora, tied
        self._embedding = (embedding,) if tied and embedding is not None else ()  # not a part of this module
        if not self._embedding:
            self.rows = _trained_rows(lora, config)
            if tied and self.rows is not None:
                self.rows.shared = self.rows.shared_embedding = True  # type: ignore[attr-defined]

    def _rows(self) -> torch.nn.Parameter | None:
        return self._embedding[0].rows if self._embedding else self.rows

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[K, 1, D] → ([K, 1, V / tensor], bias)."""
        logits, bias = super().forward(input_, *args, **kwargs)
        rows = self._rows()
        if rows is None:
            return logits, bias
        assert logits.shape[-1] == self.output_size_per_partition, "gathered logits are of merged models"
        hidden = tensor_parallel.copy_to_tensor_model_parallel_region(input_)
        if not self.config.sequence_parallel:  # under it, parts of the gradient are summed at the end of a step
            rows = tensor_parallel.copy_to_tensor_model_parallel_region(rows)
        part, ours = _here(self.lora, self.output_size_per_partition) or (slice(0, 0), slice(0, 0))
        index = torch.arange(part.start, part.stop, device=logits.device)
        # A rank without such columns adds none, and takes part in the sums of the backward pass all the same.
        return logits.index_add(-1, index, F.linear(hidden, rows[ours])), bias

    def merge(self) -> None:
        """Add the trained rows to a table that is not the embedding, in float32, and remove them."""
        if self._embedding:
            return
        if self.rows is not None:
            _merge_rows(self.weight, self.rows, self.lora)
        self.rows = None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The layer's; rows that are a copy of the embedding's are stored as those."""
        out = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        rows = None if self._embedding else self.rows
        if rows is not None:
            key = _EMBEDDING_ROWS if self.tied else f"{prefix}rows"
            out[f"{prefix}rows"] = _replicated(rows, key, copy=self.tied)
        return out


def _replicated(rows: torch.Tensor, key: str, copy: bool = False) -> Any:
    """A parameter that is the same on all tensor- and data-parallel ranks; ``copy``: and stored by another stage."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    replica = (
        int(copy),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return ShardedTensor.from_rank_offsets(key, rows, replica_id=replica)


def add_rows(gpt: Any, lora: Lora) -> None:
    """Give a model of Megatron-Core's layers an embedding and an output layer whose rows ``lora.rows`` can be trained.

    ``gpt``: this rank's part, its parameters on ``meta``; a regression head in the place of the output layer stays.
    """
    config: TransformerConfig = gpt.config
    embedding = None
    if gpt.pre_process:
        embedding = gpt.embedding.word_embeddings = LoraEmbedding(gpt.embedding.word_embeddings, lora, config)
    tied: bool = gpt.share_embeddings_and_output_weights
    if gpt.post_process and isinstance(gpt.output_layer, ColumnParallelLinear):
        gpt.output_layer = LoraOutput(gpt.output_layer, lora, config, embedding, tied)
    if embedding is not None and embedding.rows is not None and tied and not gpt.post_process:
        # Megatron-Core gives such a parameter a bucket of its own, so that both stages' copies are cut alike.
        embedding.rows.shared_embedding = True  # type: ignore[attr-defined]


def freeze(gpt: torch.nn.Module) -> None:
    """Leave adapters, trained rows and a regression head trainable, and nothing else."""
    for name, parameter in gpt.named_parameters():
        parameter.requires_grad_(is_adapter(name) or name.startswith("output_layer.regression."))


def merge(gpt: torch.nn.Module) -> None:
    """Add all adapters and trained rows to the weights, in float32: the model then has none of them. No collective."""
    for module in gpt.modules():
        if isinstance(module, _Adapted | LoraEmbedding | LoraOutput):
            module.merge()


def sum_tied_rows(gpt: torch.nn.Module) -> None:
    """Add up the gradients of the copies of trained rows that the first and the last stage of a tied model have, as
    Megatron-Core does with the tables themselves. Collective over both stages.
    """
    for name, parameter in gpt.named_parameters():
        if is_adapter(name) and getattr(parameter, "shared_embedding", False):
            dist.all_reduce(parameter.main_grad, group=parallel_state.get_embedding_group())  # type: ignore[attr-defined]


def adapters(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Entries of a state whose names are those of adapters or trained rows."""
    return ((name, entry) for name, entry in state.items() if is_adapter(name))
