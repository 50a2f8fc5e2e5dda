"""The forward pass of a trained model for generation: weights bound once, no gradients, no look-ups of groups.

Owns: one rank's layers as plain torch operations over ``PackedTokens`` with a cache. Does not own: the model (the
embedding, final norm and output layer are called as they are), the cache, the messages between stages. Invariant: the
same logits as the model's forward pass, to rounding; ``tests/unit/test_inference.py`` compares them by kind of layer.

A step that decodes feeds few tokens, so what surrounds matrix products decides its time: Megatron-Core's layers enter
an autograd function for each product, norm and activation, and look a process group up for most of them.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state

from steerlm_megatron.model.fused import rms_norm, rotate, rotated, sum_and_rms_norm
from steerlm_megatron.model.gpt import LastLayer, LastParallelLayer, PackedGPTModel, ParallelLayer
from steerlm_megatron.model.norm import NormedResidual, PackedNorm
from steerlm_megatron.model.packed_tokens import PackedTokens, Rotary
from steerlm_megatron.model.packed_weights import Linear, can_pack
from steerlm_megatron.runtime import host_memory

# A compiled kernel takes the host 80 µs to launch and an operation of torch 10 (benchmarks/gpu.md): with fewer tokens a
# GPU would wait for the host. Where passes are recorded that does not matter, and on a CPU it is the work that counts.
_COMPILED_FROM = 4096
_COPY_SHARE = 1 / 8  # of the free memory: generation.memory_fraction, which is decided before, leaves more


class _Norm:
    """A norm with its weight in the type in which it is applied."""

    def __init__(self, norm: PackedNorm) -> None:
        self.module = norm
        weight = norm.weight.detach()
        wide = weight.dtype in (torch.float32, torch.float64)
        self.plain = norm.rms and wide and not norm.compiled and not weight.is_cuda
        self.eps, self.width = norm.eps, weight.shape[0]
        self.weight = weight + 1 if norm.one_plus else weight
        self.cast = self.weight  # in the type of what it was applied to last

    def __call__(self, x: torch.Tensor, compiled: bool = True) -> torch.Tensor:
        """[..., D] → [..., D]; RMSNorm in float32 as ``fused.rms_norm`` has it, in fewer calls. ``compiled``: by the
        compiled kernel, where the module has one.
        """
        if self.module.compiled and self.module.rms and not compiled:
            wide = x.float() if self.module.one_plus else x
            if self.cast.dtype is not wide.dtype:
                self.cast = self.weight.to(wide.dtype)
            return rms_norm(wide, self.cast, self.eps).to(x.dtype)
        if not self.plain or x.dtype is not self.weight.dtype:
            out: torch.Tensor = self.module(x)
            return out
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * norm.square_().div_(self.width).add_(self.eps).rsqrt_()).mul_(self.weight)

    def of_sum(self, x: torch.Tensor, more: torch.Tensor | None, compiled: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x + more and its norm, by one kernel where it is ``compiled``; ``more`` may be None."""
        if more is None:
            return x, self(x, compiled)
        if compiled and self.module.compiled and self.module.rms:
            return sum_and_rms_norm(x, more, self.weight, self.eps)
        x = x + more
        return x, self(x, compiled)


def _linear(module: Any) -> Linear:
    bias = getattr(module, "bias", None)
    return Linear(module.weight.detach(), None if bias is None or not bias.numel() else bias.detach())


