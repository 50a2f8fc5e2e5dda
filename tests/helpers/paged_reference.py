"""What the kernels of ``generate/paged_kernels.py`` compute, by the formula, a sequence at a time, on any device."""

from __future__ import annotations

import torch

from steerlm_megatron.model.fused import rotate


def store(layer: torch.Tensor, slots_T: torch.Tensor, k_TGH: torch.Tensor, v_TGH: torch.Tensor) -> None:
    size = layer.shape[3]
    for token, slot in enumerate(slots_T.tolist()):
        layer[:, :, slot // size, slot % size] = torch.stack([k_TGH[token], v_TGH[token]])


def attend(
    layer: torch.Tensor,
    rows_BX: torch.Tensor,
    q_BNH: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    outputs = []
    for (_, position, *blocks), q_NH in zip(rows_BX.tolist(), q_BNH, strict=True):
        first = 0 if window is None else max(0, position - window + 1)
        found_2GKH = layer[:, :, blocks].flatten(2, 3)[:, :, first : position + 1]
        k_NKH, v_NKH = found_2GKH.repeat_interleave(len(q_NH) // layer.shape[1], 1)
        score_NK = torch.einsum("nh,nkh->nk", q_NH, k_NKH) * scale
        if softcap is not None:
            score_NK = softcap * torch.tanh(score_NK / softcap)
        outputs.append(torch.einsum("nk,nkh->nh", score_NK.softmax(1), v_NKH))
    return torch.stack(outputs)


def turn_and_store(
    layer: torch.Tensor,
    slots_T: torch.Tensor,
    qkv_TGSH: torch.Tensor,
    cos_T1R: torch.Tensor,
    sin_T1R: torch.Tensor,
    keys: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    turned_TXH = rotate(qkv_TGSH[:, :, :-1].flatten(1, 2), cos_T1R, sin_T1R)
    turned_TGSH = turned_TXH.unflatten(1, (qkv_TGSH.shape[1], -1))
    store(layer, slots_T, turned_TGSH[:, :, -1], qkv_TGSH[:, :, -1])
    return turned_TGSH[:, :, :-1].flatten(1, 2), turned_TGSH[:, :, -1] if keys else None
