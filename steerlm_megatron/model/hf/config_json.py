"""``config.json`` of a model of ``transformers`` ↔ our ``ModelConfig``.

Owns: what of it we read, what we refuse, what we write. Does not own: key names that differ between families
(``tables.py``). Invariant: what would change the model's values is represented or refused by its key; keys that we do
not know survive a round trip.

RoPE is written in two ways: ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling`` (4). Both are
read; a file keeps the way that it has, and a new one gets the older, which both versions read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeGuard

from steerlm_megatron.config.fields import broken_rules, keys_of
from steerlm_megatron.config.schema import ModelConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.model.hf.tables import FAMILIES, Family, heads

_ROTARY = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_ROTARY_FIELDS = {
    "factor": "rotary_scaling_factor",
    "low_freq_factor": "rotary_low_frequency",
    "high_freq_factor": "rotary_high_frequency",
    "original_max_position_embeddings": "rotary_original",
}
_MODEL_KEYS = tuple(keys_of(ModelConfig, "model."))
_TYPES = {key.name.removeprefix("model."): key.type for key in _MODEL_KEYS}
_FULL, _SLIDING = "full_attention", "sliding_attention"


def model_of(config: Mapping[str, Any], family: Family) -> tuple[ModelConfig, list[str]]:
    """The model that a ``config.json`` describes, and what of it cannot be represented (then the model is in part at
    our defaults).
    """
    problems: list[str] = []
    values: dict[str, Any] = dict(family.fixed)
    for key, ours in family.fields.items():
        if key not in config and key not in family.defaults:
            problems.append(f"{key} is missing")
            continue
        value, kind = config.get(key, family.defaults.get(key)), _TYPES[ours]
        if value is None and kind.endswith("None"):
            pass
        elif kind.startswith("bool"):
            if not isinstance(value, bool):
                problems.append(f"{key}={value!r} is neither true nor false")
                continue
        elif kind.startswith("float"):
            if not _number(value):
                problems.append(f"{key}={value!r} is not a number")
                continue
            value = float(value)
        elif not _number(value) or value != int(value):
            problems.append(f"{key}={value!r} is not a whole number")
            continue
        else:
            value = int(value)
        values[ours] = value
    for key, legal in family.needs.items():
        value = config.get(key, legal[0])
        if value not in legal:
            problems.append(f"{key}={_json(value)} is not one that this {family.name} can have: {_json(legal[0])}")
    if family.biases:
        said = {key: bool(config.get(key, False)) for key in family.biases}
        values["bias"] = all(said.values())
        if len(set(said.values())) > 1:
            told = " with ".join(f"{key}={_json(value)}" for key, value in said.items())
            problems.append(f"{told}: either all linear layers have biases or none")
    values |= _read_rotary(config, family, values.get("max_position"), problems)
    values |= _read_windows(config, family, values.get("num_layers"), problems)
    if not problems:
        whole = replace(ModelConfig(name=family.name), **values)
        problems += broken_rules(_MODEL_KEYS, lambda key: getattr(whole, key.removeprefix("model.")))
    if problems:
        return ModelConfig(), problems
    model = whole
    if model.head_dim is None and model.hidden_size % model.num_heads:
        problems.append(f"num_attention_heads={model.num_heads} does not divide hidden_size={model.hidden_size}")
    elif int(heads(model)[2] * model.rotary_percent) % 2:
        problems.append(f"partial_rotary_factor={model.rotary_percent} turns an odd number of a head's dimensions")
    if model.num_heads % (model.num_query_groups or model.num_heads):
        problems.append(
            f"num_key_value_heads={model.num_query_groups} does not divide num_attention_heads={model.num_heads}"
        )
    return _shortest(model), problems


def _shortest(model: ModelConfig) -> ModelConfig:
    """The same without what follows from other fields."""
    scalar, local, full = model.query_pre_attn_scalar, model.rotary_local_base, sorted(set(model.full_attention_layers))
    window = None if len(full) == model.num_layers else model.sliding_window
    if window is None or (local == model.rotary_base and model.rotary_scaling == "none"):
        local = None
    return replace(
        model,
        num_query_groups=None if model.num_query_groups == model.num_heads else model.num_query_groups,
        head_dim=None if model.head_dim == model.hidden_size / model.num_heads else model.head_dim,
        query_pre_attn_scalar=None if scalar == heads(model)[2] else scalar,
        sliding_window=window,
        full_attention_layers=[] if window is None else full,
        rotary_local_base=local,
    )


def _number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _json(value: Any) -> str:
    return json.dumps(value, default=str)


def _rotary_of(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where RoPE's parameters stand, and what stands there."""
    for where in ("rope_scaling", "rope_parameters"):
        if isinstance(config.get(where), Mapping) and config[where]:
            return where, dict(config[where])
    return "rope_parameters" if "rope_parameters" in config else "rope_scaling", {}


