"""Sections of a training run: the model and its layout, the engine, the optimizer, size and cadence, tracking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steerlm_megatron.config.fields import Rule, above, at_least, between, each_at_least, one_of, option


@dataclass
class ModelConfig:
    """A decoder-only transformer: everything Megatron-Core needs to build it, none of how it is split."""

    name: str = option("tiny", "what the shape is called; nothing depends on it")
    num_layers: int = option(4, at_least(1), "transformer layers")
    hidden_size: int = option(128, at_least(1), "width of the residual stream")
    num_heads: int = option(4, at_least(1), "query heads")
    num_query_groups: int | None = option(None, at_least(1), "key/value heads; null: one per query head")
    head_dim: int | None = option(None, at_least(1), "width of a head; null: hidden_size / num_heads")
    ffn_hidden_size: int = option(352, at_least(1), "width of the MLP")
    activation: str = option(
        "swiglu",
        one_of("swiglu", "geglu", "gelu", "squared_relu"),
        "the MLP's non-linearity; swiglu and geglu (the tanh form of gelu) have a gate",
    )
    norm: str = option(
        "rmsnorm",
        one_of("rmsnorm", "rmsnorm1p", "layernorm", "layernorm1p"),
        "the norm; those with 1p store weight - 1",
    )
    norm_epsilon: float = option(1e-5, at_least(0), "added to the variance in a norm")
    rotary_base: float = option(10000.0, at_least(1), "base of the frequencies of rotary position embeddings")
    rotary_percent: float = option(1.0, between(0, 1), "share of a head's dimensions that RoPE turns")
    rotary_scaling: str = option(
        "none", one_of("none", "linear", "llama3"), "how frequencies of RoPE are stretched for longer sequences"
    )
    rotary_scaling_factor: float = option(1.0, at_least(1), "what rotary_scaling divides frequencies by")
    rotary_low_frequency: float = option(1.0, above(0), "llama3: turns in rotary_original below which all is divided")
    rotary_high_frequency: float = option(4.0, above(0), "llama3: turns in rotary_original above which nothing is")
    rotary_original: int = option(8192, at_least(1), "llama3: longest sequence before the stretching, in tokens")
    rotary_local_base: float | None = option(
        None, at_least(1), "RoPE's base, without stretching, in layers with a sliding window; null: as in the others"
    )
    sliding_window: int | None = option(
        None, at_least(1), "tokens that a token sees, itself included; null: all before it"
    )
    full_attention_layers: list[int] = option([], "layers, counted from 0, that see all whatever sliding_window is")
    query_pre_attn_scalar: int | None = option(
        None, at_least(1), "attention scores are divided by its square root; null: width of a head"
    )
    attention_softcap: float | None = option(
        None, above(0), "attention scores s become cap * tanh(s / cap), which no fused kernel computes; null: no cap"
    )
    logit_softcap: float | None = option(None, above(0), "the same of the output layer's logits")
    max_position: int = option(4096, at_least(2), "longest sequence that the model is meant for, in tokens")
    tie_embeddings: bool = option(False, "the output layer has the weights of the input embedding")
    scale_embeddings: bool = option(False, "embeddings are multiplied by the square root of hidden_size")
    bias: bool = option(False, "linear layers have biases")
    qkv_bias: bool = option(False, "queries, keys and values have biases, whatever the other linear layers have")
    qk_norm: bool = option(False, "every head's queries and keys pass through a norm before RoPE")
    post_norms: bool = option(False, "what attention and MLP give passes through a norm before it is added")
    parallel_residual: bool = option(False, "a layer's MLP reads what its attention reads; both are added to that")
    head_bias: bool = option(True, "train_ap: the head has a bias; classifiers of transformers mostly have none")
    dropout: float = option(0.0, between(0, 0.99), "dropout of attention and of the residual stream, in training")
    init_std: float = option(0.02, at_least(0), "standard deviation of initial weights")
    vocab_multiple: int = option(128, at_least(1), "embedding rows are a multiple of it and of parallel.tensor")

    @property
    def gated(self) -> bool:
        """Whether the MLP's first product has a gate beside it, so that it has twice as many rows."""
        return self.activation in ("swiglu", "geglu")

    @property
    def one_plus_norms(self) -> bool:
        """Whether norms store weight - 1."""
        return self.norm.endswith("1p")


@dataclass
class ParallelConfig:
    """How ranks are laid out."""

    tensor: int = option(1, at_least(1), "ranks that share each matrix product")
    sequence: bool = option(False, "norms and dropout are split over the tensor-parallel ranks too")
    pipeline: int = option(1, at_least(1), "stages of layers")
    virtual_pipeline: int | None = option(None, at_least(2), "chunks of layers per stage, interleaved; null: one")
    context: int = option(1, at_least(1), "ranks that share each row of tokens, in training")
    data: int | None = option(None, at_least(1), "replicas; null: what is left of the ranks that were started")


