"""The measure ``quality``: models compared in pairs, on the same prompts.

Owns: differences of models with their intervals. Does not own: who measured (the judges). Invariant: a difference is
of responses to the same prompts, so that what makes a prompt hard for all models cancels out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from steerlm_megatron.evaluate.intervals import NAN, Floats, Resamples, verdict
from steerlm_megatron.evaluate.needs import ANSWERS
from steerlm_megatron.evaluate.protocol import Answers, Judge, Material, Measured, Need, Section


class Quality:
    """Means of each model, and differences of each two, by every judge."""

    name = "quality"
    version = 1
    needs: tuple[Need, ...] = (ANSWERS,)

    def run(self, material: Material) -> Section:
        """See :class:`Measure`."""
        draws = Resamples(range(len(material.prompts)))
        models = {
            judge: {name: _means(draws, found.measured[judge], opened) for name, found in material.answers.items()}
            for judge, opened in material.judges.items()
        }
        pairs = [
            {"judge": judge, "attribute": attribute, "low": low, "high": high, **difference}
            for judge, opened in material.judges.items()
            for attribute in opened.measured
            for low, high, difference in differences(draws, material.answers, judge, attribute)
        ]
        by_quality = [pair for pair in pairs if pair["attribute"] == material.quality]
        other = [pair for pair in pairs if pair["attribute"] != material.quality]
        tables = [_model_table(models)]
        for title, some in ((f"Differences in {material.quality}", by_quality), ("Other differences", other)):
            if some:
                tables.append(_pair_table(title, some, folded=some is other))
        return {
            "title": "Models compared in pairs",
            "words": [
                "Every difference is of responses to the same prompts, each model at its best levels; intervals are "
                "95 %, by a paired bootstrap over prompts. Where an interval includes zero, the two models are not "
                "told apart by so many prompts."
            ],
            "models": models,
            "pairs": pairs,
            "summary": [
                [f"{pair['high']} − {pair['low']} {pair['verdict']}:", pair["difference"]]
                for pair in by_quality
                if pair["judge"] == material.judge
            ],
            "tables": tables,
        }


def values_of(measured: Sequence[Measured], attribute: str) -> Floats:
    """Return what was measured of an attribute in each response, NaN where the judge gave no value."""
    return np.array([one.get(attribute, NAN) for one in measured], dtype=np.float64)


def differences(
    draws: Resamples, answers: Mapping[str, Answers], judge: str, attribute: str
) -> list[tuple[str, str, dict[str, Any]]]:
    """Return for each two models, the earlier one first, ``(earlier, later, {difference, verdict})``: the mean of the
    later one's value minus the earlier one's over the prompts of which both were measured.
    """
    values = {name: values_of(found.measured[judge], attribute) for name, found in answers.items()}
    found = []
    for low, high in combinations(values, 2):
        difference = draws.mean(values[high] - values[low])
        found.append((low, high, {"difference": difference, "verdict": verdict(difference)}))
    return found


def _means(draws: Resamples, measured: Sequence[Measured], judge: Judge) -> dict[str, Any]:
    return {name: draws.mean(values_of(measured, name)) for name in judge.measured}


def _model_table(models: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    names = list(next(iter(models.values())))
    return {
        "title": "Mean values at the best levels",
        "columns": ["judge", "measured", *names],
        "rows": [
            [judge, attribute, *(rows[name][attribute] for name in names)]
            for judge, rows in models.items()
            for attribute in rows[names[0]]
        ],
    }


def _pair_table(title: str, pairs: Sequence[Mapping[str, Any]], folded: bool) -> dict[str, Any]:
    return {
        "title": title,
        "columns": ["judge", "measured", "model", "against", "difference", "prompts", "is"],
        "rows": [
            [pair["judge"], pair["attribute"], pair["high"], pair["low"], pair["difference"], pair["difference"]["n"],
             pair["verdict"]]
            for pair in pairs
        ],
        "folded": folded,
    }  # fmt: skip
