"""``steerlm plan COMMAND …``: memory and time of a run, before there is one; for ``run`` the cost of its steps, too.

Owns: what of a configuration, its data and its checkpoint the plan is made of; the order of work; the output. Does not
own: the arithmetic (``model/arithmetic.py``, ``plan/``), commands that draw or score (``plan_serving.py``). Invariant:
nothing is written but ``plan.output``, and no GPU is used.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from steerlm_megatron.config import compose, load
from steerlm_megatron.config.commands import COMMANDS
from steerlm_megatron.config.schema import KEYS, Config, ParallelConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import write_json_atomic
from steerlm_megatron.model.arithmetic import BYTES, checkpoint_bytes
from steerlm_megatron.plan import memory
from steerlm_megatron.plan.hardware import Hardware, hardware
from steerlm_megatron.plan.report import Plan, Stage, text
from steerlm_megatron.plan.search import search
from steerlm_megatron.plan.serving import ServingPlan
from steerlm_megatron.plan.timing import step_time
from steerlm_megatron.plan.workload import Workload, packed, stated
from steerlm_megatron.stages import hub
from steerlm_megatron.stages.plan_run import add_costs
from steerlm_megatron.stages.plan_serving import DRAWING, SCORING, plan_of_serving

_SAMPLED_ROWS = 256


def plan(arguments: Sequence[str]) -> None:
    """Print the plan of a command line.

    Raises:
        UserError: the command cannot be planned, its configuration is wrong, or its layout does not fit.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ranks of a plan are on no device
    made = plan_of(arguments)
    print(text(made) if isinstance(made, Plan) else made.text())
    if made.lacking is not None:
        raise UserError(f"does not fit: {made.lacking}")


def plan_of(arguments: Sequence[str]) -> Plan | ServingPlan:
    """Return the plan of a command line, without the word ``plan``."""
    trains = [name for name, command in COMMANDS.items() if command.trains]
    known = [*trains, *SCORING, *DRAWING]
    if not arguments or arguments[0] not in known:
        raise UserError(f"steerlm plan COMMAND [key=value ...]: name the command first; legal: {' '.join(known)}")
    command, *overrides = arguments
    own = [override for override in overrides if override.startswith("plan.")]
    # A checkpoint that is still to be trained has the shape that model.* says, which only training reads by itself.
    shape = [o for o in overrides if command not in trains and o.partition("=")[0].split(".")[0] == "model"]
    if wrong := [key for key in (override.partition("=")[0] for override in own) if key not in KEYS]:
        raise UserError("\n".join(f"{key}: no such key{compose.nearest(key, KEYS)}" for key in wrong))
    compose.check(command, [override for override in overrides if override not in (*own, *shape)])
    config = load.from_container(compose.composed(command, overrides))
    hub.resolve(config)
    if config.init_from is not None:
        from steerlm_megatron.stages.base import adopt_shape

        adopt_shape(config, overrides)
    ranks = config.plan.gpus or load.world_of(config)
    if command not in trains and config.plan.search and ranks % load.world_of(config):
        config.parallel = ParallelConfig()  # a recipe's layout for training; the search finds one for this command
    load.finalize(config, ranks, alone=command in trains)  # another command may be planned before its inputs exist
    made: Plan | ServingPlan
    made = training_plan(config, ranks) if command in trains else plan_of_serving(config, ranks)
    if config.plan.output is not None:
        try:
            write_json_atomic(Path(config.plan.output), made.to_dict())
        except OSError as error:
            raise UserError(f"plan.output={config.plan.output} cannot be written ({error.strerror})") from None
    return made


