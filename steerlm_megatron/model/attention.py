"""Attention over packed rows: exact, without Transformer Engine.

Owns: the ``core_attention`` module that Megatron-Core's ``SelfAttention`` calls, and its backends. Does not own: what a
forward pass knows about documents (``packed_tokens.py``), projections and RoPE arithmetic (Megatron-Core), the KV cache
(``generate/kv_cache.py``).
Invariant: no token attends outside its own document, nor outside its layer's window, on any backend; logits equal
those of the documents run alone.

Megatron-Core refuses packed input in its own core attention. It hands ``packed_seq_params`` on unread unless
``qkv_format == "thd"``; so a row travels as an ordinary [T, 1, ...] sequence without position embeddings of
Megatron-Core's, and this module applies RoPE at each token's own position.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch.utils.checkpoint import checkpoint

from steerlm_megatron.errors import UserError
from steerlm_megatron.model.context import keys_of_chunks
from steerlm_megatron.model.cross_entropy import soft_capped
from steerlm_megatron.model.fused import rotate
from steerlm_megatron.model.packed_tokens import Buckets, Masks, PackedTokens, Rotary

# So many queries at least share a call where a window or a soft cap has calls of their own.
_BLOCK_QUERIES = 256


class _ToSlots(torch.autograd.Function):
    """Tokens [T, ...] → slots [P, ...]. Backward is a plain gather: padding slots carry no gradient."""

    @staticmethod
    def forward(ctx: Any, x_TNH: torch.Tensor, buckets: Buckets) -> torch.Tensor:
        ctx.buckets = buckets
        return x_TNH.index_select(0, buckets.index_P)

    @staticmethod
    def backward(ctx: Any, grad_PNH: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_PNH.index_select(0, ctx.buckets.order_T), None


class _ToTokens(torch.autograd.Function):
    """Slots [P, ...] → tokens [T, ...]; padding slots are dropped and get zero gradient."""

    @staticmethod
    def forward(ctx: Any, x_PNH: torch.Tensor, buckets: Buckets) -> torch.Tensor:
        ctx.buckets = buckets
        return x_PNH.index_select(0, buckets.order_T)

    @staticmethod
    def backward(ctx: Any, grad_TNH: torch.Tensor) -> tuple[torch.Tensor, None]:
        buckets = ctx.buckets
        grad_PNH = grad_TNH.new_zeros((buckets.index_P.numel(), *grad_TNH.shape[1:]))
        return grad_PNH.index_copy_(0, buckets.order_T, grad_TNH), None


def causal_attention(
    q_DNQH: torch.Tensor,
    k_DGKH: torch.Tensor,
    v_DGKH: torch.Tensor,
    scale: float,
    masks: Masks,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention of D documents of like length, [D, N, Q, H]. The last query is at the position of the last key.

    Without a window and a cap, documents that have as many queries as keys take one call of SDPA. With a window, a
    block of queries takes the keys that it can see: the work grows with Q · window, not with Q · K. SDPA has no soft
    cap: there scores are written to memory, a block of queries at a time, and once more in the backward pass, for which
    none are kept (docs/models.md has the price).

    Args:
        masks: those that are known, which the call adds to.
        window: keys that a query sees, its own included; None: all up to its own.
        softcap: c of c · tanh(score / c); None: the scores as they are.
    """
    queries, keys = q_DNQH.shape[2], k_DGKH.shape[2]
    if window is not None and window >= keys:
        window = None
    if window is None and softcap is None and queries == keys:
        grouped = q_DNQH.shape[1] != k_DGKH.shape[1]
        return F.scaled_dot_product_attention(
            q_DNQH, k_DGKH, v_DGKH, is_causal=queries > 1, scale=scale, dropout_p=dropout, enable_gqa=grouped
        )
    block = queries if window is None and softcap is None else max(window or 0, _BLOCK_QUERIES)
    outputs: list[torch.Tensor] = []
    for start in range(0, queries, block):
        stop = min(start + block, queries)
        last = keys - queries + stop  # the key after the last one that the block sees
        first = 0 if window is None else max(0, keys - queries + start - window + 1)
        seen = _seen(stop - start, last - first, window, q_DNQH.device, masks)
        q, k, v = q_DNQH[:, :, start:stop], k_DGKH[:, :, first:last], v_DGKH[:, :, first:last]
        if softcap is None:
            # Repeated, not grouped: on a GPU the only kernel that takes a mask and groups makes all scores at once.
            per_group = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(per_group, 1) if per_group > 1 else x for x in (k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, dropout_p=dropout)
        elif torch.is_grad_enabled():
            out = checkpoint(
                _capped_attention, q, k, v, seen, scale, dropout, softcap,
                use_reentrant=False, preserve_rng_state=dropout > 0.0,
            )  # fmt: skip
        else:
            out = _capped_attention(q, k, v, seen, scale, dropout, softcap)
        outputs.append(out)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


