"""What the engines have in common about AdamW: which parameters decay, and its state before the first step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

# Where a checkpoint says how many updates AdamW has made.
ADAM_STEP = "adam_step"


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters: matrices decay, vectors (norms, biases) do not. Megatron-Core's rule and its group keys."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trainable if p.dim() > 1 and not name.endswith(".bias")]
    others = [p for name, p in trainable if not (p.dim() > 1 and not name.endswith(".bias"))]
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "wd_mult": 1.0, "lr_mult": 1.0},
        {"params": others, "weight_decay": 0.0, "wd_mult": 0.0, "lr_mult": 1.0},
    ]
    return [group for group in groups if group["params"]]


def allocate_adam(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, step: int = 0) -> None:
    """Give ``parameter`` the state that torch's Adam makes at its first step, with so many steps behind it, unless it
    has one.
    """
    if not optimizer.state[parameter]:
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def adam_step(optimizers: Iterable[torch.optim.Optimizer]) -> float:
    """Updates made so far, the same for every parameter. torch's Adam counts them per parameter, Apex's per group."""
    steps = [0.0]
    for optimizer in optimizers:
        steps += [float(entry["step"]) for entry in optimizer.state.values() if "step" in entry]
        steps += [float(group["step"]) for group in optimizer.param_groups if "step" in group]
    return max(steps)


def set_adam_step(optimizers: Iterable[torch.optim.Optimizer], step: float) -> None:
    """Go on after ``step`` updates."""
    for optimizer in optimizers:
        for entry in optimizer.state.values():
            if "step" in entry:
                entry["step"].fill_(step)
        for group in optimizer.param_groups:
            if "step" in group:
                group["step"] = int(step)
