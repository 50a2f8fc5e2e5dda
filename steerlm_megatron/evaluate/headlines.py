"""The short figures of an evaluation, under the keys that reports, model cards and programs have always read.

Owns: ``ap``, ``quality``, ``quality_detail``, ``quality_pairs``, ``steering``, ``examples`` of ``evaluation.json``.
Does not own: the sections of measures, which have the rest. Invariant: where a section has a figure as well, both are
equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from steerlm_megatron.evaluate.intervals import Resamples
from steerlm_megatron.evaluate.protocol import Labelled, Levels, Material, Steered
from steerlm_megatron.evaluate.quality import differences, values_of
from steerlm_megatron.evaluate.steering import Curves
from steerlm_megatron.observe import stats


def prediction(labelled: Labelled) -> dict[str, dict[str, float]]:
    """Return ``stats.attribute_metrics``, and the intervals of how far the model's squared error is below that of the
    constant predictor (``constant_gain_low``, ``constant_gain_high``) and that of the response's length
    (``length_gain_low``, ``length_gain_high``).
    """
    table = stats.attribute_metrics(
        labelled.predicted_PA,
        labelled.wanted_PA,
        labelled.names,
        labelled.constants_A,
        labelled.lengths_P,
        labelled.groups_P,
    )
    draws = Resamples(labelled.groups_P)
    for column, name in enumerate(labelled.names):
        present = ~np.isnan(labelled.wanted_PA[:, column])
        wanted = labelled.wanted_PA[present, column]
        guesses = {
            "constant": np.full(len(wanted), labelled.constants_A[column]),
            "length": stats.predicted_from(np.log1p(labelled.lengths_P[present]), wanted),
        }
        error = (labelled.predicted_PA[present, column] - wanted) ** 2
        mine = draws.take(present)
        for kind, guess in guesses.items():
            gain = mine.mean((guess - wanted) ** 2 - error)
            table[name] |= {f"{kind}_gain_low": gain["low"], f"{kind}_gain_high": gain["high"]}
    return table


def quality(material: Material) -> dict[str, Any]:
    """Return each model's mean quality by the first judge (``quality``), with standard error, interval and n
    (``quality_detail``), and the differences of each two models (``quality_pairs``).
    """
    draws = Resamples(range(len(material.prompts)))
    detail = {}
    for name, answers in material.answers.items():
        values = values_of(answers.measured[material.judge], material.quality)
        found = draws.mean(values)
        detail[name] = {
            "mean": found["value"], "sem": stats.sem(values), "n": found["n"], "low": found["low"],
            "high": found["high"],
        }  # fmt: skip
    pairs = differences(draws, material.answers, material.judge, material.quality)
    return {
        "quality": {name: row["mean"] for name, row in detail.items()},
        "quality_detail": detail,
        "quality_pairs": [{"low": low, "high": high, **found} for low, high, found in pairs],
    }


def steering(material: Material) -> dict[str, Any]:
    """Return the steering curves by the first judge: per attribute the levels that were requested, mean, deviation and
    interval of what was measured, Spearman of the curve and of single responses, and the slope with its interval.
    """
    steered = material.steered
    assert steered is not None
    curves = Curves(steered, material.judge)
    lines = {}
    for name in steered.curves:
        requested, values_LP = curves.requested(name), curves.measured(name, name)
        pairs = [(level, value) for level, row in zip(requested, values_LP, strict=True) for value in row]
        lows, highs = curves.mean_bounds(name, name)
        means = np.nanmean(values_LP, axis=1)
        lines[name] = {
            "requested": requested,
            "measured": means.tolist(),
            "std": np.nanstd(values_LP, axis=1).tolist(),
            "low": lows.tolist(),
            "high": highs.tolist(),
            "spearman": stats.spearman(means, requested),
            "sample_spearman": stats.spearman([level for level, _ in pairs], [value for _, value in pairs]),
            "slope": curves.slope(name, name),
        }
    return {
        "max_level": steered.schema.max_level,
        "steering": lines,
        "steered_model": steered.model,
        "examples": _examples(material, steered),
    }


def _examples(material: Material, steered: Steered) -> list[dict[str, Any]]:
    """Return responses of a few prompts at the best combination and at each attribute's extremes."""
    chosen = [0]
    for name in steered.schema.seen:
        for level in (0, steered.schema.max_level):
            ask: Levels = steered.schema.complete({**steered.best, name: level})
            chosen += [i for i, one in enumerate(steered.asks) if one == ask and i not in chosen]
    measured = steered.measured[material.judge]
    return [
        {
            "prompt": prompt.messages[-1].content,
            "responses": [
                {"attributes": dict(steered.asks[i]), "text": steered.texts[i][p], "measured": measured[i][p]}
                for i in chosen
            ],
        }
        for p, prompt in enumerate(material.prompts[: material.config.evaluate.examples])
    ]