def training_plan(config: Config, ranks: int) -> Plan:
    """Return the plan of a training command on ``ranks`` GPUs. The configuration is finalised."""
    gpu = hardware(config.plan.hardware)
    work, found_vocabulary = workload_of(config)
    vocab_size = config.plan.vocab_size or found_vocabulary
    if vocab_size is None:
        raise UserError(
            "plan.vocab_size is not set, and neither data.train nor init_from says how many tokens there are"
        )
    attributes = load.head_values(config)
    rows = work.rows_per_step(config.train.global_batch_samples)
    p, micro_rows = config.parallel, config.train.micro_batch_rows
    data = max(1, ranks // (p.tensor * p.pipeline * p.context))
    micro_batches = -(-rows // (data * min(micro_rows, -(-rows // data))))
    run = memory.Layout(ranks, vocab_size, attributes, micro_batches, work.most_targets * micro_rows)
    made = Plan(
        config.command, _words(config, data), ranks, gpu, stages_of(config, run, work),
        work=work,
        time=step_time(config.model, p, config.engine, work, gpu, ranks, vocab_size, rows, micro_rows,
                       attributes is not None),
        steps=_steps(config, work, rows),
        checkpoint_bytes=checkpoint_bytes(config.model, vocab_size, config.engine.precision, attributes),
    )  # fmt: skip
    if config.command == "run":
        add_costs(made, config, work, gpu, ranks, vocab_size)
    nodes = max(1, -(-ranks // gpu.gpus_per_node))
    made.checkpoint_seconds = made.checkpoint_bytes / (1e9 * gpu.disk_gb_per_sec * nodes)
    if data > rows:
        made.notes.append(f"{data} replicas share {rows} rows of a step: {data - rows} of them compute padding")
    if config.train.trainable != "all":
        made.notes.append(
            f"times are those of training all weights; train.trainable={config.train.trainable} takes less"
        )
    if config.plan.search:
        found = search(config, gpu, work, ranks, vocab_size, attributes)
        made.fallen = found.fallen
        made.proposals = [
            {
                "overrides": " ".join(memory.differences(config, one.config)) or "as it is",
                "seconds": one.time.seconds,
                "tokens_per_sec": one.time.tokens / one.time.seconds,
                "mfu": one.time.flops / one.time.seconds / (ranks * gpu.peak("bf16")),
                "bytes": one.memory.total,
            }
            for one in found.proposals
        ]
        if not found.proposals:
            made.notes.append(f"none of {found.tried} layouts of {ranks} GPUs fits")
    elif not made.fits:
        near = memory.nearest_fitting(config, run, gpu.memory, int(1e9 * gpu.host_memory_gb), gpu.gpus_per_node)
        made.notes.append(f"this fits: {near}" if near else f"no layout of {ranks} GPUs fits")
    return made


def workload_of(config: Config) -> tuple[Workload, int | None]:
    """Return what there is to train on, and the vocabulary if data or the base say it."""
    vocabulary = None
    if config.init_from is not None:
        from steerlm_megatron.stages.base import open_base

        vocabulary = open_base(config.init_from, "init_from").meta.vocab_size
    if config.data.train is None:
        return stated(config), vocabulary
    import numpy as np

    from steerlm_megatron.stages.train import open_data, view_of

    data, _ = open_data(config)
    rows = data.rows(
        view_of(config), config.train.row_tokens, config.train.seed, config.data.overlong, config.data.weights,
        store=False,
    )  # fmt: skip
    lengths = np.concatenate([dataset.lengths(view_of(config)) for dataset in data.datasets])
    lengths = np.minimum(lengths[lengths > 0], config.train.row_tokens)
    chosen = np.unique(np.linspace(0, len(rows) - 1, _SAMPLED_ROWS).astype(np.int64))
    targets = [
        sum(len(s.pool_P) if view_of(config) == "ap" else int(s.loss_mask_T.sum()) for s in rows.samples_of(row))
        for row in chosen.tolist()
    ]
    work = packed(lengths, config.train.row_tokens, 1.0, None, data.name)
    work = replace(
        work, rows=len(rows), samples=rows.samples_per_row, targets=float(np.mean(targets)),
        most_targets=max(1, max(targets)),
    )  # fmt: skip
    return work, max(data.tokenizer.vocab_size, vocabulary or 0)


def stages_of(config: Config, run: memory.Layout, work: Workload) -> list[Stage]:
    """Return the bytes of every stage: those of the real engine on ``meta`` for the first, the second and the last
    stage; the others are like the second one, by formula, put right by what its trace differs. Of DeepSpeed's engine
    the activations are those of the same modules in Megatron-Core's, and all else is by formula.
    """
    rows = [memory.stage_memory(config, run, stage) for stage in range(config.parallel.pipeline)]
    out = [
        Stage(
            one.stage, one.parameters, one.state.weights, one.state.gradients, one.state.optimizer, one.activations,
            one.logits, one.buffers, one.state.host, traced=False,
        )
        for one in rows
    ]  # fmt: skip
    zero = config.engine.name == "deepspeed"
    from steerlm_megatron.plan import trace
    from steerlm_megatron.train.objective import RegressionObjective, TokenObjective

    head = run.attributes is not None
    objective = RegressionObjective(config.attributes.names) if head else TokenObjective()
    share = min(1.0, work.most_targets / max(1, sum(work.lengths)))
    batch = trace.batch_of(
        work.lengths, config.train.micro_batch_rows, config.train.row_tokens, run.attributes or 0, share
    )
    world = run.ranks
    ranks = trace.stages(config, world)
    if zero:
        config = replace(config, engine=replace(config.engine, name="megatron", offload="none"))
    traced = sorted({0, min(1, len(out) - 1), len(out) - 1})
    for number in traced:
        held = trace.trace_deep(
            config, objective, run.vocab_size, run.attributes, batch, run.micro_batches, "cuda", ranks[number], world
        )
        if zero:
            out[number] = replace(out[number], activations=held.activations, traced=True)
            continue
        out[number] = replace(
            out[number], parameters=held.parameters, weights=held.weights, gradients=held.gradients,
            optimizer=held.optimizer, activations=held.activations, traced=True,
        )  # fmt: skip
    if len(out) > 3:
        more = out[1].activations - rows[1].activations
        for stage in out[2:-1]:
            stage.activations += more
    if config.train.async_save:
        for stage in out:
            # A rank copies what it writes: its share of the optimizer, and the weights. Under ZeRO the first replica
            # puts whole parameters and their states together.
            whole = stage.parameters * (BYTES[config.engine.precision] + 12)
            stage.host += whole if zero else stage.optimizer + stage.weights
    return out


def _steps(config: Config, work: Workload, rows: int) -> int | None:
    if config.train.steps is not None:
        return config.train.steps
    return None if work.rows is None else max(1, -(-round(config.train.epochs * work.rows) // rows))


def _words(config: Config, data: int) -> str:
    p, engine = config.parallel, config.engine
    words = [f"tensor {p.tensor}" + (" with sequence" if p.sequence else ""), f"pipeline {p.pipeline}"]
    if p.virtual_pipeline:
        words[-1] += f" x {p.virtual_pipeline} chunks"
    words += [f"context {p.context}", f"data {data}"]
    name = f"ZeRO {engine.zero_stage}" if engine.name == "deepspeed" else "distributed optimizer"
    offload = f", {engine.offload} offloaded" if engine.offload != "none" else ""
    return f"{', '.join(words)}; {name}{offload}, {engine.precision}, recompute {engine.recompute}"


__all__ = ["Hardware", "plan", "plan_of", "stages_of", "training_plan", "workload_of"]