class _Layer:
    """One transformer layer of this rank."""

    def __init__(self, layer: Any, tensor_group: dist.ProcessGroup | None) -> None:
        attention, core = layer.self_attention, layer.self_attention.core_attention
        self.group = tensor_group
        self.number: int = layer.layer_number
        self.input_norm, self.mlp_norm = _Norm(layer.input_layernorm), _Norm(layer.pre_mlp_layernorm)
        self.qkv, self.proj = _linear(attention.linear_qkv), _linear(attention.linear_proj)
        self.fc1, self.fc2 = _linear(layer.mlp.linear_fc1), _linear(layer.mlp.linear_fc2)
        self.groups: int = attention.num_query_groups_per_partition
        self.share: int = attention.num_attention_heads_per_partition // self.groups
        self.dim: int = attention.hidden_size_per_attention_head
        self.q_norm, self.k_norm = (
            None if norm is None else _Norm(norm) for norm in (attention.q_layernorm, attention.k_layernorm)
        )
        self.rotary: Rotary = core.rotary
        self.compiled: bool = core.compiled  # engine.compile: one kernel for each norm, rotation and activation
        self.activate = layer.mlp.activation_func
        self.scale, self.window, self.softcap = core.scale, core.window, core.softcap
        after = (layer.self_attn_bda, layer.mlp_bda)
        self.after_attention, self.after_mlp = (
            _Norm(part.norm) if isinstance(part, NormedResidual) else None for part in after
        )
        config = layer.config
        self.gated, self.activation = config.gated_linear_unit, config.activation_func
        self.tanh = self.gated and self.activation is F.gelu  # Gemma's form, which model/fused.py has
        self.parallel = isinstance(layer, ParallelLayer)
        self.last = isinstance(layer, LastLayer | LastParallelLayer)

    def __call__(
        self, x_TD: torch.Tensor, more_TD: torch.Tensor | None, packed: PackedTokens
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream [T, D] and what is to be added to it, as the layer before returned them → the same after
        this layer; the model's last layer gives the wanted tokens alone.
        """
        many = packed.recorded or not x_TD.is_cuda or x_TD.shape[0] >= _COMPILED_FROM
        compiled = self.compiled and many
        x_TD, normed_TD = self.input_norm.of_sum(x_TD, more_TD, compiled)
        out_TD, before_TD = self._sum(self._attention(normed_TD, packed, compiled), self.proj), x_TD
        if self.last and packed.output_index_K is not None:
            out_TD, before_TD = (x.index_select(0, packed.output_index_K) for x in (out_TD, before_TD))
        if self.after_attention is not None:
            out_TD = self.after_attention(out_TD, compiled)
        if self.parallel:
            x_TD, normed_TD = before_TD + out_TD, self.mlp_norm(before_TD, compiled)
        else:
            x_TD, normed_TD = self.mlp_norm.of_sum(before_TD, out_TD, compiled)
        out_TD = self._sum(self._mlp(normed_TD, compiled), self.fc2)
        return x_TD, out_TD if self.after_mlp is None else self.after_mlp(out_TD, compiled)

    def _attention(self, x_TD: torch.Tensor, packed: PackedTokens, compiled: bool) -> torch.Tensor:
        assert packed.kv is not None
        qkv_TGSH = self.qkv(x_TD).view(-1, self.groups, self.share + 2, self.dim)
        tables = packed.rotary(self.rotary, x_TD.dtype)
        if self.q_norm is None and packed.kv.takes_qkv:
            out_TNH = packed.kv.attend_qkv(self.number, qkv_TGSH, tables, self.scale, self.window, self.softcap)
            return out_TNH.flatten(1)
        cos_T11R, sin_T11R = (table.unsqueeze(1) for table in tables)
        if self.q_norm is not None and self.k_norm is not None:
            q_TGSH = self.q_norm(qkv_TGSH[:, :, : self.share], compiled)
            k_TGSH = self.k_norm(qkv_TGSH[:, :, self.share : -1], compiled)
            q_TGSH, k_TGSH = (self._turned(x, cos_T11R, sin_T11R, compiled) for x in (q_TGSH, k_TGSH))
        else:  # the queries of a group and its key stand side by side
            both_TGSH = self._turned(qkv_TGSH[:, :, :-1], cos_T11R, sin_T11R, compiled)
            q_TGSH, k_TGSH = both_TGSH[:, :, :-1], both_TGSH[:, :, -1:]
        k_TGH, v_TGH = k_TGSH[:, :, 0], qkv_TGSH[:, :, -1]
        out_TNH = packed.kv.attend(
            self.number, q_TGSH.flatten(1, 2), k_TGH, v_TGH, self.scale, self.window, self.softcap
        )
        return out_TNH.flatten(1)

    def _turned(
        self, x_TGSH: torch.Tensor, cos_T11R: torch.Tensor, sin_T11R: torch.Tensor, compiled: bool
    ) -> torch.Tensor:
        if compiled:
            return rotate(x_TGSH, cos_T11R, sin_T11R, compiled=True)
        return rotated(x_TGSH, cos_T11R, sin_T11R)

    def _mlp(self, x_TD: torch.Tensor, compiled: bool) -> torch.Tensor:
        inner_TF = self.fc1(x_TD)
        if not self.gated:
            out_TF: torch.Tensor = self.activation(inner_TF)
            return out_TF
        if compiled:
            out_TF = self.activate(inner_TF)
            return out_TF
        gate_TF, up_TF = inner_TF.chunk(2, -1)
        return (F.gelu(gate_TF, approximate="tanh") if self.tanh else F.silu(gate_TF)).mul_(up_TF)

    def _sum(self, x_TF: torch.Tensor, linear: Linear) -> torch.Tensor:
        """A linear layer whose input features are spread over the tensor-parallel ranks, bias included."""
        if self.group is None:
            return linear(x_TF)
        out_TD = linear(x_TF, with_bias=False)
        dist.all_reduce(out_TD, group=self.group)
        return out_TD if linear.bias is None else out_TD.add_(linear.bias)


class InferencePath:
    """A model's forward pass over tokens with a cache. The model's weights are used as they are; on CPUs the layers'
    matrices are also copied, into a faster order, where that takes little of the memory that is free.
    """

    def __init__(self, gpt: PackedGPTModel) -> None:
        """``gpt`` must be one that :meth:`takes`."""
        size = parallel_state.get_tensor_model_parallel_world_size()
        group = parallel_state.get_tensor_model_parallel_group() if size > 1 else None
        self.gpt = gpt
        self.layers = [_Layer(layer, group) for layer in gpt.decoder.layers]
        matrices = [matrix for layer in self.layers for matrix in (layer.qkv, layer.proj, layer.fc1, layer.fc2)]
        copied = sum(matrix.weight.nbytes for matrix in matrices)
        if all(can_pack(matrix.weight) for matrix in matrices) and copied < _COPY_SHARE * host_memory.available():
            for matrix in matrices:
                matrix.pack()

    @staticmethod
    def takes(model: torch.nn.Module) -> TypeGuard[PackedGPTModel]:
        """Whether this path computes the model: adapters must have been merged, and every tensor-parallel rank must
        have a key/value head to itself.
        """
        if not isinstance(model, PackedGPTModel):
            return False
        config = model.config
        merged = not any(name.rpartition(".")[2].startswith("lora_") for name, _ in model.named_parameters())
        return merged and config.num_query_groups >= config.tensor_model_parallel_size

    def __call__(
        self, ids_T: torch.Tensor, packed: PackedTokens, hidden_T1D: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return logits [K, V] of the wanted tokens on the last stage, hidden states [T, 1, D] on the others.

        ``hidden_T1D``: those of the stage before, on all stages but the first.
        """
        gpt: Any = self.gpt
        if hidden_T1D is None:
            hidden_T1D = gpt.embedding(input_ids=ids_T[None], position_ids=None)
        x_TD, more_TD = hidden_T1D.squeeze(1), None
        for layer in self.layers:
            x_TD, more_TD = layer(x_TD, more_TD, packed)
        x_T1D = (x_TD if more_TD is None else x_TD + more_TD).unsqueeze(1)
        if not gpt.post_process:
            return x_T1D
        if gpt.decoder.final_layernorm is not None:
            x_T1D = gpt.decoder.final_layernorm(x_T1D)
        weight = gpt.shared_embedding_or_output_weight() if gpt.share_embeddings_and_output_weights else None
        logits_K1V, _ = gpt.output_layer(x_T1D, weight=weight)
        out_1KV: torch.Tensor = gpt.after_output(logits_K1V.transpose(0, 1))
        return out_1KV[0]
