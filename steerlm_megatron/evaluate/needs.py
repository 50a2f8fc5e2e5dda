"""What measures can need, and how to tell whether it is there.

Owns: the needs of the measures in this room. Invariant: what is missing is told from the configuration, and from the
records once they have been read, before any model is loaded.
"""

from __future__ import annotations

from steerlm_megatron.config.schema import Config
from steerlm_megatron.evaluate.protocol import Inputs, Need

FIRST_MODELS = ("sft", "acsft", "bootstrapped")


def models_of(config: Config) -> dict[str, str]:
    """Return those of ``evaluate.models`` that are set, in the order of training. Those of later rounds are
    ``bootstrapped_2``, ``bootstrapped_3``, …; those of SteerLM 2.0 are last.
    """
    found = {name: getattr(config.evaluate.models, name) for name in FIRST_MODELS}
    later = {f"{FIRST_MODELS[-1]}_{number}": path for number, path in enumerate(config.evaluate.models.rounds, 2)}
    second = {steerlm2_name(number): path for number, path in enumerate(config.evaluate.models.steerlm2, 1)}
    return {name: path for name, path in found.items() if path is not None} | later | second


def steerlm2_name(iteration: int) -> str:
    """Return what the model of an iteration of SteerLM 2.0 is called: ``steerlm2``, ``steerlm2_2``, …"""
    return "steerlm2" if iteration == 1 else f"steerlm2_{iteration}"


def _unset(config: Config, *keys: str) -> list[str]:
    values = {
        "input": config.input,
        "ap_checkpoint": config.ap_checkpoint,
        "evaluate.preferences": config.evaluate.preferences,
        "evaluate.prompts": config.evaluate.prompts,
    }
    return [key for key in keys if values[key] is None]


def _labelled(config: Config, inputs: Inputs | None) -> str | None:
    lacking = _unset(config, "input", "ap_checkpoint")
    return f"set {' and '.join(lacking)}" if lacking else None


def _annotated(config: Config, inputs: Inputs | None) -> str | None:
    if said := _labelled(config, inputs):
        return said
    if inputs is not None and not inputs.annotated:
        return f"no response of input={config.input} has 'annotations' of two annotators or more"
    return None


def _preferences(config: Config, inputs: Inputs | None) -> str | None:
    lacking = _unset(config, "evaluate.preferences", "ap_checkpoint")
    return f"set {' and '.join(lacking)}" if lacking else None


def _answers(config: Config, inputs: Inputs | None) -> str | None:
    lacking = _unset(config, "evaluate.prompts") + ([] if models_of(config) else ["one of evaluate.models"])
    return f"set {' and '.join(lacking)}" if lacking else None


def _several(config: Config, inputs: Inputs | None) -> str | None:
    if said := _answers(config, inputs):
        return said
    return None if len(models_of(config)) > 1 else "set two of evaluate.models or more"


def _steered(config: Config, inputs: Inputs | None) -> str | None:
    if said := _answers(config, inputs):
        return said
    return None if set(models_of(config)) - {"sft"} else "set one of evaluate.models that takes attributes"


def _samples(config: Config, inputs: Inputs | None) -> str | None:
    if said := _answers(config, inputs):
        return said
    if config.evaluate.best_of < 2:
        return "set evaluate.best_of to 2 or more"
    return None if config.ap_checkpoint else "set ap_checkpoint, which chooses"


def model_before(name: str) -> str | None:
    """Return the model that the training of ``name`` (a key of :func:`models_of`) went on from; None for those that
    start from a base model.
    """
    kind, _, number = name.rpartition("_")
    if number.isdigit():
        return kind if number == "2" else f"{kind}_{int(number) - 1}"
    return "acsft" if name in ("bootstrapped", "steerlm2") else None


def shifts_of(config: Config) -> dict[str, str]:
    """Return the models whose model before is there as well, with that one."""
    models = models_of(config)
    pairs = {name: model_before(name) for name in models}
    return {name: before for name, before in pairs.items() if before is not None and before in models}


def _shifts(config: Config, inputs: Inputs | None) -> str | None:
    if said := _answers(config, inputs):
        return said
    if config.evaluate.shift_samples < 1:
        return "set evaluate.shift_samples to 1 or more"
    return None if shifts_of(config) else "set evaluate.models.acsft, and bootstrapped or steerlm2, trained from it"


LABELLED = Need("labelled responses and an attribute-prediction model", _labelled)
ANNOTATED = Need("labelled responses with the values of single annotators", _annotated)
PREFERENCES = Need("pairs of responses of which people chose one, and an attribute-prediction model", _preferences)
ANSWERS = Need("models and prompts", _answers)
SEVERAL = Need("several models and prompts", _several)
STEERED = Need("a model that takes attributes, and prompts", _steered)
SHIFTS = Need("a model and the one that its training went on from", _shifts)
SAMPLES = Need("several responses to each prompt, and an attribute-prediction model", _samples)
