"""``steerlm plan`` of the commands that draw or score: what is asked of which model.

Owns: the model's shape and the amount of work, from the configuration and the checkpoint. Does not own: bytes, times
and words (``plan/serving.py``). Invariant: a checkpoint's metadata are read, never its weights.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from steerlm_megatron.config.inference import CHUNK_TOKENS, SCORED_TOKENS
from steerlm_megatron.config.schema import Config, EngineConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.plan.hardware import hardware
from steerlm_megatron.plan.serving import (
    Net,
    ServingPlan,
    Task,
    Work,
    layouts,
    propose,
    serving_plan,
)
from steerlm_megatron.plan.workload import stated
from steerlm_megatron.stages.session import check_layout, check_task

DRAWING = ("generate", "bootstrap", "serve")
SCORING = ("annotate", "weigh")

_LOWER_BOUND = (
    "times are lower bounds: the host's work between passes and the latency of collectives are left out (docs/cost.md)"
)


def plan_of_serving(config: Config, ranks: int) -> ServingPlan:
    """Return the plan of a command that draws or scores on ``ranks`` GPUs. The configuration is finalised.

    Raises:
        UserError: nothing says what the model is, or it is not one that the command takes.
    """
    gpu = hardware(config.plan.hardware)
    net = _net(config)
    check_layout(net.model, config.parallel, "checkpoint" if config.checkpoint else "the configuration")
    task = _task(config, net)
    work = _work(net, task, config.engine)
    made = serving_plan(net, task, config.parallel, config.engine, gpu, ranks, work)
    if config.plan.search or not made.fits:
        found = layouts(net, task, config.parallel, config.engine, gpu, ranks, work)
        propose(made, found, config.plan.top, asked=config.plan.search)
    if config.command == "bootstrap":
        made.notes.append("the responses are scored after they are drawn: steerlm plan annotate checkpoint=AP")
    if config.generation.engine == "vllm" and task.draws:
        made.notes.append("generation.engine=vllm lays out memory by itself; this is the plan of our engine")
    made.notes.append(_LOWER_BOUND)
    return made


def _work(net: Net, task: Task, engine: EngineConfig) -> Work:
    """Return what says how many bytes a pass takes: those of two layers of the real model, run on ``meta``."""

    @cache
    def work(tensor: int, last: bool) -> int:
        from steerlm_megatron.plan.trace import batch_of, forward_peak

        head = net.attributes if last else 1  # a stage in front of others has no logits either
        outputs = task.outputs if head is None else 1
        batch = batch_of((task.pass_tokens,), 1, task.pass_tokens, head or 0, outputs / task.pass_tokens)
        return forward_peak(
            net.model, tensor, engine, net.vocab_size, head, batch, labels=head is None and not task.draws
        )

    return work


def _net(config: Config) -> Net:
    """Return the model of ``checkpoint``, or the one that ``model.*`` describes where there is no checkpoint yet."""
    scores = config.command == "annotate"
    if config.checkpoint is not None:
        from steerlm_megatron.stages.base import open_base

        meta = open_base(config.checkpoint, "checkpoint").meta
        check_task(meta, "ap" if scores else "lm", f"checkpoint={config.checkpoint}")
        head = len((meta.schema or {}).get("names", ())) or 1 if meta.task == "ap_regression" else None
        return Net(meta.model_config(), meta.vocab_size, head)
    if config.plan.vocab_size is None:
        raise UserError("set checkpoint, or an experiment (or model=NAME) with plan.vocab_size for a model to come")
    regression = scores and config.ap.kind == "regression"
    return Net(config.model, config.plan.vocab_size, len(config.attributes.names) or 1 if regression else None)


def _task(config: Config, net: Net) -> Task:
    """Return how much is drawn or scored, by ``plan.lengths``, ``plan.loss_share`` (the responses' share) and
    ``plan.samples``. Without lengths, drawn sequences are as long as they may be.
    """
    plan, limits, sampling = config.plan, config.generation, config.sampling
    draws = config.command in DRAWING
    longest = min(limits.max_sequence_tokens, net.model.max_position)
    mean = sum(plan.lengths) / len(plan.lengths) if plan.lengths else None
    if draws:
        response = float(min(sampling.max_tokens, longest - 1))
        prompt = float(longest - response)
        if mean is not None:
            response = max(1.0, min(response, mean * plan.loss_share)) if plan.loss_share < 1 else response
            prompt = min(prompt, mean * (1 - plan.loss_share)) if plan.loss_share < 1 else min(prompt, mean)
        chunk = limits.chunk_tokens or CHUNK_TOKENS["cuda"]
        each = config.bootstrap.responses_per_prompt if config.command == "bootstrap" else 1
        # A server has no end.
        sequences = None if plan.samples is None or config.command == "serve" else plan.samples * each
        return Task(
            config.command, True, sequences, prompt, response, chunk + limits.max_batch, limits.max_batch,
            replace(limits),
        )  # fmt: skip
    tokens = config.scoring.batch_tokens or SCORED_TOKENS["cuda"]
    work = stated(config, tokens)
    length = work.tokens / work.samples
    share = plan.loss_share
    outputs = 0 if net.attributes is not None else max(1, round(tokens * share))
    return Task(
        config.command, False, plan.samples, length * (1 - share), length * share, tokens, outputs, replace(limits),
        work,
    )  # fmt: skip
