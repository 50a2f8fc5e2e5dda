"""Bytes of tensors over time, and what ranks send each other, seen from the operations of torch.

Owns: :class:`Tracker`, and the stand-in for attention kernels on ``meta``. Does not own: what runs under it
(``trace.py``). Invariant: a storage counts once, from the operation that returns the first tensor on it until the last
such tensor is gone; what a kernel allocates and frees inside counts nowhere.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_sdpa = torch.nn.functional.scaled_dot_product_attention


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Return the bytes of each storage under ``tensors`` by its address inside torch: views count once."""
    found: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes()
    return found


class Tracker(TorchDispatchMode):
    """Inside the ``with``: ``now`` and ``peak`` bytes of tensors made there, of those that do not share the storage of
    ``known`` ones. Of ``meta`` tensors, collectives move nothing, and are counted in ``moved``:
    (operation, ranks of the group) to (calls, bytes of its tensors).
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.moved: dict[tuple[str, tuple[int, ...]], tuple[int, int]] = {}
        self._held: dict[int, int] = dict.fromkeys(storages(known), 0)
        self._work: Any = None

    def restart_peak(self) -> None:
        """Let the peak be that from here on."""
        self.peak = self.now

    def _saw(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        size = storage.nbytes()
        self._held[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._lost, key)

    def _lost(self, key: int) -> None:
        self.now -= self._held.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func.namespace == "c10d" and any(leaf.is_meta for leaf in leaves):
            return self._collective(func, args, leaves)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._saw(leaf)
        return out

    def _collective(self, func: Any, args: Any, leaves: list[torch.Tensor]) -> Any:
        """Return what a collective on ``meta`` returns: its first argument, and an object to wait for."""
        boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
        ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(boxed)))
        key = (str(func).split(".")[1].strip("_"), ranks)
        calls, size = self.moved.get(key, (0, 0))
        self.moved[key] = calls + 1, size + sum(leaf.numel() * leaf.element_size() for leaf in leaves)
        work = self._work = _done() if self._work is None else self._work
        return work if len(func._schema.returns) == 1 else (args[0], work)


class _Keep(TorchDispatchMode):
    """Keep what the last operation inside returned."""

    out: Any = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.out = func(*args, **(kwargs or {}))
        return self.out


def _done() -> Any:
    """Return what stands for a collective that is finished, as torch's operations return it."""
    one = torch.empty(1)
    with _Keep() as kept:
        dist.all_reduce(one)
    return kept.out[1]


class _Flash(torch.autograd.Function):
    """What flash attention (arXiv 2205.14135) keeps and makes, on ``meta``: q, k, v, the output and a float32 log-sum
    per query and head; three gradients.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, sums = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def varlen_on_meta(
    q_TNH: torch.Tensor, k_TGH: torch.Tensor, v_TGH: torch.Tensor, packed: Any, scale: float, *_: Any
) -> torch.Tensor:
    """Return [T, N, H] on ``meta``, in the place of torch's kernel for ragged documents (``model/attention.py``)."""
    out: torch.Tensor = _Flash.apply(q_TNH, k_TGH, v_TGH)
    return out


@contextmanager
def flash_on_meta() -> Iterator[None]:
    """Inside the ``with``, attention on ``meta`` takes the memory of a flash kernel: torch has no such kernel there and
    would make all scores.

    The function is replaced, since a ``TorchFunctionMode`` is not in force inside ``Tensor.backward``, where attention
    is computed again under recomputation.
    """

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if q.is_meta:
            out: torch.Tensor = _Flash.apply(q, k, v)
            return out
        return _sdpa(q, k, v, *args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = _sdpa
