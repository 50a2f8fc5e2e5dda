"""The configuration of every command: one object, whose sections are declared in the modules beside this one.

Owns: the sections, and the keys outside of sections. Does not own: which keys a command reads (``commands.py``),
reading YAML (``load.py``) or command lines (``compose.py``). Invariant: some command reads each key that is declared
here; a key that is not declared is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steerlm_megatron.config.ablation import AblationConfig
from steerlm_megatron.config.cluster import ArrayConfig, ClusterConfig
from steerlm_megatron.config.corpora import SOURCES, AttributesConfig, DataConfig, TemplateConfig, TokenizerConfig
from steerlm_megatron.config.fields import Key, a_path_or_several, keys_of, option
from steerlm_megatron.config.inference import (
    AnnotateConfig,
    BootstrapConfig,
    EvaluateConfig,
    EvaluateModels,
    ExportConfig,
    GenerationConfig,
    SamplingConfig,
    ScoringConfig,
    ServerConfig,
)
from steerlm_megatron.config.steerlm2 import Steerlm2Config
from steerlm_megatron.config.training import (
    ApConfig,
    EngineConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PlanConfig,
    ProfileConfig,
    TrackingConfig,
    TrainConfig,
)

__all__ = [
    "KEYS", "RENAMED", "SOURCES", "AblationConfig", "AnnotateConfig", "ApConfig", "ArrayConfig", "AttributesConfig",
    "BootstrapConfig", "ClusterConfig", "Config", "DataConfig", "EngineConfig", "EvaluateConfig", "EvaluateModels",
    "ExportConfig", "GenerationConfig", "LoraConfig", "ModelConfig", "OptimConfig", "ParallelConfig", "PlanConfig",
    "ProfileConfig", "SamplingConfig", "ScoringConfig", "ServerConfig", "Steerlm2Config", "TemplateConfig",
    "TokenizerConfig", "TrackingConfig", "TrainConfig",
]  # fmt: skip


@dataclass
class Config:
    """Everything that commands read. ``commands.py`` declares which command reads which section."""

    command: str = option("", "the command; set by its own configuration file")
    run_dir: str | None = option(None, "the run's folder; null: runs/<command>/<time>")
    overwrite: bool = option(False, "replace a complete run, shards or an export that stand there")
    steps: list[str] = option([], "run: only these steps, after those that they need; empty: all")
    init_from: str | None = option(
        None, "what training starts from: run folder, checkpoint, Hugging Face folder or owner/name; null: from scratch"
    )
    checkpoint: str | None = option(
        None, "run folder, checkpoint, Hugging Face folder or owner/name on its hub of the model that is used"
    )
    ap_checkpoint: str | None = option(None, "the same of the attribute-prediction model")
    input: Any = option(
        None,
        a_path_or_several(),
        "record files: one, a glob, or a list; report: a run folder, or several to compare",
    )
    output: str | None = option(None, "record file to write; export: the folder")
    model: ModelConfig = option(ModelConfig, "the model")
    parallel: ParallelConfig = option(ParallelConfig, "the layout of ranks")
    engine: EngineConfig = option(EngineConfig, "the engine")
    optim: OptimConfig = option(OptimConfig, "the optimizer")
    lora: LoraConfig = option(LoraConfig, "low-rank adapters")
    attributes: AttributesConfig = option(AttributesConfig, "the attribute schema")
    template: TemplateConfig = option(TemplateConfig, "the prompt template")
    tokenizer: TokenizerConfig = option(TokenizerConfig, "the tokenizer")
    data: DataConfig = option(DataConfig, "corpora and shards")
    train: TrainConfig = option(TrainConfig, "size and cadence of training")
    ap: ApConfig = option(ApConfig, "the attribute-prediction model that is trained")
    sampling: SamplingConfig = option(SamplingConfig, "how responses are drawn")
    generation: GenerationConfig = option(GenerationConfig, "limits of drawing")
    server: ServerConfig = option(ServerConfig, "the server")
    scoring: ScoringConfig = option(ScoringConfig, "scoring responses")
    annotate: AnnotateConfig = option(AnnotateConfig, "annotation")
    bootstrap: BootstrapConfig = option(BootstrapConfig, "bootstrapping")
    steerlm2: Steerlm2Config = option(Steerlm2Config, "SteerLM 2.0")
    evaluate: EvaluateConfig = option(EvaluateConfig, "evaluation")
    ablation: AblationConfig = option(AblationConfig, "the rows of an ablation")
    export: ExportConfig = option(ExportConfig, "export")
    tracking: TrackingConfig = option(TrackingConfig, "where metrics go")
    profile: ProfileConfig = option(ProfileConfig, "a profile of some steps")
    plan: PlanConfig = option(PlanConfig, "what a run takes")
    array: ArrayConfig = option(ArrayConfig, "the part of the records of one job of several")
    cluster: ClusterConfig = option(ClusterConfig, "how jobs run on a cluster")
    pipeline: dict[str, Any] = option({}, "run: step name to overrides of that step alone")


KEYS: dict[str, Key] = {key.name: key for key in keys_of(Config)}

# Keys had these names before; using an old name is an error that gives the new one.
RENAMED = {
    "train.micro_batch_samples": ("train.micro_batch_rows", "it counts packed rows"),
    "server.max_batch": ("generation.max_batch", "drawing without a server has it, too"),
    "server.max_sequence_tokens": ("generation.max_sequence_tokens", "drawing without a server has it, too"),
    "server.max_cache_tokens": ("generation.max_cache_tokens", "drawing without a server has it, too"),
    "bootstrap.concurrency": ("generation.concurrency", "generate has it, too"),
    "annotate.batch_tokens": ("scoring.batch_tokens", "evaluate and bootstrap score as well"),
}
