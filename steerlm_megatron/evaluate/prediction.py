"""The measure ``prediction``: the attribute-prediction model against held-out labels.

Owns: figures per attribute, baselines, calibration, confusion of levels, slices. Does not own: the formulas
(``agreement.py``), scoring. Invariants: what is compared is compared on the same responses; a baseline that is fitted
to held-out labels predicts each by the others, or is the best of its kind, so that it is the harder one to beat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerlm_megatron.evaluate.agreement import Drawn, agreement, figures, levels_of
from steerlm_megatron.evaluate.intervals import Floats, Resamples, verdict
from steerlm_megatron.evaluate.needs import LABELLED
from steerlm_megatron.evaluate.protocol import Labelled, Material, Need, Section
from steerlm_megatron.observe import stats

_FEWEST = 20  # responses of a slice, or of a bin of the calibration curve
_MOST_BINS = 10
_MOST_POINTS = 400  # of the scatter plot of an attribute
_OTHER = "other"
_BASELINES = ("constant", "length", "majority")


class Prediction:
    """Agreement with labels, beside predictors that read no text."""

    name = "prediction"
    version = 2  # 2: with the points of a scatter plot
    needs: tuple[Need, ...] = (LABELLED,)

    def run(self, material: Material) -> Section:
        """See :class:`Measure`."""
        labelled = material.labelled
        assert labelled is not None
        draws = Resamples(labelled.groups_P)
        attributes = {
            name: _attribute(labelled, column, draws)
            for column, name in enumerate(labelled.names)
            if not np.isnan(labelled.wanted_PA[:, column]).all()
        }
        slices = [row for by, values in _facets(labelled).items() for row in _slices(labelled, by, values, draws)]
        return {
            "title": "Attribute prediction, with intervals",
            "words": [
                f"On {len(labelled.groups_P)} held-out responses to {draws.groups} prompts. Intervals are 95 %, by a "
                "bootstrap over prompts (conversation trees), in which compared predictors are compared on the same "
                "responses."
            ],
            "attributes": attributes,
            "slices": slices,
            "tables": _tables(attributes, slices),
        }


def _attribute(labelled: Labelled, column: int, draws: Resamples) -> dict[str, Any]:
    """Return ``n``, ``metrics``, ``baselines``, ``calibration``, ``confusion`` and ``points`` of one attribute."""
    present = ~np.isnan(labelled.wanted_PA[:, column])
    mine = draws.take(present)
    predicted, wanted = labelled.predicted_PA[present, column], labelled.wanted_PA[present, column]
    top, n = labelled.schema.max_level, int(present.sum())
    found = agreement(predicted, wanted, mine, top)
    levels = levels_of(predicted, top), levels_of(wanted, top)
    confusion = np.bincount(levels[1] * (top + 1) + levels[0], minlength=(top + 1) ** 2).reshape(top + 1, top + 1)
    return {
        "n": n,
        "metrics": figures(found, mine, n),
        "baselines": _baselines(labelled, column, present, found, mine),
        "calibration": calibration(predicted, wanted, mine),
        "confusion": confusion.tolist(),
        "points": _points(predicted, wanted),
    }


def _points(predicted: Floats, wanted: Floats) -> list[list[float]]:
    """Return ``[prediction, label]`` of at most 400 responses, evenly spaced among all, for a scatter plot."""
    chosen = np.unique(np.linspace(0, len(wanted) - 1, min(len(wanted), _MOST_POINTS)).round().astype(int))
    return np.stack((predicted[chosen], wanted[chosen]), axis=1).round(3).tolist()


def _baselines(
    labelled: Labelled, column: int, present: NDArray[np.bool_], found: Mapping[str, Drawn], draws: Resamples
) -> dict[str, dict[str, Any]]:
    """Return per baseline its ``mse`` and ``accuracy``, ``gain`` (its squared error minus the model's), ``is`` (whether
    the model's error is below), and ``accuracy_gain`` (the model's accuracy minus the baseline's).
    """
    wanted, top = labelled.wanted_PA[present, column], labelled.schema.max_level
    n = len(wanted)
    by_length = stats.predicted_from(np.log1p(labelled.lengths_P[present]), wanted)
    majority = float(np.bincount(levels_of(wanted, top)).argmax())
    guesses = {
        "constant": np.full(n, labelled.constants_A[column]),
        "length": by_length,
        "majority": np.full(n, majority),
    }
    out: dict[str, dict[str, Any]] = {}
    for name in _BASELINES:
        other = agreement(guesses[name], wanted, draws, top, only=("mse", "accuracy"))
        gain, better = other["mse"].minus(found["mse"]), found["accuracy"].minus(other["accuracy"])
        row = figures({**other, "gain": gain, "accuracy_gain": better}, draws, n)
        out[name] = {**row, "is": _BELOW[verdict(row["gain"])]}
    out["length"] |= figures(agreement(labelled.lengths_P[present], wanted, draws, top, only=("spearman",)), draws, n)
    out["majority"]["level"] = majority
    return out


# The model's error against a baseline's, by the sign of the gain.
_BELOW = {"above": "below", "below": "above", "not told apart": "not told apart", "not measured": "not measured"}


def calibration(predicted: Floats, wanted: Floats, draws: Resamples) -> dict[str, Any]:
    """Return ``bins`` of about equally many predictions, from low to high, each with the mean prediction and the mean
    label with its interval; and ``error``, the mean over predictions of |mean label − mean prediction| of their bin
    (the expected calibration error of Naeini et al., AAAI 2015, for values). A model that is calibrated has labels on
    the diagonal.
    """
    count = max(1, min(_MOST_BINS, len(predicted) // _FEWEST))
    edges = np.unique(np.quantile(predicted, np.linspace(0, 1, count + 1)[1:-1]))
    place = np.searchsorted(edges, predicted, side="right")
    inside = np.eye(len(edges) + 1)[place]
    inside = inside[:, inside.any(axis=0)]
    terms = np.stack((inside, inside * predicted[:, None], inside * wanted[:, None]), axis=2)
    (n_K, predicted_K, wanted_K), drawn = terms.sum(axis=0).T, draws.sums(terms)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = drawn[..., 2] / drawn[..., 0]
    lows, highs = draws.bounds(means)
    error = np.abs(drawn[..., 2] - drawn[..., 1]).sum(axis=1) / drawn[..., 0].sum(axis=1)
    return {
        "bins": [
            {"predicted": p / n, "label": {"value": w / n, "low": low, "high": high, "n": int(n)}}
            for n, p, w, low, high in zip(n_K, predicted_K, wanted_K, lows, highs, strict=True)
        ],
        "error": draws.figure(float(np.abs(wanted_K - predicted_K).sum() / n_K.sum()), error, len(predicted)),
    }


def _facets(labelled: Labelled) -> dict[str, list[str]]:
    """Return what responses are sliced by: the facets that records have, and a quarter of the lengths."""
    edges = np.unique(np.quantile(labelled.lengths_P, (0.25, 0.5, 0.75)).round())
    names = [f"up to {edge:.0f} characters" for edge in edges]
    names.append(f"more than {edges[-1]:.0f} characters")
    lengths = [names[place] for place in np.searchsorted(edges, labelled.lengths_P, side="left")]
    return {**{name: list(values) for name, values in labelled.facets.items()}, "length": lengths}


def _slices(labelled: Labelled, by: str, values: Sequence[str], draws: Resamples) -> list[dict[str, Any]]:
    """Return figures of every attribute for each value of a facet. Values of fewer than 20 responses are put together
    as "other"; a facet of one value gives nothing.
    """
    names, counts = np.unique(np.array([value or "not said" for value in values]), return_counts=True)
    small = set(names[counts < _FEWEST].tolist())
    folded = np.array([_OTHER if (value or "not said") in small else value or "not said" for value in values])
    kept = [name for name in dict.fromkeys([*names.tolist(), _OTHER]) if (folded == name).any()]
    rows: list[dict[str, Any]] = []
    for value in kept if len(kept) > 1 else ():
        for column, attribute in enumerate(labelled.names):
            mask = (folded == value) & ~np.isnan(labelled.wanted_PA[:, column])
            if n := int(mask.sum()):
                mine = draws.take(mask)
                predicted, wanted = labelled.predicted_PA[mask, column], labelled.wanted_PA[mask, column]
                found = agreement(
                    predicted, wanted, mine, labelled.schema.max_level, only=("mse", "pearson", "spearman")
                )
                error = (np.full(n, labelled.constants_A[column]) - wanted) ** 2
                gain = mine.mean(error - (predicted - wanted) ** 2)
                rows.append({"by": by, "value": value, "attribute": attribute, **figures(found, mine, n), "gain": gain})
    return rows


def _tables(attributes: Mapping[str, Mapping[str, Any]], slices: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    metrics = ("mse", "mae", "pearson", "spearman", "kappa", "accuracy")
    tables: list[dict[str, Any]] = [
        {
            "title": "Agreement with labels",
            "words": [
                "Kappa is Cohen's of the levels, with quadratic weights. Exact: share of equal levels. Calibration: "
                "mean distance of the mean label from the mean prediction, over bins of predictions."
            ],
            "columns": ["attribute", "MSE", "MAE", "Pearson", "Spearman", "kappa", "exact", "calibration", "labels"],
            "rows": [
                [name, *(row["metrics"][key] for key in metrics), row["calibration"]["error"], row["n"]]
                for name, row in attributes.items()
            ],
        },
        {
            "title": "Against predictors that read no text",
            "words": [
                "Constant: the mean of the training labels. Length: a straight line in the logarithm of a response's "
                "characters, each label predicted by all others. Majority: the most frequent level of these labels. "
                "Gain: the predictor's MSE minus the model's."
            ],
            "columns": ["attribute", "predictor", "MSE", "gain", "the model's error is", "exact", "gain in exact"],
            "rows": [
                [name, other, row["mse"], row["gain"], row["is"], row["accuracy"], row["accuracy_gain"]]
                for name, found in attributes.items()
                for other, row in found["baselines"].items()
            ],
        },
    ]
    if slices:
        tables.append(
            {
                "title": "By language, source, turn and length",
                "words": [f"Values of fewer than {_FEWEST} responses are put together as “{_OTHER}”."],
                "columns": ["by", "value", "attribute", "MSE", "gain on constant", "Pearson", "Spearman", "labels"],
                "rows": [
                    [row["by"], row["value"], row["attribute"], row["mse"], row["gain"], row["pearson"],
                     row["spearman"], row["mse"]["n"]]
                    for row in slices
                ],
                "folded": True,
            }
        )  # fmt: skip
    for name, row in attributes.items():
        levels = range(len(row["confusion"]))
        tables.append(
            {
                "title": f"Confusion of levels: {name}",
                "words": ["Rows: the level of the label. Columns: the predicted level."],
                "columns": ["label", *(str(level) for level in levels)],
                "rows": [[str(level), *counts] for level, counts in zip(levels, row["confusion"], strict=True)],
                "folded": True,
            }
        )
    return tables
