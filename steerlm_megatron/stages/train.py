"""``train_ap`` and ``train_sft``: set up a Trainer from shards and a configuration.

Owns: the choice of the view, the checks that data, model and checkpoint fit together, building the engine. Does not
own: the loop (``train/loop.py``). Invariant: every mismatch is found before the model is built.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import psutil
import torch

from steerlm_megatron.config.load import head_values, paths_of, to_container
from steerlm_megatron.config.schema import Config, EngineConfig
from steerlm_megatron.data.feed.blend import Corpora, Rows
from steerlm_megatron.data.feed.dataset import ShardDataset
from steerlm_megatron.data.feed.loader import StepLoader, end_row
from steerlm_megatron.data.groups import Groups, read_groups
from steerlm_megatron.data.views import LABELLED, PREDICTION, View
from steerlm_megatron.data.write.preprocess import is_complete
from steerlm_megatron.errors import UserError
from steerlm_megatron.model.arithmetic import model_flops, multiplied_parameters
from steerlm_megatron.model.gpt import build_model, freeze_trunk
from steerlm_megatron.model.hf import PeftFolder
from steerlm_megatron.model.lora import Lora, freeze
from steerlm_megatron.model.weights import HEAD, REGRESSION_HEAD, initial_weights
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.observe.metrics import MetricsWriter, Throughput, peak_flops
from steerlm_megatron.observe.profiler import StepProfiler
from steerlm_megatron.observe.runfolder import versions
from steerlm_megatron.observe.sinks import sinks_of
from steerlm_megatron.plan.memory import layout_of, refuse_what_cannot_fit
from steerlm_megatron.runtime.collectives import on_main
from steerlm_megatron.runtime.device import device_name, has_cuda, total_memory
from steerlm_megatron.runtime.watch import Watch
from steerlm_megatron.stages.adapters import described, lora_of, merged_weights, merges
from steerlm_megatron.stages.base import Base
from steerlm_megatron.stages.demo_corpus import ensure_shards
from steerlm_megatron.stages.resume import check_init, check_resume, check_steps, data_order
from steerlm_megatron.stages.session import Session, session
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.templates import AUTO, Template
from steerlm_megatron.train.checkpoint import CheckpointStore, verify
from steerlm_megatron.train.engine import Engine
from steerlm_megatron.train.engine_mcore import MegatronEngine
from steerlm_megatron.train.group_objective import GroupObjective
from steerlm_megatron.train.loop import Trainer, TrainResult
from steerlm_megatron.train.meta import CheckpointMeta, read_meta, task_of
from steerlm_megatron.train.objective import Objective, RegressionObjective, TokenObjective

if TYPE_CHECKING:
    from steerlm_megatron.train.engine_deepspeed import DeepSpeedEngine

# Log messages for counts of the packing report about samples that are not trained unchanged.
_LEFT_OUT = {
    "truncated": "cut to train.row_tokens (data.overlong={})",
    "dropped_overlong": "longer than train.row_tokens left out (data.overlong={})",
    "dropped_masked": "left out: nothing in them to train on",
}

_VIEW_TITLES = {
    "ap": "attribute prediction",
    "ap_text": "attribute prediction as text",
    "acsft": "attribute-conditioned SFT",
    "sft": "plain SFT",
    "lm": "language modelling",
}


def run(config: Config) -> TrainResult:
    """Run the training command of ``config``. Collective over the world."""
    with session(config) as here:
        return train(here)


def view_of(config: Config) -> View:
    """Return the view of a stored conversation that this command trains on (``data/views.py``)."""
    if config.command == "train_ap":
        return "ap" if config.ap.kind == "regression" else "ap_text"
    if config.train.objective == "lm":
        return "lm"
    return "acsft" if config.attributes.names else "sft"


def train(here: Session) -> TrainResult:
    """Do one training run inside a session."""
    config = here.config
    view = view_of(config)
    # Only one rank compares checksums, which reads every byte; an error there ends the others.
    data, valid = open_data(config, verify=config.data.verify and here.layout.is_main)
    _check_data(config, data, view)
    base = check_init(config, data, view)
    lora = lora_of(config, data.tokenizer, base)
    check_memory(here, _vocab_size(data, base))
    counts = label_counts(config, data, view, base)
    groups = _groups(config, valid)
    rows = _pack(config, data, view, config.data.weights, groups)
    store = CheckpointStore(here.folder / "checkpoints", config.train.keep_last, config.train.keep_best)
    latest = store.latest()
    meta = _new_meta(config, data, view, counts, base, lora, groups)
    if latest:
        earlier = read_meta(latest)
        on_main(partial(check_resume, config, data, view, latest, earlier, lora, groups))
        meta = dataclasses.replace(meta, step=earlier.step, loader=earlier.loader)
    end = None if config.train.steps else end_row(rows, config.train.epochs)
    loaders = [_loader(here, rows, meta.loader.get("consumed_rows", 0), end)]
    if valid is not None:
        loaders.append(_loader(here, _pack(config, valid, view), 0))
    steps = config.train.steps or meta.step + loaders[0].steps_to(end or 0)
    if latest:
        on_main(partial(check_steps, config, steps, latest, meta))
    engine, initial, flops = _build_engine(config, data, view, steps, base, lora)
    if latest is not None:
        engine.load(latest)
        get_logger(__name__).info("resuming from %s at step %d of %d", latest, meta.step, steps)
    else:
        if base is not None and base.hf is None:
            verify(base.folder)
        engine.fill(initial)
        if base is not None and base.hf is None and not merges(config, lora, base):
            engine.load_model(base.folder)
    _announce(config, view, rows, loaders[0], steps)
    check_profile(config, here.layout.world_size, meta.step, steps)
    profiler = StepProfiler(here.folder, config.profile.steps, here.layout.rank, config.profile.ranks)
    sinks = on_main(lambda: sinks_of(config.tracking, here.folder, to_container(config))) or []
    with closing(MetricsWriter(here.folder, sinks=sinks, active=here.layout.is_main)) as metrics:
        if here.layout.is_main:
            metrics.truncate_after(meta.step)
        trainer = Trainer(
            config.train, engine, loaders[0], loaders[1] if valid is not None else None, store, meta,
            data.tokenizer.save, metrics, steps, Throughput(flops_of=flops, peak_flops=_peak(config, here)), profiler,
            Watch(config.engine.timeout_sec), here.cost, flops_of(config, _vocab_size(data, base), view, trains=False),
        )  # fmt: skip
        here.run.update(plan={"steps": steps})
        try:
            result = trainer.fit()
        finally:
            profiler.close()
            engine.close()
            for loader in loaders:
                loader.close()
    _summarise(here, rows, result)
    return result


def open_data(config: Config, verify: bool = False) -> tuple[Corpora, Corpora | None]:
    """Open the training corpora, and the validation corpora if there are any. ``verify`` compares checksums too."""
    train, valid = config.data.train, config.data.valid
    if train is None:
        train, valid = ensure_shards(config)
    folders = [Path(name) for name in paths_of(train)]
    held_out = [Path(name) for name in paths_of(valid)]
    if not held_out:  # take what preprocess wrote beside the training shards
        held_out = [path / "valid" for path in folders if _is_split(path) and is_complete(path / "valid")]
    folders = [path / "train" if _is_split(path) else path for path in folders]
    data = Corpora([ShardDataset.open(path, verify) for path in folders], "data.train")
    if not held_out:
        return data, None
    valid_data = Corpora([ShardDataset.open(path, verify) for path in held_out], "data.valid")
    Corpora(
        [data.datasets[0], valid_data.datasets[0]], "data.valid"
    )  # raises if training and validation data do not fit together
    return data, valid_data


def _is_split(path: Path) -> bool:
    """Return whether ``path`` was an output folder of ``preprocess``, with shards in ``train`` and ``valid``."""
    return not is_complete(path) and is_complete(path / "train")


def _groups(config: Config, valid: Corpora | None) -> Groups | None:
    """Return the groups of weighted responses that SteerLM 2.0 trains on; None for other objectives.

    Raises:
        UserError: there are validation shards, which have no weights.
    """
    if config.train.objective != "steerlm2":
        return None
    if valid is not None:
        raise UserError(
            f"train.objective=steerlm2: {valid.name} has validation data, and groups of responses have none; "
            "preprocess data.targets with data.valid_fraction=0, and leave data.valid out"
        )
    return read_groups(cast(str, config.data.targets), config.steerlm2.normalize)


def _pack(
    config: Config, data: Corpora, view: View, weights: Sequence[float] = (), groups: Groups | None = None
) -> Rows:
    """Return the packed rows of ``data``. The main rank packs and stores them, and the others read that. Collective
    over the world.
    """
    train = config.train

    def rows(store: bool) -> Rows:
        return data.rows(view, train.row_tokens, train.seed, config.data.overlong, weights, store, groups)

    return on_main(lambda: rows(True)) or rows(True)


def check_memory(here: Session, vocab_size: int) -> None:
    """Refuse a layout whose weights, gradients, optimizer and activations are more than this rank's GPU has, or, on
    CPUs, its share of the host's memory. It takes milliseconds.
    """
    config = here.config
    if not config.plan.check:
        return
    attributes = head_values(config)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    host = psutil.virtual_memory().total
    where, share = f"{device_name()}", total_memory() if has_cuda() else host // ranks
    if not has_cuda():
        where = f"a rank's share of this host's memory ({ranks} of them)" if ranks > 1 else "this host"
    # The fewest tokens with loss and the most samples in a row: what is refused cannot fit, whatever the data are.
    run = layout_of(config, here.layout.world_size, vocab_size, attributes, targets=1, least=True)
    refuse_what_cannot_fit(config, run, share, where, host, ranks)


def _loader(here: Session, rows: Rows, start_row: int, end_row: int | None = None) -> StepLoader:
    at = here.layout
    return StepLoader(
        rows, here.config.train, at.dp_rank, at.dp_size, start_row, end_row, cp_rank=at.cp_rank, cp_size=at.cp_size
    )


def _check_data(config: Config, data: Corpora, view: View) -> None:
    """Refuse shards whose schema or template differs from the configuration."""
    # template=auto is the one that the shards were made with.
    wanted = {} if config.template.name == AUTO else Template.from_config(config.template).to_dict()
    found = data.template.to_dict()
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UserError(
                f"template.{key}={value!r}, but {data.name} was preprocessed with {found.get(key)!r}; "
                f"set template.{key} to that or preprocess again"
            )
    if view not in LABELLED:
        return
    schema = AttributeSchema.from_config(config.attributes)
    if view in PREDICTION and not schema.names:
        raise UserError("attributes=none: an attribute-prediction model needs attributes; choose a schema")
    stored = data.schema
    if stored is None or stored.names != schema.names or stored.max_level != schema.max_level:
        had = "no attributes" if stored is None else f"{stored.name} ({', '.join(stored.names)}; 0-{stored.max_level})"
        raise UserError(
            f"attributes={schema.name} ({', '.join(schema.names)}; 0-{schema.max_level}), but "
            f"{data.name} was preprocessed with "
            f"{had}; choose the same attributes or preprocess again"
        )


def check_profile(config: Config, ranks: int, done: int, steps: int) -> None:
    """Refuse a profile of ranks that do not exist, and warn if the requested steps will not be run."""
    wanted = config.profile
    if not wanted.steps:
        return
    if absent := [rank for rank in wanted.ranks if not 0 <= rank < ranks]:
        raise UserError(f"profile.ranks={wanted.ranks}: there is no rank {absent[0]}; legal: 0 to {ranks - 1}")
    if wanted.steps[0] > steps or wanted.steps[1] <= done:
        get_logger(__name__).warning(
            "profile.steps=%s: no trace, this run goes from step %d to step %d", wanted.steps, done + 1, steps
        )


def label_counts(config: Config, data: Corpora, view: View, base: Base | None) -> dict[str, int]:
    """Count the labels of each attribute that the model has seen, including those of the checkpoint that it starts
    from, if that learnt to do with them what this model does (predict them, or respond by them).

    Attributes without labels are neither conditioned on nor predicted: a warning names them, and a ``UserError`` is
    raised if no attribute has labels.
    """
    if view not in LABELLED:
        return {}
    counts = data.label_counts()
    if not any(counts.values()):
        remedy = (
            "annotate the records first (steerlm annotate), or take attributes=none for plain SFT"
            if view == "acsft"
            else "an attribute-prediction model learns from labelled responses"
        )
        raise UserError(
            f"data.train={data.name}: no trained response has a value of attributes={config.attributes.name}; {remedy}"
        )
    if base is not None and base.meta.predicts == (view in PREDICTION):
        before = base.meta.label_counts
        counts = {name: count + before.get(name, 0) for name, count in counts.items()}
    if without := [name for name, count in counts.items() if not count]:
        it = "it" if len(without) == 1 else "them"
        outcome = f"is not conditioned on {it}"
        if view in PREDICTION:
            outcome = f"learns nothing of {it}, and annotate leaves {it} out"
        get_logger(__name__).warning(
            "%s: no trained response has a value of %s: the model %s",
            data.name, ", ".join(without), outcome,
        )  # fmt: skip
    return counts


def _new_meta(
    config: Config, data: Corpora, view: View, counts: dict[str, int], base: Base | None, lora: Lora | None,
    groups: Groups | None = None,
) -> CheckpointMeta:  # fmt: skip
    schema = data.schema if view in LABELLED else None
    return CheckpointMeta(
        step=0,
        task=task_of(view),
        model=dataclasses.asdict(config.model),
        vocab_size=_vocab_size(data, base),
        schema=schema.to_dict() if schema else None,
        template=data.template.to_dict(),
        tokenizer_hash=data.tokenizer.hash,
        label_mean=[None if math.isnan(v) else float(v) for v in data.label_mean()] if view in PREDICTION else [],
        label_counts=counts,
        base={} if base is None else base.meta.base,
        lora=described(config, lora, base),
        config=to_container(config),
        data=data_order(config, data, view, groups),
        parallel=dataclasses.asdict(config.parallel),
        versions=versions(),
    )


def _objective(config: Config, data: Corpora, view: View) -> Objective:
    if view == "ap":
        mean_A = torch.from_numpy(data.label_mean())
        return RegressionObjective(config.attributes.names, config.train.label_weights, mean_A)
    return GroupObjective() if config.train.objective == "steerlm2" else TokenObjective()


def _build_engine(
    config: Config, data: Corpora, view: View, steps: int, base: Base | None, lora: Lora | None
) -> tuple[Engine, Iterable[tuple[torch.nn.Parameter, torch.Tensor]], Callable[[int, float], float]]:
    """Return the engine, the weights to fill it with (not yet drawn or read), and the function that counts FLOPs
    (docs/numerics.md). Of a model that starts from a checkpoint, only a head that this may lack is drawn.
    """
    chunks, initial = [], []
    chunk_count = config.parallel.virtual_pipeline or 1
    vocab_size, within = _vocab_size(data, base), "" if base is None else HEAD if base.hf is None else REGRESSION_HEAD
    mean_A = torch.from_numpy(data.label_mean()).nan_to_num() if view == "ap" else None
    for stage in range(chunk_count):
        chunk = build_model(
            config.model,
            config.parallel,
            config.engine,
            vocab_size,
            attributes=len(config.attributes.names) if view == "ap" else None,
            vp_stage=stage if chunk_count > 1 else None,
            lora=lora,
        )
        if config.train.trainable == "head":
            freeze_trunk(chunk)
        if lora is not None:
            freeze(chunk)
        initial.append(initial_weights(chunk, config.model, vocab_size, config.train.seed, mean_A, within))
        if base is not None and base.hf is not None:
            tokenizer, weights = data.tokenizer, base.hf.weights
            if isinstance(base.hf, PeftFolder) and lora is not None and not config.lora.merge:
                weights = base.hf.apart
            initial.append(weights(chunk, vocab_size, (tokenizer.base_size, tokenizer.vocab_size)))
        elif base is not None and merges(config, lora, base):
            initial.append(merged_weights(config, base, chunk, stage if chunk_count > 1 else None))
        chunks.append(chunk)
    engine = engine_of(config.engine)(chunks, _objective(config, data, view), config.optim, config.engine, steps)
    return engine, itertools.chain(*initial), flops_of(config, vocab_size, view)


def _vocab_size(data: Corpora, base: Base | None) -> int:
    """Return the rows of the embedding: the tokenizer's ids, or those of the run's base, if more."""
    return max(data.tokenizer.vocab_size, 0 if base is None else base.meta.vocab_size)


def flops_of(config: Config, vocab_size: int, view: View, trains: bool = True) -> Callable[[int, float], float]:
    """Return a function from useful tokens and Σ s² to model FLOPs (docs/numerics.md). A frozen trunk has no backward
    pass and takes a third of them; below adapters there are gradients of activations, and none of the weights.
    ``trains=False``: those of a forward pass alone.
    """
    model, multiplied = config.model, multiplied_parameters(config.model, vocab_size, head=view == "ap")
    width = (model.head_dim or model.hidden_size // model.num_heads) * model.num_heads
    backward = trains and config.train.trainable != "head"
    spared = 2.0 * multiplied if trains and config.train.trainable == "lora" else 0.0

    def flops(tokens: int, squares: float) -> float:
        total = model_flops(multiplied, model.num_layers, width, tokens, squares, training=backward)
        return total - spared * tokens

    return flops


def engine_of(engine: EngineConfig) -> type[MegatronEngine] | type[DeepSpeedEngine]:
    """Return the engine's class. DeepSpeed is imported only when it is chosen, since that takes seconds."""
    if engine.name == "deepspeed":
        from steerlm_megatron.train.engine_deepspeed import DeepSpeedEngine

        return DeepSpeedEngine
    return MegatronEngine