@dataclass
class EngineConfig:
    """The training engine, precision, and what trades memory for time."""

    name: str = option("megatron", one_of("megatron", "deepspeed"), "deepspeed: ZeRO, with tensor parallelism alone")
    zero_stage: int = option(1, "deepspeed: 1 optimizer states are partitioned, 2 gradients too, 3 parameters too")
    offload: str = option(
        "none", one_of("none", "optimizer", "all"), "deepspeed: what lives in host memory; all needs zero_stage=3"
    )
    precision: str = option("fp32", one_of("fp32", "bf16"), "of weights and activations; the optimizer has fp32")
    recompute: str = option(
        "none", one_of("none", "selective", "full"), "activations that the backward pass computes again"
    )
    attention: str = option("auto", one_of("auto", "varlen", "sdpa"), "the kernel of packed attention")
    compile: bool | None = option(
        None, "norms, activations and RoPE as one compiled kernel each; null: on GPUs with Triton and a C compiler"
    )
    timeout_sec: int = option(600, at_least(1), "a collective that takes longer ends the run")
    overlap_grad_reduce: bool | None = option(
        None, "megatron: gradients are reduced beside the backward pass; null: on GPUs"
    )
    overlap_param_gather: bool | None = option(
        None, "megatron: updated weights are gathered in the next forward pass; null: on GPUs"
    )
    bucket_parameters: int | None = option(
        None, at_least(1), "megatron: parameters of one such collective; null: 40 million, or 1 million a rank"
    )


@dataclass
class ApConfig:
    """The attribute-prediction model that train_ap trains. Commands that use one read its kind in the checkpoint."""

    kind: str = option(
        "regression",
        one_of("regression", "generative"),
        "regression: a head with a value per attribute; generative: a language model that writes the label string",
    )


@dataclass
class OptimConfig:
    """AdamW and its learning-rate schedule. The SteerLM paper (arXiv 2310.05344, §4.3): lr 5e-6, weight decay 0.01."""

    lr: float = option(5e-6, at_least(0), "highest learning rate")
    min_lr: float = option(5e-6, at_least(0), "learning rate at the end of the schedule")
    head_lr: float | None = option(
        None, at_least(0), "train_ap: highest learning rate of the regression head, on the same schedule; null: lr"
    )
    schedule: str = option("cosine", one_of("constant", "linear", "cosine"), "the way from lr to min_lr")
    warmup_steps: int = option(10, at_least(0), "steps from 0 up to lr")
    weight_decay: float = option(0.01, at_least(0), "decay of all weights but biases and norms")
    beta1: float = option(0.9, between(0, 0.999999), "decay of the mean of gradients")
    beta2: float = option(0.98, between(0, 0.999999), "decay of the mean of their squares")
    eps: float = option(1e-8, at_least(0), "added to the root of the mean square")
    clip_grad: float = option(1.0, at_least(0), "largest norm of a step's gradient; 0: no clipping")


# Megatron-Core's names of the linear layers that can have an adapter.
LORA_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def _targets() -> Rule:
    def broken(value: Any) -> str | None:
        if not value or len(set(value)) < len(value) or not set(value) <= set(LORA_TARGETS):
            return f"must name some of: {' '.join(LORA_TARGETS)}"
        return None

    return Rule("some of " + " ".join(LORA_TARGETS), broken)


@dataclass
class LoraConfig:
    """train.trainable=lora: low-rank adapters (arXiv 2106.09685) of a frozen model."""

    rank: int = option(16, at_least(1), "rank of an adapter")
    alpha: float = option(32.0, above(0), "an adapter's output is multiplied by alpha / rank")
    targets: list[str] = option(
        list(LORA_TARGETS), _targets(), "linear layers with an adapter, by Megatron-Core's names"
    )
    dropout: float = option(0.0, between(0, 0.99), "dropout of an adapter's input, in training")
    train_rows: str = option(
        "auto", one_of("auto", "none"), "rows of embedding and output layer; auto: those added to the base's vocabulary"
    )
    base: str | None = option(
        None, "folder, or owner/name, of the model that a PEFT adapter in init_from is of; null: as it says itself"
    )
    merge: bool = option(
        False, "an adapter that init_from has is merged, and a new one starts; false: it is trained on"
    )