def _seen(queries: int, keys: int, window: int | None, where: torch.device, masks: Masks) -> torch.Tensor:
    """Which keys queries see, bool [Q, K]: those up to their own position, which is the last key's for the last query,
    and of them the last ``window``.
    """
    seen = masks.get((queries, keys, window))
    if seen is None:
        seen = torch.ones(queries, keys, dtype=torch.bool, device=where).tril(keys - queries)
        if window is not None:
            seen = seen.triu(keys - queries - window + 1)
        masks[queries, keys, window] = seen
    return seen


def _capped_attention(
    q_DNQH: torch.Tensor,
    k_DGKH: torch.Tensor,
    v_DGKH: torch.Tensor,
    seen_QK: torch.Tensor,
    scale: float,
    dropout: float,
    softcap: float,
) -> torch.Tensor:
    """Attention by its formula, softmax(c · tanh(q · k / c)) v, [D, N, Q, H]; scores in float32 at least."""
    groups, shape = k_DGKH.shape[1], q_DNQH.shape
    q_DGXH = q_DNQH.unflatten(1, (groups, -1)).flatten(2, 3)  # the query heads of a group, one after the other
    wide = torch.promote_types(q_DNQH.dtype, torch.float32)
    score_DGXK = (q_DGXH @ k_DGKH.transpose(-1, -2)).to(wide)
    score_DGXK = soft_capped(score_DGXK * scale, softcap)
    score_DGMQK = score_DGXK.unflatten(2, (-1, shape[2])).masked_fill(~seen_QK, -torch.inf)
    weight_DGXK = score_DGMQK.softmax(-1).to(q_DNQH.dtype).flatten(2, 3)
    if dropout > 0.0:
        weight_DGXK = F.dropout(weight_DGXK, dropout)
    return (weight_DGXK @ v_DGKH).reshape(shape)


