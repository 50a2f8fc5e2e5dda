"""Rules between several keys of a training run: the engine, what is minimised, which weights are trained.

Owns: those rules. Does not own: rules of single keys (beside the keys, ``fields.py``), rules of models, layouts and
corpora, and reporting all problems at once (``load.py``). Invariant: a key that a run would ignore is an error that
says to leave it out.
"""

from __future__ import annotations

from steerlm_megatron.config.schema import Config, EngineConfig, LoraConfig


def check_engine(config: Config) -> list[str]:
    engine, layout, defaults = config.engine, config.parallel, EngineConfig()
    other, keys = "deepspeed", ["zero_stage", "offload"]
    if engine.name == "deepspeed":
        other, keys = "megatron", ["overlap_grad_reduce", "overlap_param_gather", "bucket_parameters"]
    problems = [
        f"engine.{key}={getattr(engine, key)} is of engine={other}; leave it out, or take that engine"
        for key in keys
        if getattr(engine, key) != getattr(defaults, key)
    ]
    if engine.name != "deepspeed":
        if engine.overlap_param_gather and engine.overlap_grad_reduce is False:
            problems.append(
                "engine.overlap_param_gather=true with engine.overlap_grad_reduce=false: Megatron-Core gathers beside "
                "computing only where it reduces so; leave the second out"
            )
        return problems
    if engine.zero_stage not in (1, 2, 3):
        problems.append(f"engine.zero_stage={engine.zero_stage}; legal: 1 2 3")
    if engine.offload == "all" and engine.zero_stage != 3:
        problems.append(
            f"engine.offload=all needs engine.zero_stage=3, not {engine.zero_stage}; or take offload=optimizer"
        )
    if layout.pipeline > 1 or layout.virtual_pipeline is not None:
        problems.append(
            f"parallel.pipeline={layout.pipeline} with engine=deepspeed: ZeRO takes the place of pipelines; set "
            "parallel.pipeline=1 and engine.zero_stage=3, or take engine=megatron"
        )
    return problems


def check_objective(config: Config, alone: bool) -> list[str]:
    """Return an error for each key of one training command that was given to the other, which does not read it."""
    train, problems = config.train, []
    if config.command == "train_ap" and train.objective != "sft":
        problems.append(f"train.objective={train.objective} is of train_sft; train_ap learns labels: leave it out")
    if config.command == "train_sft" and train.label_weights:
        problems.append(
            f"train.label_weights={train.label_weights} is of train_ap; train_sft has no labels: leave it out"
        )
    problems += _check_groups(config, alone)
    if config.command == "train_ap" and config.ap.kind == "generative":
        remedy = "is of ap.kind=regression; ap.kind=generative has no regression head: leave it out, or set"
        if train.label_weights:
            problems.append(f"train.label_weights={train.label_weights} {remedy} train.label_weights={{}}")
        if train.trainable == "head":
            problems.append(f"train.trainable=head {remedy} train.trainable=all")
        if config.optim.head_lr is not None:
            problems.append(f"optim.head_lr={config.optim.head_lr:g} {remedy} optim.head_lr=null")
        if not config.model.head_bias:
            problems.append(f"model.head_bias=false {remedy} model.head_bias=true")
    return problems


def _check_groups(config: Config, alone: bool) -> list[str]:
    """Return errors of training on weighted groups of responses (SteerLM 2.0). In a pipeline, which has steps of other
    objectives beside it, ``steerlm2.normalize`` is for those that read it.
    """
    if config.command != "train_sft":
        return []
    targets = config.data.targets
    if config.train.objective != "steerlm2":
        problems = [f"data.targets={targets} is of train.objective=steerlm2; leave it out"] if targets else []
        if alone and config.steerlm2.normalize != "none":
            problems.append(
                f"steerlm2.normalize={config.steerlm2.normalize} is of train.objective=steerlm2; leave it out"
            )
        return problems
    problems = []
    if targets is None:
        problems.append("train.objective=steerlm2: data.targets is not set: name the record file of steerlm weigh")
    if config.data.valid is not None:
        problems.append(f"train.objective=steerlm2: data.valid={config.data.valid} has no weights; leave it out")
    if not config.attributes.names:
        problems.append("train.objective=steerlm2 trains a conditioned model: choose the attributes of its checkpoint")
    if config.init_from is None:
        problems.append("train.objective=steerlm2 goes on from the model that the responses were drawn from: name it "
                        "with init_from=")  # fmt: skip
    for key, value in (("model.dropout", config.model.dropout), ("lora.dropout", config.lora.dropout)):
        if value:
            problems.append(
                f"{key}={value:g} with train.objective=steerlm2: probabilities with dropout are not those of the model "
                "that the responses were drawn from; set it to 0"
            )
    return problems


def check_trainable(config: Config) -> list[str]:
    if config.train.trainable != "head":
        return []
    problems = []
    if config.command not in ("train_ap", "run", ""):
        problems.append(f"train.trainable=head is of train_ap; {config.command} trains the whole model: leave it out")
    if config.parallel.pipeline > 1:
        problems.append(
            f"train.trainable=head with parallel.pipeline={config.parallel.pipeline}: stages without a head have "
            "nothing to train; set parallel.pipeline=1, with parallel.tensor or engine.zero_stage=3 (engine=deepspeed)"
        )
    return problems


def check_lora(config: Config, alone: bool) -> list[str]:
    """Return errors of adapters, and of a rate of the regression head where there is none."""
    problems, training = [], config.command in ("train_ap", "train_sft")
    adapts = config.train.trainable == "lora"
    if config.command == "train_sft" and config.optim.head_lr is not None:
        problems.append(
            f"optim.head_lr={config.optim.head_lr:g} is of train_ap; train_sft has no regression head: leave it out"
        )
    if training and alone and adapts and config.init_from is None:
        problems.append("train.trainable=lora adapts a model that is there: name it with init_from=")
    if training and alone and not adapts:
        given = [name for name, value in vars(LoraConfig()).items() if getattr(config.lora, name) != value]
        free = ("base",)  # says where a PEFT adapter's base is, which is merged then
        problems += [
            f"lora.{name}={getattr(config.lora, name)} does nothing without train.trainable=lora; leave it out"
            for name in given
            if name not in free
        ]
    if config.command == "export":
        e = config.export
        if e.adapter and e.format != "hf":
            problems.append(f"export.adapter=true with export.format={e.format}: an adapter alone has format=hf")
        if e.base is not None and not e.adapter:
            problems.append(f"export.base={e.base} is of export.adapter=true; leave it out")
    return problems