def _read_rotary(
    config: Mapping[str, Any], family: Family, max_position: int | None, problems: list[str]
) -> dict[str, Any]:
    """Our fields of RoPE."""
    where, said = _rotary_of(config)
    for key in ("rope_scaling", "rope_parameters"):
        if config.get(key) and not isinstance(config[key], Mapping):
            problems.append(f"{key}={_json(config[key])} is not an object")
            return {}
    of_local: dict[str, Any] = {}
    if family.rotary_local is not None:
        found = _read_local_rotary(config, family, where, said, problems)
        if found is None:
            return {}
        where, said, of_local = found
    elif said and all(isinstance(value, Mapping) for value in said.values()):
        problems.append(f"{where} differs between kinds of layers ({', '.join(said)}); here all layers have one RoPE")
        return {}
    base_key, share_key = family.rotary_keys
    base = said.get("rope_theta", config.get(base_key))
    share = said.get("partial_rotary_factor", config.get(share_key))
    for key, value in ((base_key, base), (share_key, share)):
        if value is not None and not _number(value):
            problems.append(f"{key}={_json(value)} is not a number")
            return {}
    out: dict[str, Any] = {"rotary_base": family.rotary_base if base is None else float(base), "rotary_percent": 1.0}
    out |= of_local
    if family.rotary_percent is not None:
        out["rotary_percent"] = float(family.rotary_percent if share is None else share)
    elif share not in (None, 1):
        problems.append(f"partial_rotary_factor={share} is not one that this {family.name} can have: 1")
    kind_key = "type" if "type" in said and "rope_type" not in said else "rope_type"
    kind = said.get(kind_key, "default")
    out["rotary_scaling"] = "none" if kind == "default" else kind
    if not isinstance(kind, str) or out["rotary_scaling"] not in _ROTARY:
        problems.append(f"{where}.{kind_key}={kind} is not supported; supported: default linear llama3")
        return {}
    for key in _ROTARY[out["rotary_scaling"]]:
        value = said.get(key)
        if key == "original_max_position_embeddings":
            value = config.get(key, value) or max_position
        if not _number(value):
            problems.append(f"{where}.{key}={_json(value)} is not a number, which {where}.{kind_key}={kind} needs")
        else:
            out[_ROTARY_FIELDS[key]] = int(value) if key.startswith("original") else float(value)
    return out


def _read_local_rotary(
    config: Mapping[str, Any], family: Family, where: str, said: dict[str, Any], problems: list[str]
) -> tuple[str, dict[str, Any], dict[str, Any]] | None:
    """Where RoPE's parameters for layers that see all stand, what stands there, and our fields for layers with a window
    (of a family that tells them apart). None after a problem.
    """
    assert family.rotary_local is not None
    key, base = family.rotary_local
    base = config.get(key, base)
    if said and where == "rope_parameters":
        local, full = (said.get(kind) for kind in (_SLIDING, _FULL))
        if not isinstance(local, Mapping | None) or not isinstance(full, Mapping | None) or not (local or full):
            problems.append(f"rope_parameters is not an object with {_FULL} and {_SLIDING}, which are objects")
            return None
        if (local or {}).get("rope_type", "default") != "default":
            problems.append(f"rope_parameters.{_SLIDING}.rope_type={_json(local)} is not supported; supported: default")
            return None
        where, said, base = f"rope_parameters.{_FULL}", dict(full or {}), (local or {}).get("rope_theta", base)
        key = f"rope_parameters.{_SLIDING}.rope_theta"
    elif said and config.get("rope_parameters"):
        problems.append("rope_scaling and rope_parameters are both there: one of them is enough")
        return None
    if not _number(base):
        problems.append(f"{key}={_json(base)} is not a number")
        return None
    return where, said, {"rotary_local_base": float(base)}


