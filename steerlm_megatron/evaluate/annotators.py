"""The measure ``annotators``: how far people agree with each other bounds what a model can reach.

Owns: agreement of the model with single annotators beside agreement among annotators. Does not own: reading
annotations (``steer/annotations.py``), the formulas (``agreement.py``). Invariant: a response counts once, however many
annotators it has: its pairs share one weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from steerlm_megatron.evaluate.agreement import Drawn, agreement, figures
from steerlm_megatron.evaluate.intervals import Floats, Resamples, verdict
from steerlm_megatron.evaluate.needs import ANNOTATED
from steerlm_megatron.evaluate.protocol import Labelled, Material, Need, Section

_METRICS = ("mse", "mae", "pearson", "kappa")
_KINDS = {"model": "the model", "annotator": "another annotator", "others": "the mean of the other annotators"}


class Annotators:
    """What predicts a single annotator's value best: the model, another annotator, or the mean of the others?"""

    name = "annotators"
    version = 1
    needs: tuple[Need, ...] = (ANNOTATED,)

    def run(self, material: Material) -> Section:
        """See :class:`Measure`."""
        labelled = material.labelled
        assert labelled is not None
        draws = Resamples(labelled.groups_P)
        found = {
            name: row
            for column, name in enumerate(labelled.names)
            if (row := _attribute(labelled, column, name, draws)) is not None
        }
        return {
            "title": "Annotator noise",
            "words": [
                "Who predicts a single annotator's value? Responses with the values of two annotators or more count, "
                "each once. A model whose error is not above another annotator's agrees with people as well "
                "as people agree with each other. Intervals are 95 %, by a bootstrap over prompts."
            ],
            "attributes": found,
            "tables": [
                {
                    "title": "Agreement with a single annotator",
                    "columns": ["attribute", "predicted by", "MSE", "MAE", "Pearson", "kappa", "responses"],
                    "rows": [
                        [name, _KINDS[kind], *(row[kind][key] for key in _METRICS), row["responses"]]
                        for name, row in found.items()
                        for kind in _KINDS
                    ],
                },
                {
                    "title": "MSE of people minus MSE of the model",
                    "words": ["Above zero: the model's error is below that of people."],
                    "columns": ["attribute", "another annotator", "is", "mean of the others", "is"],
                    "rows": [
                        [name, row["gain_annotator"], verdict(row["gain_annotator"]), row["gain_others"],
                         verdict(row["gain_others"])]
                        for name, row in found.items()
                    ],
                },
            ],
        }  # fmt: skip


def _attribute(labelled: Labelled, column: int, name: str, draws: Resamples) -> dict[str, Any] | None:
    """Return figures of the three kinds of prediction, and gains; None if no response has two values of ``name``."""
    series: dict[str, list[tuple[int, float, float, float]]] = {kind: [] for kind in _KINDS}
    responses = 0
    for place, given in enumerate(labelled.annotations):
        values = [one[name] for one in given if name in one]
        count = len(values)
        if count < 2:
            continue
        responses += 1
        predicted = float(labelled.predicted_PA[place, column])
        for i, value in enumerate(values):
            series["model"].append((place, predicted, value, 1 / count))
            series["others"].append((place, (sum(values) - value) / (count - 1), value, 1 / count))
            series["annotator"] += [
                (place, other, value, 1 / (count * (count - 1))) for j, other in enumerate(values) if j != i
            ]
    if not responses:
        return None
    top = labelled.schema.max_level
    found = {kind: _agreement(np.array(rows), draws, top) for kind, rows in series.items()}
    mine = draws.take(np.unique(np.array([row[0] for row in series["model"]])))
    out: dict[str, Any] = {"responses": responses}
    out |= {kind: figures(metrics, mine, responses) for kind, metrics in found.items()}
    for kind in ("annotator", "others"):
        gain = found[kind]["mse"].minus(found["model"]["mse"])
        out[f"gain_{kind}"] = mine.figure(gain.value, gain.draws, responses)
    return out


def _agreement(rows: Floats, draws: Resamples, top: int) -> dict[str, Drawn]:
    places, predicted, wanted, weights = rows.T
    return agreement(predicted, wanted, draws.take(places.astype(np.int64)), top, weights, _METRICS)
