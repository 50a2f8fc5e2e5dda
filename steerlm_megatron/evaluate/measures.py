"""The measures that can be named in ``evaluate.measures``, in the order of a report.

Owns: the registry, which of the measures run, and running them. Invariant: what an asked measure needs and does not
have is said before any model is loaded. A new measure needs an entry here and its name in ``config/inference.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.evaluate.annotators import Annotators
from steerlm_megatron.evaluate.best_of import BestOf
from steerlm_megatron.evaluate.diversity import Diversity
from steerlm_megatron.evaluate.grades import Grades
from steerlm_megatron.evaluate.prediction import Prediction
from steerlm_megatron.evaluate.preferences import PreferencePairs
from steerlm_megatron.evaluate.protocol import Inputs, Material, Measure, Need, Section
from steerlm_megatron.evaluate.quality import Quality
from steerlm_megatron.evaluate.shift import Shifts
from steerlm_megatron.evaluate.steering import Steering
from steerlm_megatron.evaluate.wins import Wins

MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Prediction(),
        PreferencePairs(),
        Annotators(),
        Steering(),
        Quality(),
        Diversity(),
        BestOf(),
        Shifts(),
        Wins(),
        Grades(),
    )
}


def choose(config: Config, inputs: Inputs | None = None) -> list[str]:
    """Return the names of the measures that run: those of ``evaluate.measures``, or all whose needs are met.

    Raises:
        UserError: a named measure lacks something; the message names each such measure, what it needs, and what to set.
    """
    wanted = config.evaluate.measures or list(MEASURES)
    missing = {name: _lacking(MEASURES[name], config, inputs) for name in wanted}
    if config.evaluate.measures and any(missing.values()):
        raise UserError(
            "; ".join(
                f"evaluate.measures: {name} needs {need.words}: {said}"
                for name, lacking in missing.items()
                for need, said in lacking
            )
        )
    return [name for name in MEASURES if name in missing and not missing[name]]


def _lacking(measure: Measure, config: Config, inputs: Inputs | None) -> list[tuple[Need, str]]:
    found = ((need, need.lacking(config, inputs)) for need in measure.needs)
    return [(need, said) for need, said in found if said is not None]


def needed(names: Sequence[str], need: Need) -> bool:
    """Return whether one of the measures ``names`` needs ``need``."""
    return any(need in MEASURES[name].needs for name in names)


def run(names: Sequence[str], material: Material) -> dict[str, Section]:
    """Return the sections of the measures ``names``, by name. Only the main rank calls it."""
    return {name: {"version": MEASURES[name].version, **MEASURES[name].run(material)} for name in names}
