"""The language model of a folder whose model sees images as well.

Owns: which of such models have a text part that we can be, its configuration, its tensors' names. Does not own: what
these mean (``tables.py``, ``config_json.py``). Invariant: what is left out is of the parts for images, by name; any
other tensor is one of the text part, or refused as one that does not belong there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steerlm_megatron.errors import UserError
from steerlm_megatron.model.hf.files import Stored

# Class of the whole model: the class of its text part.
TEXT_PARTS = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
# How files name the text part's tensors, and how a folder of the text part does. transformers 4.52 and later name
# modules as in the first line, and write files as in the others.
_NAMES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_FOR_IMAGES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def text_config(config: Mapping[str, Any], told: str) -> dict[str, Any] | None:
    """Return ``config.json`` of the text part, with all keys that its class has; None for a model without images.

    Raises:
        UserError: there is no text part in it.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if name not in TEXT_PARTS:
        return None
    part = config.get("text_config")
    if not isinstance(part, Mapping) or not isinstance(part.get("model_type"), str):
        raise UserError(f"{told}: config.json: {name} without text_config.model_type says nothing of its text part")
    from transformers import AutoConfig  # which knows what published folders leave out

    rest = {key: value for key, value in part.items() if key != "model_type"}
    try:
        whole: dict[str, Any] = AutoConfig.for_model(part["model_type"], **rest).to_dict()
    except Exception as error:  # of whatever a class makes of keys that are wrong
        raise UserError(f"{told}: config.json: text_config: {error}") from None
    told_outside = {key: config[key] for key in ("dtype", "torch_dtype", "quantization_config") if key in config}
    return whole | told_outside | {"architectures": [TEXT_PARTS[name]]}


def text_tensors(tensors: Mapping[str, Stored]) -> tuple[dict[str, Stored], list[str]]:
    """Return the tensors of the text part by the names that its class has, and the names of those for images."""
    found, left = {}, []
    for name, stored in tensors.items():
        if name.startswith(_FOR_IMAGES):
            left.append(name)
            continue
        for theirs, ours in _NAMES:
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                break
        found[name] = stored
    return found, left
