"""Cross-entropy of logits whose vocabulary is split over tensor-parallel ranks, a few rows at a time.

Megatron-Core's own makes a float32 copy of all logits and keeps it for the backward pass: 4 GiB for 4,096 tokens of a
vocabulary of 256,000. Here float32 is as large as a few rows (with ``engine.compile`` it stays in registers), and what
is kept are the logits as they are (bf16), which the gradient then overwrites. Invariant: the arithmetic is float32,
whatever the logits' dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from steerlm_megatron.model.fused import one_kernel
from steerlm_megatron.runtime.device import on_gpu

# Bytes of float32 in work at a time: what stays in a CPU core's cache; on a GPU, enough to fill it.
_CPU_BYTES, _GPU_BYTES = 1 << 20, 1 << 27


def _parts(logits_KV: torch.Tensor) -> Iterator[slice]:
    rows, width = logits_KV.shape
    step = max(1, (_GPU_BYTES if on_gpu(logits_KV) else _CPU_BYTES) // (4 * width))
    return (slice(start, start + step) for start in range(0, rows, step))


def soft_capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap · tanh(logits / cap) (Gemma 2, arXiv 2408.00118 §2), or the logits without a cap; in float32 at least."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if cap is None else torch.tanh(wide / cap) * cap


def _log_sums(logits_KV: torch.Tensor, words: int, cap: float | None) -> torch.Tensor:
    """log Σ exp of each row's first ``words`` logits, float32 [K]; of no column it is -inf."""
    return torch.logsumexp(soft_capped(logits_KV[:, :words], cap), 1)


def _overwrite_by_gradient(
    logits_KV: torch.Tensor,
    log_sum_K1: torch.Tensor,
    label_K1: torch.Tensor,
    grad_K1: torch.Tensor,
    words: int,
    cap: float | None,
) -> None:
    """What :meth:`_CrossEntropy.backward` says, in one formula; a label that is another rank's is a negative one."""
    capped_KV = soft_capped(logits_KV, cap)
    column_V = torch.arange(logits_KV.shape[1], device=logits_KV.device)
    soft_KV = torch.where(column_V < words, (capped_KV - log_sum_K1).exp(), 0.0)
    out_KV = (soft_KV - (column_V == label_K1).float()) * grad_K1
    if cap is not None:
        out_KV = out_KV * (1.0 - (capped_KV / cap).square())
    logits_KV.copy_(out_KV)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_KV: torch.Tensor,
        labels_K: torch.Tensor,
        first: int,
        words: int,
        group: dist.ProcessGroup | None,
        cap: float | None,
        compiled: bool,
    ) -> torch.Tensor:
        width = logits_KV.shape[1]
        local_K = labels_K - first  # of labels in this rank's part of the vocabulary
        own_K = (local_K >= 0) & (local_K < width)
        local_K1 = local_K.clamp(0, width - 1).unsqueeze(1)
        if compiled and words:
            log_sum_K = one_kernel(_log_sums)(logits_KV, words, cap)
        else:
            log_sum_K = torch.empty(len(labels_K), dtype=torch.float32, device=logits_KV.device)
            for part in _parts(logits_KV):
                log_sum_K[part] = _log_sums(logits_KV[part], words, cap)
        wanted_K = soft_capped(logits_KV.gather(1, local_K1).squeeze(1), cap)
        if group is not None:
            # log Σ over ranks of exp(log-sum of a rank), with the largest taken out
            peak_K = log_sum_K.clone()
            dist.all_reduce(peak_K, dist.ReduceOp.MAX, group)
            both_2K = torch.stack([(log_sum_K - peak_K).exp_(), wanted_K.mul_(own_K)])
            dist.all_reduce(both_2K, dist.ReduceOp.SUM, group)
            log_sum_K, wanted_K = both_2K[0].log_().add_(peak_K), both_2K[1]
        ctx.save_for_backward(logits_KV, local_K1, own_K, log_sum_K)
        ctx.words, ctx.cap, ctx.compiled = words, cap, compiled
        return log_sum_K - wanted_K

    @staticmethod
    def backward(ctx: Any, grad_K: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None, None]:
        """∂/∂logit_v = grad · (softmax_v − [v = label]), times 1 − tanh²(logit_v / cap) with a cap, written over the
        logits; 0 for padding (with a cap by the second factor).
        """
        logits_KV, local_K1, own_K, log_sum_K = ctx.saved_tensors
        if ctx.compiled:
            label_K1, grad_K1 = torch.where(own_K.unsqueeze(1), local_K1, -1), grad_K.float().unsqueeze(1)
            write = one_kernel(_overwrite_by_gradient)
            write(logits_KV, log_sum_K.unsqueeze(1), label_K1, grad_K1, ctx.words, ctx.cap)
            return logits_KV, None, None, None, None, None, None
        logits_KV[:, ctx.words :] = -torch.inf
        minus_K1 = -own_K.float().unsqueeze(1)
        for part in _parts(logits_KV):
            # In float32, as log_sum_K is; in place where the logits are as well.
            out = logits_KV[part] if logits_KV.dtype is torch.float32 else None
            capped_KV = logits_KV[part] if ctx.cap is None else soft_capped(logits_KV[part], ctx.cap)
            soft_KV = torch.sub(capped_KV, log_sum_K[part].unsqueeze(1), out=out).exp_()
            soft_KV.scatter_add_(1, local_K1[part], minus_K1[part])
            soft_KV.mul_(grad_K[part].float().unsqueeze(1))
            if ctx.cap is not None:
                soft_KV.mul_(capped_KV.div_(ctx.cap).square_().neg_().add_(1.0))
            if out is None:
                logits_KV[part] = soft_KV
        return logits_KV, None, None, None, None, None, None


def vocab_parallel_cross_entropy(
    logits_KV: torch.Tensor, labels_K: torch.Tensor, vocab_size: int, cap: float | None = None, compiled: bool = False
) -> torch.Tensor:
    """-log softmax(logits)[label] in float32 [K], of logits as :func:`soft_capped` gives them, over the first
    ``vocab_size`` columns of all ranks together: columns behind these belong to rows that only pad the output layer.

    Collective over the tensor-parallel group. Its backward pass overwrites ``logits_KV``: it can be run once, and the
    logits are of no use after it.

    Args:
        logits_KV: [K, V / tensor-parallel ranks], this rank's part of the vocabulary; any floating dtype.
        labels_K: int64 [K], ids below ``vocab_size``, the same on every rank of the group.
        cap: the model's ``logit_softcap``.
        compiled: by one compiled kernel each way, which makes no float32 copy of any logits.
    """
    ranks, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    group = parallel_state.get_tensor_model_parallel_group() if ranks > 1 else None
    width = logits_KV.shape[1]
    words = min(max(vocab_size - rank * width, 0), width)
    losses_K: torch.Tensor = _CrossEntropy.apply(logits_KV, labels_K, rank * width, words, group, cap, compiled)
    return losses_K