@dataclass
class TrainConfig:
    """Size and cadence of one training run."""

    steps: int | None = option(None, at_least(1), "optimizer steps; null: as many as train.epochs takes")
    epochs: float = option(1.0, above(0), "passes over the training rows")
    global_batch_samples: int = option(128, at_least(1), "conversations in a step, over all ranks; at most the corpus")
    micro_batch_rows: int = option(1, at_least(1), "most packed rows in one forward pass")
    row_tokens: int = option(4096, at_least(8), "length of a packed row")
    seed: int = option(1234, at_least(0), "seed of initial weights, dropout and the order of samples")
    objective: str = option(
        "sft", one_of("sft", "lm", "steerlm2"),
        "train_sft: loss on responses only, on all tokens, or of weighted groups of responses (data.targets)",
    )  # fmt: skip
    log_every_steps: int = option(10, at_least(1), "steps between two lines of metrics.jsonl")
    validate_every_steps: int = option(100, at_least(1), "steps between two validations")
    validate_rows: int | None = option(None, at_least(1), "rows of the validation set that are looked at; null: all")
    save_every_steps: int = option(500, at_least(1), "steps between two checkpoints")
    async_save: bool = option(True, "a step waits for a copy in host memory, and not for the disk")
    keep_last: int = option(2, at_least(1), "checkpoints that are kept")
    keep_best: bool = option(True, "the checkpoint of the lowest validation loss is kept as well")
    nonfinite: str = option("raise", one_of("raise", "skip"), "a step whose loss or gradient is NaN or infinite")
    nonfinite_in_a_row: int = option(10, at_least(1), "skip: so many skipped steps one after the other end the run")
    max_restarts: int = option(0, at_least(0), "after a fault, start the local ranks again from the last checkpoint")
    trainable: str = option(
        "all", one_of("all", "head", "lora"), "lora: adapters (section lora); head: train_ap's regression head alone"
    )
    max_minutes: float | None = option(None, at_least(0), "minutes of wall time; then it saves and exits with 75")
    label_weights: dict[str, float] = option({}, "train_ap: loss weight per attribute; 1 where none is named")


@dataclass
class TrackingConfig:
    """Where metrics go besides metrics.jsonl, and what is measured."""

    tensorboard: bool = option(False, "event files in run_dir/tensorboard")
    wandb: bool = option(False, "Weights & Biases, with its own WANDB_* settings (WANDB_MODE=offline)")
    mlflow: bool = option(False, "MLflow")
    mlflow_uri: str | None = option(None, "tracking server or folder; null: MLFLOW_TRACKING_URI")
    project: str = option("steerlm_megatron", "the project of wandb, the experiment of mlflow")
    name: str | None = option(None, "the run's name in both; null: that of the run folder")
    peak_tflops: float | None = option(
        None, at_least(0), "dense TFLOP/s of one device in the run's precision, for mfu; null: known GPUs in bf16"
    )


@dataclass
class PlanConfig:
    """What a run takes of memory and time, before it runs: ``steerlm plan``, and the check before training."""

    check: bool = option(True, "training refuses a layout that cannot fit into memory before it starts")
    hardware: str = option("h100", "plan: the GPUs, conf/hardware/NAME.yaml or a YAML file of figures with sources")
    gpus: int | None = option(None, at_least(1), "plan: how many there are; null: as many as parallel.* asks for")
    search: bool = option(False, "plan: look for the fastest layouts of plan.gpus that fit, too")
    top: int = option(5, at_least(1), "plan.search: layouts that are shown")
    output: str | None = option(None, "plan: JSON file that the plan is written to as well")
    lengths: list[int] = option(
        [], each_at_least(1), "plan: lengths of documents where data.train is not there; empty: full rows"
    )
    samples: int | None = option(
        None, at_least(1), "plan: conversations of the corpus where data.train is not there; prompts to draw for"
    )
    loss_share: float = option(
        1.0, between(0, 1), "plan: share of tokens with loss, which responses have, without data.train"
    )
    vocab_size: int | None = option(None, at_least(1), "plan: of the tokenizer where neither data nor a model has it")
    pairs: int | None = option(
        None, at_least(1), "plan run: preference pairs of DPO and of PPO's reward model; null: one a conversation"
    )
    dpo_epochs: float = option(1.0, above(0), "plan run: passes of DPO over its pairs")
    rollouts: int | None = option(
        None, at_least(1), "plan run: responses that PPO draws in all; null: one a conversation"
    )
    ppo_epochs: float = option(1.0, above(0), "plan run: passes of PPO over what it has drawn")


@dataclass
class ProfileConfig:
    """Torch's profiler over some training steps: run_dir/profile/rank_R.json, for chrome://tracing or Perfetto."""

    steps: list[int] = option([], "[first, last], counted from 1; empty: off")
    ranks: list[int] = option([0], "ranks that write a trace")
