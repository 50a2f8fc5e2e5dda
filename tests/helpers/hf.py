"""Random tiny models made by ``transformers``, as folders, and their logits."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig
from transformers.utils import logging

from steerlm_megatron.config.schema import EngineConfig, ParallelConfig
from steerlm_megatron.data.batch import RowBatch
from steerlm_megatron.model.gpt import PackedGPTModel, build_model
from steerlm_megatron.model.hf import HFFolder
from steerlm_megatron.model.predict import predict_values
from steerlm_megatron.model.weights import fill
from tests.helpers.engines import full_row

ADDED = 3  # control tokens
TOLERANCE = 1e-4
VOCAB = 93  # an odd number of rows: the padded table has more, and two ranks do not divide it
ORIGINAL = 32
LENGTHS = (150, 1, 40)  # far beyond ORIGINAL, and packed
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
_GEMMA = {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 24}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3.1": ("llama", {"rope_parameters": _LLAMA3, "rms_norm_eps": 1e-5}),
    "llama_linear_tied": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}, "tie_word_embeddings": True},
    ),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "nemotron": ("nemotron", {}),
    # Windows and caps small enough to matter: scores and logits are above 3 without the caps.
    "mistral_window": ("mistral", {"sliding_window": 24, "head_dim": 16}),
    "qwen2_window": ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2}),
    "gemma2_tied": ("gemma2", {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3_tied": (
        "gemma3_text",
        {
            **_GEMMA,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
    ),
    "gpt_neox": ("gpt_neox", {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
    "gpt_neox_in_sequence": ("gpt_neox", {"use_parallel_residual": False}),
}


def make(
    case: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB", values: int = 0, **more: Any
) -> Any:
    """The model of a case, saved to ``folder``. Weights are large, norms and biases far from their usual start: a
    tensor in a wrong place changes the logits by far more than rounding.

    ``values``: a classifier with so many labels, in the place of a language model.
    """
    logging.disable_progress_bar()
    kind, special = CASES[case]
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    config = AutoConfig.for_model(kind, **{**shape, **special, **more})
    torch.manual_seed(7)
    if values:
        config.num_labels = values
    auto = AutoModelForSequenceClassification if values else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.3 * torch.randn_like(parameter)
            parameter.copy_(parameter.to(dtype))
    copy.deepcopy(model).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return model  # in float32: a model that is turned into another type turns RoPE's frequencies too


@torch.no_grad()
def greedy(model: Any, prompt_T: torch.Tensor, tokens: int, stop: int, banned: int) -> list[int]:
    """What ``generate`` continues a prompt with, up to the id ``stop``, without the id ``banned``."""
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=tokens, eos_token_id=stop, pad_token_id=stop, suppress_tokens=[banned]
    )
    out = model.generate(prompt_T[None], attention_mask=torch.ones_like(prompt_T[None]), generation_config=settings)
    return out[0, len(prompt_T) :].tolist()


def row(lengths: Sequence[int] = LENGTHS) -> RowBatch:
    """Documents of random tokens in one row, every position asked about."""
    batch = full_row(lengths)
    tokens = torch.randint(0, VOCAB, (sum(lengths),), generator=torch.Generator().manual_seed(3))
    return replace(batch, tokens_T=tokens, pool_P=torch.arange(sum(lengths)))


@torch.no_grad()
def their_logits(model: Any, batch: RowBatch) -> torch.Tensor:
    """[T, V] of the documents run alone."""
    bounds = batch.cu_seqlens.tolist()
    return torch.cat(
        [model(batch.tokens_T[None, a:b]).logits[0].float() for a, b in zip(bounds, bounds[1:], strict=False)]
    )


def filled(folder: HFFolder, vocab_size: int = VOCAB + ADDED, precision: str = "fp32") -> PackedGPTModel:
    """Return a model with the folder's weights, in evaluation mode."""
    gpt = build_model(folder.model, ParallelConfig(), EngineConfig(precision=precision), vocab_size)
    for parameter in gpt.parameters():
        parameter.data.fill_(float("nan"))  # what is not filled is seen
    fill(folder.weights(gpt, vocab_size))
    return gpt.eval()


def logits(gpt: PackedGPTModel, batch: Any) -> torch.Tensor:
    """Return our logits at the batch's ``pool_P``, without rows of padding."""
    found = predict_values(gpt, batch)
    assert found is not None
    return found[:, :VOCAB]


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder by name."""
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