def _read_windows(config: Mapping[str, Any], family: Family, layers: int | None, problems: list[str]) -> dict[str, Any]:
    """Our fields of sliding windows. A window is kept also where no sequence is meant to be longer."""
    if family.sliding_window == "no" or layers is None:
        return {}
    if family.sliding_window == "if used" and not config.get("use_sliding_window", False):
        return {}
    window, kinds = config.get("sliding_window", family.defaults.get("sliding_window")), config.get("layer_types")
    if family.sliding_window == "all":
        sliding = [True] * layers
    elif kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in (_FULL, _SLIDING) for kind in kinds):
            problems.append(f"layer_types={_json(kinds)} is not {_FULL} or {_SLIDING} for each of {layers} layers")
            return {}
        sliding = [kind == _SLIDING for kind in kinds]
    elif family.sliding_window == "if used":
        first = config.get("max_window_layers", 28)
        if not _number(first):
            problems.append(f"max_window_layers={_json(first)} is not a number")
            return {}
        sliding = [window is not None and layer >= first for layer in range(layers)]
    else:
        key, every = family.full_every
        every = config.get(key, every)
        if not _number(every) or every != int(every) or every < 1:
            problems.append(f"{key}={_json(every)} is not a whole number above 0")
            return {}
        sliding = [(layer + 1) % every != 0 for layer in range(layers)]
    if not any(sliding) or (window is None and family.sliding_window == "all"):
        return {}
    if not _number(window) or window != int(window) or window < 1:
        problems.append(f"sliding_window={_json(window)} is not a whole number above 0")
        return {}
    full = [layer for layer, slides in enumerate(sliding) if not slides]
    return {"sliding_window": int(window), "full_attention_layers": full}


def family_for(model: ModelConfig) -> Family:
    """The first family that can express a model of ours. ``UserError`` if there is none."""
    problems = []
    for family in FAMILIES.values():
        differs = unfit(model, family)
        if not differs:
            return family
        problems.append(f"{family.name}: not with {' '.join(differs)}")
    raise UserError("no family of Hugging Face models is like this one; " + "; ".join(problems))


def unfit(model: ModelConfig, family: Family) -> list[str]:
    """``model.key=value`` of what a family cannot express; nothing if it can express all."""
    model = _shortest(model)
    differs = [key for key, value in family.fixed.items() if getattr(model, key) != value]
    if "bias" not in family.fixed and not family.biases and model.bias:
        differs.append("bias")
    if family.rotary_percent is None and model.rotary_percent != 1:
        differs.append("rotary_percent")
    if model.sliding_window is not None:
        if family.sliding_window == "no":
            differs.append("sliding_window")
        if family.sliding_window == "all" and model.full_attention_layers:
            differs.append("full_attention_layers")
        # Layers with a window that have no base of their own are stretched as the others are, and a family that tells
        # the two kinds apart stretches the others alone.
        stretched = model.rotary_local_base is None and model.rotary_scaling != "none"
        if stretched if family.rotary_local else model.rotary_local_base is not None:
            differs.append("rotary_local_base")
    return [f"model.{key}={getattr(model, key)}" for key in differs]


