"""Cases for the kernels of ``generate/paged_kernels.py``, on a GPU or in Triton's interpreter on a CPU:

TRITON_INTERPRET=1 python -m tests.helpers.paged_cases
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from tests.helpers import paged_reference

LENGTHS = (1, 5, 64, 257, 700, 512, 1)  # of sequences: one token, less than a part, a whole one, several


@dataclass(frozen=True)
class PagedCase:
    """Sizes of a model and of blocks."""

    groups: int
    share: int  # query heads of a group
    dim: int
    size: int  # tokens of a block
    window: int | None = None
    cap: float | None = None
    rotary: int = 4  # a head's dimensions over those that RoPE turns, times two

    def check(self, device: str, dtype: torch.dtype) -> None:
        """Compare the kernels with their formula, over blocks of which the unseen hold NaN."""
        from steerlm_megatron.generate import paged_kernels

        torch.manual_seed(0)
        groups, size, dim = self.groups, self.size, self.dim
        width = -(-max(LENGTHS) // size)
        blocks = list(range(len(LENGTHS) * width))
        random.Random(1).shuffle(blocks)
        layer = torch.full((2, groups, len(blocks), size, dim), torch.nan, dtype=dtype, device=device)
        rows = torch.zeros(len(LENGTHS), 2 + width, dtype=torch.int32)
        for row, length in enumerate(LENGTHS):
            mine = blocks[row * width : (row + 1) * width]
            rows[row, 1:] = torch.tensor([length - 1, *mine])
            rows[row, 0] = mine[(length - 1) // size] * size + (length - 1) % size
            slots_T = torch.tensor([mine[t // size] * size + t % size for t in range(length)], device=device)
            k_TGH, v_TGH = torch.randn(length, groups, 2, dim, dtype=dtype, device=device).unbind(2)
            paged_kernels.store(layer, slots_T, k_TGH, v_TGH)
        rows_BX = rows.to(device)
        qkv_BGSH = torch.randn(len(LENGTHS), groups, self.share + 2, dim, dtype=dtype, device=device)
        tables = [torch.rand(len(LENGTHS), 1, dim // self.rotary, dtype=dtype, device=device) for _ in range(2)]
        expected_layer, slots_B = layer.clone(), rows_BX[:, 0]
        q_BNH, k_BGH = paged_kernels.turn_and_store(layer, slots_B, qkv_BGSH, *tables, keys=True)
        expected = paged_reference.turn_and_store(expected_layer, slots_B, qkv_BGSH, *tables, keys=True)
        near = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close((q_BNH, k_BGH), expected, **near)
        torch.testing.assert_close(layer, expected_layer, equal_nan=True, **near)
        found = paged_kernels.attend(layer, rows_BX, q_BNH, dim**-0.5, self.window, self.cap)
        assert found.dtype is dtype
        wide = paged_reference.attend(layer.double(), rows_BX, q_BNH.double(), dim**-0.5, self.window, self.cap)
        torch.testing.assert_close(found.double(), wide, **near)


CASES = (
    PagedCase(8, 4, 64, 16),
    PagedCase(4, 1, 128, 16, rotary=2),
    PagedCase(2, 3, 24, 4, window=70),
    PagedCase(1, 8, 16, 8, cap=2.0, rotary=2),
    PagedCase(2, 2, 80, 16, window=300, cap=1.5),
    PagedCase(2, 20, 256, 16, window=9),
    PagedCase(2, 2, 16, 16, rotary=32),  # no dimension turns
)

if __name__ == "__main__":
    for case in CASES:  # in float32: the interpreter has no products of bf16
        case.check("cpu", torch.float32)
        print(case, flush=True)