def _peak(config: Config, here: Session) -> float | None:
    """Return the peak FLOP/s of all devices together, for ``mfu``; None if it is unknown."""
    stated = config.tracking.peak_tflops
    one = 1e12 * stated if stated else peak_flops(device_name(), config.engine.precision)
    return one * here.layout.world_size if one else None


def _announce(config: Config, view: View, rows: Rows, loader: StepLoader, steps: int) -> None:
    report = rows.report()
    title = "SteerLM 2.0" if config.train.objective == "steerlm2" else _VIEW_TITLES[view]
    get_logger(__name__).info(
        "%s on %s samples in %d rows of %d tokens, fill %.3f; %d rows a step, %d steps",
        title,
        report["samples"], len(rows), rows.row_tokens, report["fill"], loader.rows_per_step, steps,
    )  # fmt: skip
    if rows.samples < config.train.global_batch_samples:
        get_logger(__name__).warning(
            "train.global_batch_samples=%d, but %s has %d samples an epoch: a step takes all of them once",
            config.train.global_batch_samples, rows.corpora.name, rows.samples,
        )  # fmt: skip
    for folder, part in report.get("corpora", {}).items():
        get_logger(__name__).info(
            "%s: %d samples in %d rows, %d rows an epoch (%.1f %%)",
            folder, part["samples"], part["rows"], part["rows_per_epoch"], 100 * part["rows_per_epoch"] / len(rows),
        )  # fmt: skip
    for key, words in _LEFT_OUT.items():
        if report[key]:
            get_logger(__name__).info("%d samples %s", report[key], words.format(config.data.overlong))
    if rows.groups is not None and report["dropped_overlong"]:
        get_logger(__name__).warning(
            "SteerLM 2.0: %d of %d samples are in groups that are longer than train.row_tokens=%d, and are not trained "
            "on", report["dropped_overlong"], report["samples_total"], rows.row_tokens,
        )  # fmt: skip