def config_for(
    model: ModelConfig, family: Family, vocab_size: int, base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """``config.json`` of a model of ours.

    Args:
        vocab_size: rows of the embedding as it is written.
        base: the one that the model came with. It is kept, but for keys that say something else than ``model``.

    Raises:
        UserError: where the family cannot express the model.
    """
    model = _shortest(model)
    if differs := unfit(model, family):
        raise UserError(f"a {family.name} model cannot have {' '.join(differs)}")
    if base is not None:
        before, problems = model_of(base, family)
        assert not problems, "a config.json that is kept was read before"
        out = dict(base)
    else:
        before, out = None, _new(family)
    for key, ours in family.fields.items():
        value = getattr(model, ours)
        if before is not None and (value == getattr(before, ours) or ours == "init_std"):
            continue
        out[key] = value
    if before is None:
        _, groups, head, _ = heads(model)
        numbers = {"num_key_value_heads": groups, "head_dim": head}
        if model.query_pre_attn_scalar is None:
            numbers["query_pre_attn_scalar"] = head
        out |= {key: number for key, number in numbers.items() if key in family.fields}
    if before is None or before.bias != model.bias:
        out |= dict.fromkeys(family.biases, model.bias)
    rotary = ("rotary_base", "rotary_percent", "rotary_scaling", "rotary_local_base", *_ROTARY_FIELDS.values())
    if before is None or any(getattr(before, name) != getattr(model, name) for name in rotary):
        _write_rotary(out, model, family)
    windows = ("sliding_window", "full_attention_layers")
    if before is None or any(getattr(before, name) != getattr(model, name) for name in windows):
        out |= _windows(model, family)
    return out | {"vocab_size": vocab_size}


def _new(family: Family) -> dict[str, Any]:
    """What does not follow from a model's shape. Special tokens are said to be none: a class of ``transformers`` would
    otherwise take numbers of its own, and whoever knows the tokenizer puts the right ones in.
    """
    return {
        "architectures": [family.architecture],
        "model_type": family.name,
        **{key: legal[0] for key, legal in family.needs.items()},
        "attention_dropout": 0.0,
        "use_cache": True,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }


def _windows(model: ModelConfig, family: Family) -> dict[str, Any]:
    """Keys of sliding windows."""
    window = model.sliding_window
    if family.sliding_window == "no":
        return {}
    if family.sliding_window == "all":
        return {"sliding_window": window}
    full = set(range(model.num_layers)) if window is None else set(model.full_attention_layers)
    kinds = [_FULL if layer in full else _SLIDING for layer in range(model.num_layers)]
    out = {"sliding_window": window, "layer_types": kinds}
    if family.sliding_window == "if used":
        first = kinds.index(_SLIDING) if window is not None else model.num_layers
        out |= {"use_sliding_window": window is not None, "max_window_layers": first}
    return out


def _write_rotary(config: dict[str, Any], model: ModelConfig, family: Family) -> None:
    """Put RoPE where ``config`` has it."""
    where, said = _rotary_of(config)
    nested = dict(said) if family.rotary_local and where == "rope_parameters" else None
    if nested is not None:
        said = dict(nested.get(_FULL) or {})
    base_key, share_key = family.rotary_keys
    kept = {key: value for key, value in said.items() if key not in (*_ROTARY_FIELDS, "type", "rope_type")}
    kind = "default" if model.rotary_scaling == "none" else model.rotary_scaling
    scaling = {key: getattr(model, _ROTARY_FIELDS[key]) for key in _ROTARY[model.rotary_scaling]}
    said = {**kept, "rope_type": kind, **scaling}
    outside = {base_key: model.rotary_base}
    if family.rotary_percent is not None:
        outside[share_key] = model.rotary_percent
    local_base = model.rotary_base if model.rotary_local_base is None else model.rotary_local_base
    if where == "rope_parameters":
        names = {base_key: "rope_theta", share_key: "partial_rotary_factor"}
        said |= {names[key]: value for key, value in outside.items()}
        if nested is not None:
            local = {"rope_type": "default", **(nested.get(_SLIDING) or {}), "rope_theta": local_base}
            said = {**nested, _FULL: said, _SLIDING: local}
        config["rope_parameters"] = said
    else:
        config |= outside
        config["rope_scaling"] = said if kind != "default" else None
        if family.rotary_local is not None:
            config[family.rotary_local[0]] = local_base
