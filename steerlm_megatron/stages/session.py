"""What every command starts with: ranks, a run folder, a log; and how a loaded checkpoint becomes a model.

Owns: :func:`session` and :class:`LoadedModel`. Does not own: what commands do inside.
Invariant: one run folder per session, the same on all ranks, written by rank 0.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from steerlm_megatron.config.commands import COMMANDS
from steerlm_megatron.config.load import job_of_array, lays_out_training, to_yaml
from steerlm_megatron.config.schema import AttributesConfig, Config, ModelConfig, ParallelConfig
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.errors import UserError
from steerlm_megatron.model.gpt import PackedGPTModel, build_model
from steerlm_megatron.model.hf import HFFolder
from steerlm_megatron.model.lora import Lora, merge
from steerlm_megatron.model.weights import fill
from steerlm_megatron.observe.cost import CostMeter, combined, read_shares, remove_shares, total
from steerlm_megatron.observe.log import get_logger, setup_logging
from steerlm_megatron.observe.runfolder import RunFolder, default_run_dir, is_complete, read_summary
from steerlm_megatron.runtime import parallel
from steerlm_megatron.runtime.collectives import broadcast_object, gather_objects, on_main
from steerlm_megatron.runtime.device import (
    device_name,
    dtype_of,
    emulates_bf16,
    forget_peak_memory,
    peak_memory_gib,
)
from steerlm_megatron.runtime.parallel import Layout
from steerlm_megatron.stages import hub
from steerlm_megatron.stages.base import Base, open_base, prompts_of, scored_by
from steerlm_megatron.stages.published import schema_of_labels
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.templates import Template
from steerlm_megatron.train.checkpoint import verify
from steerlm_megatron.train.meta import CheckpointMeta
from steerlm_megatron.train.sharded import load_sharded

ARRAY = "array"  # folder in a run folder with those of the jobs of an array
NO_ATTRIBUTES = AttributeSchema("none", (), 1)  # of a model that takes none


@dataclass
class Session:
    """A running command: its configuration, this rank's coordinates, its folder."""

    config: Config
    layout: Layout
    run: RunFolder
    cost: CostMeter = field(default_factory=CostMeter)

    @property
    def folder(self) -> Path:
        return self.run.path

    @property
    def shared(self) -> Path:
        """The folder for what the jobs of an array share; without an array, the run folder."""
        return self.folder if job_of_array(self.config)[0] is None else self.folder.parent.parent


@contextmanager
def session(config: Config, inputs: str | None = None) -> Iterator[Session]:
    """Start ranks and the run folder of ``config.run_dir``; the summary says how the body ended. Collective over the
    world.

    ``inputs``: a fingerprint of what the run depends on, stored in its summary.
    """
    layout = _start_ranks(config)
    chosen = config.run_dir or on_main(lambda: str(default_run_dir(config.command)))
    path = broadcast_object(chosen)  # None on others than the main rank until here
    assert path is not None
    task, _ = job_of_array(config)
    if task is not None:  # each job of an array has a run folder of its own
        path = str(Path(path) / ARRAY / str(task))

    def folder() -> RunFolder:
        return RunFolder(path, config.command, overwrite=config.overwrite, rank=layout.rank)

    run = on_main(folder) or folder()  # the others' after the main one's, which may refuse
    setup_logging(run.path, layout.rank)
    run.start(to_yaml(config), inputs=inputs)
    on_main(lambda: hub.record(run.path))
    if COMMANDS[config.command].reads_key("engine.precision") and config.engine.precision == "bf16":
        warn_of_slow_bf16()
    with run, metered(layout, run) as cost:
        yield Session(config, layout, run, cost)
    if layout.is_main and is_complete(run.path):
        remove_shares(run.path)


