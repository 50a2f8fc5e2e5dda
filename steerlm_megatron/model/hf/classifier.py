"""An attribute-prediction model as one of the classes of ``transformers`` for sequence classification.

Owns: where the head's bias goes, ``config.json`` of a classifier. Does not own: names of tensors (``tables.py``),
labels (``labels.py``), which token the values are read at (``steer/chat_template.py``).

Those classes have a linear layer without a bias on the last token's hidden state. Ours has a bias. Where the final norm
has one as well (LayerNorm), it can hold the head's: the head W makes of the final norm's output n + b the value
W(n + b), and with a d for which Wd = c, W(n + b + d) is that plus c. An RMSNorm is followed by no constant, so nothing
in such a model can stand for one; then the bias is written into ``config.json``, for the reader to add. A head that was
trained without one (``model.head_bias=false``) leaves as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from steerlm_megatron.config.schema import ModelConfig
from steerlm_megatron.model.gpt import PackedGPTModel
from steerlm_megatron.model.hf.config_json import config_for
from steerlm_megatron.model.hf.labels import SECTION, Labels, classifier_keys
from steerlm_megatron.model.hf.tables import HEAD_BIAS, HEAD_WEIGHT, Family
from steerlm_megatron.model.weights import global_names

FINAL_NORM_BIAS = "decoder.final_layernorm.bias"
# What a bias in the final norm may lack of the head's, on the attributes' scale: in bfloat16 less than the rounding of
# what the norm computes.
_LARGEST_ERROR = {torch.float32: 2e-5, torch.bfloat16: 4e-3}


def place_bias(gpt: PackedGPTModel, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], tuple[float, ...] | None]:
    """Find a place for the bias of a whole model's head, written in ``dtype``.

    Returns:
        Values to write instead of parameters', by our names; and the bias that is to be added to the classifier's
        values, or None.
    """
    ours = {name: parameter.detach() for name, parameter in global_names(gpt)}
    bias_A = ours.get(HEAD_BIAS)
    if bias_A is None:
        return {}, None
    if FINAL_NORM_BIAS in ours:
        norm_D = folded(ours[HEAD_WEIGHT], bias_A, ours[FINAL_NORM_BIAS], dtype)
        if norm_D is not None:
            return {FINAL_NORM_BIAS: norm_D}, None
    return {}, tuple(bias_A.float().tolist())


def folded(
    weight_AD: torch.Tensor, bias_A: torch.Tensor, norm_D: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | None:
    """The bias [D] of the final norm that gives a head without a bias the values of one with ``bias_A``; None where the
    head's rows depend on each other or ``dtype`` is too coarse for it. The change of least norm is taken.
    """
    rows_AD = weight_AD.to(dtype).double()
    change_D = torch.linalg.pinv(rows_AD) @ bias_A.double()
    out_D = (norm_D.double() + change_D).to(dtype)
    got_A = rows_AD @ (out_D.double() - norm_D.to(dtype).double())
    if not torch.isfinite(out_D).all() or (got_A - bias_A.double()).abs().max() > _LARGEST_ERROR[dtype]:
        return None
    return out_D


def classifier_config(
    model: ModelConfig,
    family: Family,
    vocab_size: int,
    labels: Labels,
    about: Mapping[str, Any],
    base: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """``config.json`` of a model with a regression head.

    Args:
        vocab_size: rows of the embedding as it is written.
        labels: the attributes, and what has to be added to their values.
        about: what else stands in our section of it.
        base: the one that the model came with, or that its base had.

    Raises:
        UserError: where the family cannot express the model.
    """
    out = config_for(model, family, vocab_size, base)
    section: dict[str, Any] = dict(about)
    if labels.bias is not None:
        section["head_bias"] = list(labels.bias)
    return out | {"architectures": [family.classifier], **classifier_keys(labels.names), SECTION: section}


def without_code(config: Mapping[str, Any], labels: Labels, family: Family) -> dict[str, Any]:
    """``config.json`` of a classifier whose class is not one of ``transformers``, as one of the class that is."""
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    return kept | {"architectures": [family.classifier], **classifier_keys(labels.names)}
