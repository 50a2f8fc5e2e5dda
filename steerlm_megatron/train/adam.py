"""What the engines have in common about AdamW: which parameters decay, which have a learning rate of their own, and its
state before the first step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from steerlm_megatron.config.schema import OptimConfig
from steerlm_megatron.model.weights import REGRESSION_HEAD

# Where a checkpoint says how many updates AdamW has made.
ADAM_STEP = "adam_step"


def is_head(name: str) -> bool:
    """Whether a parameter of that name, inside whatever wraps the model, is the regression head's."""
    return REGRESSION_HEAD in name


def head_rates(optim: OptimConfig) -> dict[str, float]:
    """What Megatron-Core's schedule takes from a parameter group in the place of ``optim.lr`` and ``optim.min_lr``;
    nothing where the head has the rate of all. Its lowest rate is the same share of the highest.
    """
    if optim.head_lr is None:
        return {}
    share = min(optim.min_lr, optim.lr) / optim.lr if optim.lr else 0.0
    return {"max_lr": optim.head_lr, "min_lr": share * optim.head_lr}


def parameter_groups(model: torch.nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters: matrices decay, vectors (norms, biases) do not, and the regression head may have a rate of
    its own. Megatron-Core's rule and its group keys.
    """
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    rates = head_rates(optim)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (bool(rates) and is_head(name), parameter.dim() > 1 and not name.endswith(".bias"))
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": optim.weight_decay if decays else 0.0,
            "wd_mult": 1.0 if decays else 0.0,
            "lr_mult": 1.0,
            **(rates if own else {}),
        }
        for (own, decays), parameters in sorted(groups.items(), key=lambda item: (item[0][0], not item[0][1]))
    ]


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