@contextmanager
def metered(layout: Layout, run: RunFolder) -> Iterator[CostMeter]:
    """Yield this rank's account of the run's cost, and put the sum of all accounts into the summary in the end. If the
    body raises, the sum is of what ranks have written so far, since others may not have come here. Collective over the
    world.
    """
    forget_peak_memory()
    meter = CostMeter(
        run.path,
        attempt=broadcast_object(run.attempts),
        rank=layout.rank,
        ranks=layout.world_size,
        counts=layout.is_model_head,
        device=device_name(),
        peak_memory_gib=peak_memory_gib,
    )
    try:
        yield meter
    except BaseException:
        meter.keep()
        if layout.is_main:
            try:
                run.update(cost=cost_so_far(run, read_shares(run.path), meter.steps))
            except OSError as error:  # as on a full disk; what ended the run must not be hidden by this
                get_logger(__name__).warning("%s: the run's cost could not be written: %s", run.path, error)
        raise
    on_main(lambda: None)  # which may write for longer than a collective waits
    meter.keep()
    ended = {(one["attempt"], one["rank"]): one for one in gather_objects(meter.share())}
    if layout.is_main:
        earlier = {(one["attempt"], one["rank"]): one for one in read_shares(run.path)}
        run.update(cost=cost_so_far(run, list((earlier | ended).values()), meter.steps))