def compare_with_constant(valid: Mapping[str, float]) -> None:
    """Warn of attributes that a predictor knows no better than the training labels' mean does."""
    pairs = {
        key.removeprefix("mse/"): (value, valid[f"constant_{key}"])
        for key, value in valid.items()
        if key.startswith("mse/") and f"constant_{key}" in valid
    }
    if worse := [
        f"{name} ({own:.3g}, the mean's is {beside:.3g})" for name, (own, beside) in pairs.items() if own >= beside
    ]:
        get_logger(__name__).warning(
            "on the validation set, the mean squared error is no smaller than that of predicting the training labels' "
            "mean for %d of %d attributes: %s; train longer, with more labels or another optim.lr, or do not steer by "
            "them",
            len(worse), len(pairs), ", ".join(worse),
        )  # fmt: skip


def _summarise(here: Session, rows: Rows, result: TrainResult) -> None:
    best = "" if result.best_valid_loss is None else f", best validation loss {result.best_valid_loss:.4g}"
    get_logger(__name__).info("trained to step %d%s; checkpoint: %s", result.steps, best, result.checkpoint)
    compare_with_constant(result.valid)
    here.run.update(
        counts={**rows.report(), "steps": result.steps, "tokens": result.tokens},
        metrics={
            "loss": result.loss,
            "best_valid_loss": result.best_valid_loss,
            **{f"valid/{k}": v for k, v in result.valid.items()},
        },
        timings={f"{part}_sec": seconds for part, seconds in result.seconds.items()},
        outputs={"checkpoint": str(result.checkpoint)},
    )
