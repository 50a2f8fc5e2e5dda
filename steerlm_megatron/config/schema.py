"""The configuration of every command, as dataclasses.

Owns: names, types, defaults, and the meaning of every key. Does not own: reading YAML (``load.py``) or command lines
(``cli.py``). Invariant: a key that stands here is read somewhere; a key that does not is refused by ``load.py``.

Enumerations are ``str`` with their legal values in ``CHOICES``, checked by ``load.finalize`` together with every
other rule.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelConfig:
    """A decoder-only transformer. Everything Megatron-Core needs to build it, none of how it is split."""

    name: str = "tiny"
    num_layers: int = 4
    hidden_size: int = 128
    num_heads: int = 4
    num_query_groups: int | None = None  # None: multi-head attention (one key/value head per query head)
    head_dim: int | None = None  # None: hidden_size / num_heads
    ffn_hidden_size: int = 352
    activation: str = "swiglu"  # swiglu | gelu | squared_relu
    norm: str = "rmsnorm"  # rmsnorm | layernorm | layernorm1p
    norm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    max_position: int = 4096  # longest sequence the model is meant for, in tokens
    tie_embeddings: bool = False
    bias: bool = False
    dropout: float = 0.0
    init_std: float = 0.02
    vocab_multiple: int = 128  # the embedding has a multiple of this many rows (and of parallel.tensor)


@dataclass
class ParallelConfig:
    """How ranks are laid out. ``data=null`` takes what is left of the world."""

    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    data: int | None = None


@dataclass
class EngineConfig:
    """The training engine and its precision. Keys marked ds are of ``engine=deepspeed`` alone, mc of ``megatron``."""

    name: str = "megatron"  # megatron (all layouts) | deepspeed (ZeRO over data-parallel ranks, tensor parallelism)
    zero_stage: int = 1  # ds: 1 optimizer states partitioned | 2 and gradients | 3 and parameters
    offload: str = "none"  # ds: what lives in host memory: none | optimizer | all (parameters too; zero_stage=3)
    precision: str = "fp32"  # fp32 | bf16
    recompute: str = "none"  # none | selective | full
    attention: str = "auto"  # auto | varlen | sdpa
    # norms, activations and RoPE as one compiled kernel each (torch.compile); null: on GPUs with Triton and a C
    # compiler. On a CPU it needs a C++ compiler and takes 20 s at the first step, which long runs gain back
    compile: bool | None = None
    timeout_sec: int = 600  # a collective that takes longer ends the run
    # mc: gradients are reduced over data-parallel ranks while the backward pass goes on; null: on GPUs
    overlap_grad_reduce: bool | None = None
    overlap_param_gather: bool | None = None  # mc: updated weights are gathered in the next forward pass; null: on GPUs
    bucket_parameters: int | None = None  # mc: to one such collective; null: 40 million, or 1 million a rank


@dataclass
class OptimConfig:
    """AdamW and its learning-rate schedule. Paper: Adam, LR 5e-6, weight decay 0.01 (facts §6)."""

    lr: float = 5e-6
    min_lr: float = 5e-6
    schedule: str = "cosine"  # constant | linear | cosine
    warmup_steps: int = 10
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    clip_grad: float = 1.0


@dataclass
class AttributesConfig:
    """An attribute schema (``steer.attributes.AttributeSchema``); ``names`` empty means no conditioning at all."""

    name: str = "oasst"
    names: list[str] = field(default_factory=list)
    max_level: int = 9
    quality: str = "quality"  # the attribute that bootstrapping maximises
    best: dict[str, int] = field(default_factory=dict)  # levels asked for when a user names none


@dataclass
class TemplateConfig:
    """The prompt template (``steer.templates``)."""

    name: str = "steerlm"  # steerlm | llama2
    system: str = ""  # used where a conversation has no system message
    system_suffix: str = "\n\n"  # steerlm only: what follows the system text (facts §4.2)


@dataclass
class TokenizerConfig:
    """A SentencePiece model, a Hugging Face tokenizer, or bytes; ``train=true`` trains SentencePiece on the input."""

    path: str | None = None  # a .model file, a tokenizer.json or its folder, a folder with a saved one, or bytes
    extend: bool = True  # control strings that it lacks get ids after its vocabulary; false: that is an error
    train: bool = False
    vocab_size: int = 1024


# Kinds of corpus that `data.source` names: the converters of data_tools (a test keeps the two equal), and our own.
SOURCES = ("oasst", "helpsteer", "hh_rlhf", "msid", "nemo", "sharegpt", "messages", "hf", "demo")


@dataclass
class DataConfig:
    """Corpora in (``source``, ``input``), shards out (``output_dir``), shards for training (``train``, ``valid``).

    What the sources read, and what the filters do, is in docs/data.md.
    """

    source: str = "messages"  # see SOURCES
    input: Any = None  # a file, a glob, or a list of them; hf: hub names or folders
    valid_input: Any = None  # files of the validation set; then all of input is for training
    output_dir: str | None = None
    train: Any = None  # a shard folder (or a folder with train/ and valid/ in it), or a list of them: a blend
    valid: Any = None  # the same for validation; None: the valid/ beside the training shards
    weights: list[float] = field(default_factory=list)  # share of each of data.train in an epoch; empty: by size
    map: Any = None  # messages: "prompt=KEY,response=KEY" or "turns=KEY,text=KEY,..." (quoted), or a mapping
    label_max: float | None = None  # nemo: the published labels are on 0..label_max; None: on the schema's scale
    hf_rows: str = "messages"  # hf: the source whose rows the data set has
    hf_subset: str | None = None  # hf: the data set's configuration
    hf_split: str | None = None  # hf: the split to read; None: train, and the validation set if there is one
    paths: str = "reply"  # reply (each assistant reply trained once) | leaf (as often as it occurs)
    languages: list[str] = field(default_factory=list)  # kept languages; empty: all
    roles: list[str] = field(default_factory=list)  # conversations of these roles only; empty: all
    min_turns: int = 0  # user and assistant messages
    max_turns: int | None = None
    min_chars: int = 0  # of all messages together
    max_chars: int | None = None
    labels: list[str] = field(default_factory=list)  # "quality>=6": a reply that fails is context only
    dedupe: bool = False  # leave out a conversation of the same roles and contents as an earlier one
    valid_fraction: float = 0.05
    split_seed: int = 10
    on_error: str = "error"  # error | skip
    control_strings: str = "escape"  # text that looks like a control string: escape (kept as characters) | reject
    shard_tokens: int = 50_000_000
    workers: int | None = None  # processes that tokenise; None: one per core. The result does not depend on it
    verify: bool = False  # compare the checksums of shards that are opened, not only their sizes (reads every byte)
    overlong: str = "truncate_left_turns"  # drop | truncate_left_turns | truncate_response | error
    demo_conversations: int = 3000


@dataclass
class TrainConfig:
    """Size and cadence of one training run."""

    steps: int | None = None  # None: from epochs
    epochs: float = 1.0
    global_batch_samples: int = 128
    micro_batch_samples: int = 1  # most packed rows of row_tokens in one forward pass
    row_tokens: int = 4096
    seed: int = 1234
    objective: str = "sft"  # sft (responses only) | lm (all tokens)
    log_every_steps: int = 10
    validate_every_steps: int = 100
    validate_rows: int | None = None  # None: the whole validation set
    save_every_steps: int = 500
    # save beside training: a step waits for a copy in host memory, not for the disk (as much memory as a rank's part)
    async_save: bool = True
    keep_last: int = 2
    keep_best: bool = True
    nonfinite: str = "raise"  # a loss or gradient that is NaN or infinite: raise | skip the step
    nonfinite_in_a_row: int = 10  # skip: so many skipped steps one after the other end the run
    max_restarts: int = 0  # after a fault, start all ranks (that steerlm itself starts) again from the last checkpoint
    trainable: str = "all"  # all | head: train_ap trains the regression head alone, on a trunk that stays as it is
    max_minutes: float | None = None  # of wall time since the command started: then save and exit with code 75
    label_weights: dict[str, float] = field(default_factory=dict)  # train_ap: loss weight per attribute, default 1


@dataclass
class SamplingConfig:
    """How responses are drawn."""

    temperature: float = 1.0
    top_k: int = 50  # 0: off. Paper, eq. 3: 50
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int = 1234


@dataclass
class ServerConfig:
    """The sampling server, and where clients find one (``urls``)."""

    host: str = "127.0.0.1"
    port: int = 8000
    urls: list[str] = field(default_factory=list)
    max_queue: int = 1024  # choices that wait for a row; more are refused with HTTP 429
    max_batch: int = 64  # sequences decoded together
    max_sequence_tokens: int = 4096  # prompt + response
    max_cache_tokens: int = 65536  # KV-cache slots over all sequences
    model_name: str = "steerlm"
    max_body_bytes: int = 4_194_304  # of one request; a larger one is refused with HTTP 413
    read_timeout_sec: float = 20.0  # a request that is not whole by then is ended


@dataclass
class AnnotateConfig:
    """annotate: scoring a record file."""

    # packed tokens scored in one forward pass; null: 2048 on CPUs, whose caches they fit in, 16384 on GPUs
    batch_tokens: int | None = None
    overwrite_labels: bool = True  # human labels are replaced too (facts §1.2); false keeps those present


@dataclass
class BootstrapConfig:
    """bootstrap: sampling at the best attribute combinations."""

    prompts: int | None = None  # None: every prompt of the input
    responses_per_prompt: int = 1
    concurrency: int = 64


@dataclass
class EvaluateModels:
    """The checkpoints that ``evaluate`` compares, by what they were trained as."""

    sft: str | None = None
    acsft: str | None = None
    bootstrapped: str | None = None


@dataclass
class EvaluateConfig:
    """evaluate: attribute-prediction quality and steering curves."""

    prompts: str | None = None  # record file whose prompts are held out
    models: EvaluateModels = field(default_factory=EvaluateModels)
    steer: str | None = None  # which of models the steering curves are of; None: the last conditioned one
    examples: int = 3  # prompts whose responses are shown in the report
    max_prompts: int = 64
    levels: list[int] = field(default_factory=list)  # empty: every level for up to 5, else 5 spread over the scale
    attributes: list[str] = field(default_factory=list)  # empty: all of the schema
    judge: str = "ap"  # ap (the attribute-prediction model) | demo (the program that made the embedded corpus)


@dataclass
class ExportConfig:
    """export: the model of a checkpoint alone."""

    precision: str = "stored"  # of the written weights: stored (that of the checkpoint) | fp32 | bf16


@dataclass
class TrackingConfig:
    """Where metrics go besides metrics.jsonl, and what is measured."""

    tensorboard: bool = False  # run_dir/tensorboard
    wandb: bool = False  # Weights & Biases, with its own WANDB_* settings (WANDB_MODE=offline)
    mlflow: bool = False
    mlflow_uri: str | None = None  # tracking server or folder; None: MLFLOW_TRACKING_URI
    project: str = "steerlm_megatron"  # of wandb; the experiment of mlflow
    name: str | None = None  # the run's, in both; None: that of the run folder
    # dense TFLOP/s of one device in the run's precision, for mfu; None: known GPUs in bf16 (observe/metrics.py)
    peak_tflops: float | None = None


@dataclass
class ProfileConfig:
    """torch's profiler over some training steps: run_dir/profile/rank_R.json, for chrome://tracing or Perfetto."""

    steps: list[int] = field(default_factory=list)  # [first, last], counted from 1; empty: off
    ranks: list[int] = field(default_factory=lambda: [0])  # which ranks write a trace


@dataclass
class Config:
    """Everything a command may read. One object for all commands: a section not used by a command keeps its
    defaults.
    """

    command: str = ""
    run_dir: str | None = None
    overwrite: bool = False
    init_from: str | None = None
    checkpoint: str | None = None
    ap_checkpoint: str | None = None
    input: str | None = None
    output: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    attributes: AttributesConfig = field(default_factory=AttributesConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    annotate: AnnotateConfig = field(default_factory=AnnotateConfig)
    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    pipeline: dict[str, Any] = field(default_factory=dict)  # run: step name → overrides for that step
