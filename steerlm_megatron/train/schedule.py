"""The learning-rate schedule: Megatron-Core's, with the rate of step k (counted from 1) in force during step k."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from steerlm_megatron.config.schema import OptimConfig
from steerlm_megatron.train.adam import head_rates


def build_schedule(optimizer: Any, optim: OptimConfig, steps: int) -> OptimizerParamScheduler:
    """Warmup from 0 over ``optim.warmup_steps``, then ``optim.schedule`` down to ``optim.min_lr`` at ``steps``.

    Step :meth:`OptimizerParamScheduler.step` by one *before* each optimizer step: the first step then trains.
    """
    steps = max(1, steps)
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=min(optim.min_lr, optim.lr),
        lr_warmup_steps=min(optim.warmup_steps, steps - 1),
        lr_decay_steps=steps,
        lr_decay_style=optim.schedule,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    schedule.head_rates = head_rates(optim)
    return schedule


def rates_now(schedule: OptimizerParamScheduler) -> tuple[float, dict[str, float]]:
    """The learning rate in force, and as a metric that of the regression head, where it has one of its own."""
    head = schedule.head_rates
    return schedule.get_lr({}), {"head_lr": schedule.get_lr(head)} if head else {}