def attend_sdpa(
    q_TNH: torch.Tensor,
    k_TGH: torch.Tensor,
    v_TGH: torch.Tensor,
    packed: PackedTokens,
    scale: float,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention inside each document through torch's SDPA, in as few calls as lengths allow: [T, N, H].

    ``window`` and ``softcap`` as in :func:`causal_attention`.
    """
    if packed.chunks:
        return _attend_chunks(q_TNH, k_TGH, v_TGH, packed, scale, dropout, window, softcap)
    buckets = packed.buckets()
    sizes = [documents * length for documents, length in buckets.shapes]
    q_parts, k_parts, v_parts = (_ToSlots.apply(x, buckets).split(sizes) for x in (q_TNH, k_TGH, v_TGH))
    outputs: list[torch.Tensor] = []
    for shape, q_PNH, k_PGH, v_PGH in zip(buckets.shapes, q_parts, k_parts, v_parts, strict=True):
        q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in (q_PNH, k_PGH, v_PGH))
        out = causal_attention(q, k, v, scale, packed.masks, dropout, window, softcap)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return _ToTokens.apply(torch.cat(outputs), buckets)


def _attend_chunks(
    q_TNH: torch.Tensor,
    k_KGH: torch.Tensor,
    v_KGH: torch.Tensor,
    packed: PackedTokens,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """The same for a context-parallel rank: each chunk's first document may have more keys than queries, the others'
    are as many.
    """
    sizes = [chunk.stop - chunk.start for chunk in packed.chunks]
    key_sizes = [chunk.stop - chunk.first_key for chunk in packed.chunks]
    outputs: list[torch.Tensor] = []
    for (carried, rest), q, k, v in zip(
        packed.parts(), q_TNH.split(sizes), k_KGH.split(key_sizes), v_KGH.split(key_sizes), strict=True
    ):
        if carried is not None:
            first, keys = carried
            q_1NQH, k_1GKH, v_1GKH = (x.transpose(0, 1)[None] for x in (q[:first], k[:keys], v[:keys]))
            out = causal_attention(q_1NQH, k_1GKH, v_1GKH, scale, packed.masks, dropout, window, softcap)
            outputs.append(out[0].transpose(0, 1))
            q, k, v = q[first:], k[keys:], v[keys:]
        if rest is not None:
            outputs.append(attend_sdpa(q, k, v, rest, scale, dropout, window, softcap))
    return torch.cat(outputs)


def flash_takes(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether this process's GPU runs flash attention, which torch's varlen attention is: it pads no head, as SDPA
    does.
    """
    usable = torch.cuda.is_available() and dtype in (torch.bfloat16, torch.float16)
    return usable and head_dim % 8 == 0 and head_dim <= 256 and torch.cuda.get_device_capability() >= (8, 0)


def varlen_function(windowed: bool) -> Callable[..., torch.Tensor] | None:
    """torch's variable-length flash attention with causality bound the way this torch spells it, or None without it
    (or without windows, where the model is ``windowed``).
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = inspect.signature(varlen_attn).parameters
    # 2.10 says is_causal; later versions say window_size=(-1, 0).
    by_flag = "is_causal" in names
    if windowed and by_flag:
        return None
    has_gqa, has_scale = "enable_gqa" in names, "scale" in names

    def call(
        q_TNH: torch.Tensor,
        k_TGH: torch.Tensor,
        v_TGH: torch.Tensor,
        packed: PackedTokens,
        scale: float,
        dropout: float = 0.0,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        assert dropout == 0.0 and softcap is None, "refused by attention_backend()"
        # Tokens before a query's own and after it: -1 is all of them.
        before = -1 if window is None else window - 1
        extra: dict[str, Any] = {"is_causal": True} if by_flag else {"window_size": (before, 0)}
        if has_scale:
            extra["scale"] = scale
        if not has_scale:  # it scales by H^-1/2
            q_TNH = q_TNH * (scale * q_TNH.shape[-1] ** 0.5)
        if has_gqa and q_TNH.shape[1] != k_TGH.shape[1]:  # older versions take groups without being told
            extra["enable_gqa"] = True
        cu, cu_keys = packed.cu_seqlens, packed.cu_keys if packed.cu_keys is not None else packed.cu_seqlens
        assert cu is not None and cu_keys is not None
        # Where a document has more keys than queries, flash attention lets its last query see its last key.
        longest, longest_keys = packed.max_seqlen_q, packed.max_seqlen_kv
        out_TNH = varlen_attn(q_TNH, k_TGH, v_TGH, cu, cu_keys, longest, longest_keys, **extra)
        assert isinstance(out_TNH, torch.Tensor), "nothing but the output was asked for"
        return out_TNH

    return call


def attention_backend(
    name: str, config: TransformerConfig, softcap: float | None = None
) -> Callable[..., torch.Tensor]:
    """The function behind ``engine.attention``: ``auto`` takes ``varlen`` where it can run (CUDA, bf16, no dropout, no
    soft cap, heads that flash attention takes).
    """
    assert config.kv_channels is not None
    usable = flash_takes(config.kv_channels, config.params_dtype)
    usable = usable and config.attention_dropout == 0.0 and softcap is None
    if name == "sdpa" or (name == "auto" and not usable):
        return attend_sdpa
    function = varlen_function(config.window_size is not None) if usable else None
    if function is None:
        if name == "auto":
            return attend_sdpa
        raise UserError(
            f"engine.attention={name} needs a GPU of compute capability 8.0 or more, engine.precision=bf16, "
            "model.dropout=0, no model.attention_softcap, heads of at most 256 dimensions and a multiple of 8, and "
            "torch >= 2.10 (2.11 with model.sliding_window); use engine.attention=sdpa or auto"
        )
    return function


class PackedAttention(MegatronModule):
    """``core_attention`` of Megatron-Core's ``SelfAttention`` for packed rows and for generation with a KV cache."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        backend: str = "auto",
        rotary: Rotary | None = None,
        local_rotary: Rotary | None = None,
        softcap: float | None = None,
        compiled: bool = False,
    ) -> None:
        """``local_rotary`` is the RoPE of layers with a sliding window, which ``config`` names; None: as of others."""

        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self"
        self.layer_number = layer_number
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        assert config.kv_channels is not None
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self.rotary = rotary or Rotary(config.kv_channels, 10000.0)
        self.window: int | None = None
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            assert config.window_size is not None
            self.window, self.rotary = config.window_size[0] + 1, local_rotary or self.rotary
        self.softcap = softcap
        self.attend, self.compiled = attention_backend(backend, config, softcap), compiled

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedTokens | None = None,
    ) -> torch.Tensor:
        """[T, 1, N, H], [T, 1, G, H] twice → [T, 1, N * H]."""
        assert isinstance(packed_seq_params, PackedTokens) and attention_bias is None
        tables = packed_seq_params.rotary(self.rotary, query.dtype)
        q_TNH, k_TGH = (rotate(x.squeeze(1), *tables, self.compiled) for x in (query, key))
        v_TGH = value.squeeze(1)
        if packed_seq_params.chunks:
            k_TGH, v_TGH = keys_of_chunks(k_TGH, v_TGH, packed_seq_params.chunks)
        if packed_seq_params.kv is not None:
            out_TNH = packed_seq_params.kv.attend(
                self.layer_number, q_TNH, k_TGH, v_TGH, self.scale, self.window, self.softcap
            )
        elif self.training and self.dropout > 0.0:
            # Under sequence parallelism the whole block runs in the tensor-parallel random stream already; entered a
            # second time, recomputation would find another state and draw other masks.
            inside = self.config.sequence_parallel
            with nullcontext() if inside else tensor_parallel.get_cuda_rng_tracker().fork():
                out_TNH = self._attend(q_TNH, k_TGH, v_TGH, packed_seq_params, self.dropout)
        else:
            out_TNH = self._attend(q_TNH, k_TGH, v_TGH, packed_seq_params, 0.0)
        return out_TNH.reshape(out_TNH.shape[0], 1, -1)

    def _attend(
        self, q_TNH: torch.Tensor, k_TGH: torch.Tensor, v_TGH: torch.Tensor, packed: PackedTokens, dropout: float
    ) -> torch.Tensor:
        return self.attend(q_TNH, k_TGH, v_TGH, packed, self.scale, dropout, self.window, self.softcap)
