"""Matrix products of few rows on CPUs, with weights in the order in which oneDNN reads them.

Owns: the rearranged copy of a weight, and when it is used. Does not own: which weights have one (``inference.py``).
Invariant: the same result as ``torch.nn.functional.linear``, to rounding.

A product of 2 to 32 rows is bound by how fast its weight is read: with the rearranged copy it took 0.5 to 0.9 of the
time on a CPU with AVX2 (``benchmarks/sample.md``). A single row is faster as a product with a vector, and from 64 rows
on there is no difference.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

_FEWEST, _MOST = 2, 32
_TYPICAL = 8  # oneDNN chooses the order by the number of rows; this one is as good for 2 as for 32


class Linear:
    """The product with a weight [out, in], with its bias."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self._packed: torch.Tensor | None = None

    def pack(self) -> None:
        """Make the rearranged copy, which is as large as the weight; the weight's values must not change from now on.
        :func:`can_pack` says whether there is a way.
        """
        self._packed = _ops()._reorder_linear_weight(self.weight, _TYPICAL)

    def __call__(self, x_TD: torch.Tensor, with_bias: bool = True) -> torch.Tensor:
        """[T, D] → [T, F]."""
        bias = self.bias if with_bias else None
        if self._packed is None or not _FEWEST <= x_TD.shape[0] <= _MOST:
            return F.linear(x_TD, self.weight, bias)
        out_TF: torch.Tensor = _ops()._linear_pointwise(x_TD, self._packed, bias, "none", [], "")
        return out_TF


def can_pack(weight: torch.Tensor) -> bool:
    """Whether this build of torch has a rearranged form of ``weight``."""
    return weight.device.type == "cpu" and weight.dtype is torch.float32 and _has_ops()


def _ops() -> Any:
    """The operators that torch's own compiler uses for frozen weights, which are not a public interface."""
    return torch.ops.mkldnn


@cache
def _has_ops() -> bool:
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(_ops(), name) for name in names)