def cost_so_far(
    run: RunFolder, shares: Sequence[Mapping[str, Any]], steps: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the cost of a run: by the accounts ``shares`` of its ranks, with the costs of its ``steps``, which it also
    has one by one, and those of the jobs of an array that worked for it, which have the run's fingerprint.
    """
    cost, jobs = total(shares), []
    for path in sorted((run.path / ARRAY).glob("*/summary.json")):
        found = read_summary(path.parent) or {}
        if found.get("fingerprint") == run.fingerprint and found.get("cost"):
            jobs.append(found["cost"])
    if jobs:
        cost = combined([combined(jobs, at_once=True), cost])
    return {**combined([cost, *steps.values()]), "steps": dict(steps)} if steps else cost


@cache
def warn_of_slow_bf16() -> None:
    """Say once in a process that float32 would be faster here, by far: matrix products of a 135M model take 4 to 40
    times as long in bf16 on a CPU with AVX2.
    """
    if emulates_bf16():
        get_logger(__name__).warning(
            "this CPU has no instructions for bf16, and computes in it several times slower than in float32; set "
            "engine.precision=fp32"
        )


def _start_ranks(config: Config) -> Layout:
    """The groups of a command's layout; a command that is not for ranks is alone, whatever ``parallel.*`` says."""
    if lays_out_training(config):
        return parallel.initialize(config.parallel, config.train.seed, config.engine.timeout_sec)
    seed = 0  # what other commands draw has a seed of its own
    if not COMMANDS[config.command].ranks:
        return parallel.initialize(ParallelConfig(), seed)
    return parallel.initialize(inference_parallel(config.parallel), seed, config.engine.timeout_sec)


@dataclass
class OpenedCheckpoint:
    """What a checkpoint says of its model, without the weights."""

    folder: Path
    meta: CheckpointMeta
    tokenizer: Tokenizer
    schema: AttributeSchema | None
    template: Template
    hf: HFFolder | None = field(default=None, kw_only=True)
    after: str = field(default="", kw_only=True)  # what follows a closed conversation, if values are read at its end

    @property
    def scored_at_end(self) -> bool:
        """Whether a response's values are read at the last token of a conversation that ends with it, as in a
        classifier that somebody else made; ours reads them at a label marker that follows each response.
        """
        return self.hf is not None and self.hf.head == "regression" and not self.meta.template

    @property
    def model_config(self) -> ModelConfig:
        return self.meta.model_config()

    def free(self) -> None:
        """Give back the memory of weights, where there are any."""

    @property
    def conditioned_on(self) -> AttributeSchema | None:
        """The attributes that responses can be asked for; None for a model that takes none."""
        return self.schema if self.meta.conditioned else None


@dataclass
class LoadedModel(OpenedCheckpoint):
    """A checkpoint ready to compute with: this rank's part of the model in evaluation mode as well."""

    model: PackedGPTModel
    parallel: ParallelConfig

    def free(self) -> None:
        """Give the memory back before the next model is loaded."""
        del self.model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def inference_parallel(config: ParallelConfig) -> ParallelConfig:
    """The same ranks without what only training uses: token counts vary, so sequences are not split, and ranks that
    would share one are replicas.
    """
    data = None if config.data is None else config.data * config.context
    return ParallelConfig(tensor=config.tensor, pipeline=config.pipeline, data=data)


def open_checkpoint(
    path: str, key: str, head: str | None = None, asked: bool = True, attributes: AttributesConfig | None = None
) -> OpenedCheckpoint:
    """Read everything of a checkpoint but its weights.

    ``head``: ``lm``, a language model that responds, or ``ap``, an attribute-prediction model of either kind; another
    model is a UserError naming ``key``. None: any. ``asked``: whether the
    model will be sent prompts; a Hugging Face folder without a chat template is then a UserError. ``attributes``: what
    gives the values of somebody else's classifier names and a scale; one that has neither is a UserError if ``asked``.
    """
    base = open_base(path, key)
    folder, meta = base.folder, base.meta
    if head is not None:
        check_task(meta, head, f"{key}={path}")
    if base.hf is not None and meta.template:
        return _open_exported(base, key)
    if base.hf is not None and base.hf.head == "regression":
        return _open_classifier(base, base.hf, key, asked, attributes)
    if base.hf is not None:
        try:
            found, tokenizer = prompts_of(folder, key)
        except UserError:
            if asked:
                raise
            found, tokenizer = None, Tokenizer.from_path(folder)  # a model that is not asked may have any format
        if found is None and asked:
            raise UserError(
                f"{key}={path} has no chat template: its model continues text, and has no format for requests; "
                "fine-tune it first (steerlm train_sft init_from=...)"
            )
        template = found or Template.from_config({"name": "steerlm"})
        meta = dataclasses.replace(meta, template=template.to_dict())
        return OpenedCheckpoint(folder, meta, tokenizer, None, template, hf=base.hf)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    return OpenedCheckpoint(folder, meta, tokenizer, meta.attributes(), Template.from_dict(meta.template))


def _open_exported(base: Base, key: str) -> OpenedCheckpoint:
    """Read a Hugging Face folder that we exported."""
    template = Template.from_dict(base.meta.template)
    tokenizer = Tokenizer.from_path(base.folder, template.control_strings)
    if lacking := [text for text in template.control_strings if text in tokenizer.added]:
        raise UserError(
            f"{key}={base.folder}: its tokenizer lacks {' '.join(lacking)}, which the model was trained with"
        )
    return OpenedCheckpoint(base.folder, base.meta, tokenizer, base.meta.attributes(), template, hf=base.hf)


def _open_classifier(
    base: Base, hf: HFFolder, key: str, asked: bool, attributes: AttributesConfig | None
) -> OpenedCheckpoint:
    """Read a Hugging Face folder with a regression head that somebody else made."""
    told, meta = f"{key}={base.folder}", base.meta
    assert hf.labels is not None
    if not asked:
        tokenizer, template = Tokenizer.from_path(base.folder), Template.from_config({"name": "steerlm"})
        return OpenedCheckpoint(base.folder, meta, tokenizer, meta.attributes(), template, hf=hf)
    schema = meta.attributes() or schema_of_labels(hf.labels.names, attributes, told)
    template, tokenizer, after = scored_by(base.folder, key)
    if hf.custom is not None:
        get_logger(__name__).warning("%s: the values of its head are taken, and not %s", told, hf.custom.made)
    return OpenedCheckpoint(base.folder, meta, tokenizer, schema, template, hf=hf, after=after)


def load_model(
    path: str,
    config: Config,
    key: str,
    head: str | None = None,
    gather_logits: bool = False,
    asked: bool = True,
    attributes: AttributesConfig | None = None,
) -> LoadedModel:
    """Build and fill the model of a checkpoint at ``config.parallel``, adapters merged.

    ``head`` and ``attributes`` are as in :func:`open_checkpoint`. Collective over the world.
    """
    opened = open_checkpoint(path, key, head, asked, attributes)
    folder, meta, schema = opened.folder, opened.meta, opened.schema
    layout = inference_parallel(config.parallel)
    check_layout(meta.model_config(), layout, key)
    model = build_model(
        meta.model_config(),
        layout,
        config.engine,
        meta.vocab_size,
        attributes=_values_of(opened),
        gather_logits=gather_logits or head == "ap",
        lora=None if meta.lora is None else Lora.from_dict(meta.lora),
    )
    if opened.hf is not None:
        fill(opened.hf.weights(model, meta.vocab_size))
    else:
        verify(folder)
        state = load_sharded({"model": model.sharded_state_dict()}, folder)
        model.load_state_dict(state["model"])
        merge(model)
        meta = dataclasses.replace(meta, lora=None)
    model.to(dtype_of(config.engine.precision)).eval().requires_grad_(False)
    get_logger(__name__).info("loaded %s%s", folder, "" if opened.hf is not None else f" (step {meta.step})")
    return LoadedModel(
        folder, meta, opened.tokenizer, schema, opened.template, model, layout, hf=opened.hf, after=opened.after
    )


def _values_of(opened: OpenedCheckpoint) -> int | None:
    """Return how many values the model's head gives; None for a language model."""
    if opened.meta.head == "lm":
        return None
    if opened.hf is not None and opened.hf.labels is not None:
        return len(opened.hf.labels.names)
    assert opened.schema is not None
    return len(opened.schema.names)


def requested_best(config: Config, schema: AttributeSchema) -> dict[str, int]:
    """The levels that a model of ``schema`` is asked for where a user names none: the checkpoint's own best levels,
    overridden by ``attributes.best``. Complete, and in schema order.

    ``serve`` and ``generate`` take names and scale from the checkpoint, so they select no ``attributes`` group by
    default: what then stands in ``attributes.best`` was written by the user, and every key of it must be an attribute
    of the checkpoint, at one of its levels. With a group (``attributes=demo``, or an experiment that brings one) the
    group's best levels are asked for as well, and so a group of other attributes than the checkpoint's is refused.
    Levels of a group for attributes that the model never saw a label of are not asked for. A model without attributes
    (``schema.names`` empty) takes no level; a group is then no error, as an experiment brings it for all of its models,
    plain ones among them.

    Raises UserError for an attribute that the checkpoint lacks, or a level outside its scale.
    """
    chosen = config.attributes
    if not schema.names and chosen.names:
        return {}
    best = {name: level for name, level in chosen.best.items() if not (chosen.names and name in schema.unseen)}
    try:
        return schema.complete(best)
    except UserError as error:
        remedy = ""
        if chosen.names and set(chosen.names) != set(schema.names):
            remedy = f"; attributes={chosen.name} is not what the checkpoint was trained with: leave it out"
        raise UserError(f"attributes.best: {error}{remedy}") from None


def check_task(meta: CheckpointMeta, head: str, where: str) -> None:
    """Refuse a model of another task than ``head`` (``lm`` or ``ap``); ``where`` is the key and its value."""
    if meta.predicts != (head == "ap"):
        wanted = "an attribute-prediction model (train_ap)" if head == "ap" else "a language model (train_sft)"
        held = "an attribute-prediction model" if meta.predicts else "a language model"
        raise UserError(f"{where} holds {held} (task '{meta.task}'), needed is {wanted}")


def check_layout(model: ModelConfig, layout: ParallelConfig, key: str) -> None:
    """Refuse a layout that the checkpoint's model cannot be split into."""
    groups = model.num_query_groups or model.num_heads
    for name, value in (
        ("num_heads", model.num_heads),
        ("num_query_groups", groups),
        ("ffn_hidden_size", model.ffn_hidden_size),
    ):
        if value % layout.tensor:
            raise UserError(f"parallel.tensor={layout.tensor} must divide {name}={value} of the model in {key}")
    if model.num_layers % layout.pipeline:
        raise UserError(
            f"parallel.pipeline={layout.pipeline} must divide num_layers={model.num_layers} of the model in {key}"
        )
