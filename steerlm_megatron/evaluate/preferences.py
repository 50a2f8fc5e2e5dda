"""The measure ``preferences``: does the attribute-prediction model tell the response that people chose?

Owns: the weights of attributes that tell best, and the share of pairs that are told. Does not own: scoring, the form of
pairs (``steer/preferences.py``). Invariant: a pair is told by weights that were found on other prompts.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from steerlm_megatron.evaluate import needs
from steerlm_megatron.evaluate.intervals import Floats, Resamples, verdict
from steerlm_megatron.evaluate.protocol import Material, Need, Preferences, Section

_RIDGE = 1.0  # strength of the penalty on the weights, of attributes in units of their spread
_HALVES = (0, 1)
_LONGER = "longer response"


class PreferencePairs:
    """Pairwise accuracy of a weighted sum of attributes, of each attribute alone, and of the length."""

    name = "preferences"
    version = 1
    needs: tuple[Need, ...] = (needs.PREFERENCES,)

    def run(self, material: Material) -> Section:
        """See :class:`Measure`."""
        pairs = material.preferences
        assert pairs is not None
        draws = Resamples(pairs.groups_P)
        halves = np.array([half_of(group) for group in pairs.groups_P])
        fitted = {half: weights_of((pairs.chosen_PA - pairs.rejected_PA)[halves == half]) for half in _HALVES}
        told = _told(pairs, halves, fitted)
        rows = _rows(draws, told)
        whole = weights_of(pairs.chosen_PA - pairs.rejected_PA)
        weights = {
            name: {
                key: float(one[column]) for key, one in (("all", whole), ("half_1", fitted[0]), ("half_2", fitted[1]))
            }
            for column, name in enumerate(pairs.names)
        }
        return {
            "title": "Which response did people choose?",
            "words": [
                f"{len(pairs.groups_P)} pairs of {draws.groups} prompts. The weights of the sum were found on one half "
                "of the prompts (by logistic regression of the differences) and judge the other half, and the other "
                "way round. An attribute alone, but for the quality, is turned to the side that was right more often "
                "in the half that is not judged. A tie counts half. "
                "Intervals are 95 %, by a bootstrap over prompts."
            ],
            "pairs": len(pairs.groups_P),
            "accuracy": rows,
            "weights": weights,
            "summary": [[f"told by {name}", rows[name]["accuracy"]] for name in ("weighted sum", _LONGER)],
            "tables": [
                {
                    "title": "Share of pairs in which the chosen response is told",
                    "columns": ["by", "share", "pairs", "minus that of the longer response", "is"],
                    "rows": [
                        [name, row["accuracy"], row["accuracy"]["n"], row["gain"], row["is"]]
                        for name, row in rows.items()
                    ],
                },
                {
                    "title": "Weights of the sum",
                    "words": ["Change of the log-odds of being chosen per unit of the attribute's scale."],
                    "columns": ["attribute", "all pairs", "first half", "second half"],
                    "rows": [[name, row["all"], row["half_1"], row["half_2"]] for name, row in weights.items()],
                },
            ],
        }


def half_of(group: str) -> int:
    """Return in which half of the prompts one is, by a hash of its text."""
    return hashlib.sha256(group.encode("utf-8", "surrogatepass")).digest()[0] % 2


def _told(pairs: Preferences, halves: np.ndarray, fitted: dict[int, Floats]) -> dict[str, Floats]:
    """Return per predictor [pairs]: 1 where it prefers the chosen response, 0 the rejected one, ½ neither."""
    differences_PA = pairs.chosen_PA - pairs.rejected_PA
    weights_PA = np.stack([fitted[1 - half] for half in halves])
    told = {"weighted sum": _right((differences_PA * weights_PA).sum(axis=1))}
    told[_LONGER] = _right(pairs.lengths_P2[:, 0] - pairs.lengths_P2[:, 1])
    for column, name in enumerate(pairs.names):
        as_is = _right(differences_PA[:, column])
        turned = np.zeros(len(halves), dtype=np.bool_)
        for half in _HALVES:
            elsewhere = as_is[halves == 1 - half]
            if name != pairs.schema.quality and elsewhere.size and elsewhere.mean() < 0.5:
                turned |= halves == half
        told[f"{name} alone"] = np.where(turned, 1.0 - as_is, as_is)
    return told


def _right(differences: Floats) -> Floats:
    return (np.sign(differences) + 1.0) / 2.0


def _rows(draws: Resamples, told: dict[str, Floats]) -> dict[str, dict[str, Any]]:
    """Return per predictor its accuracy, and its gain on the longer response with what the interval says of it."""
    right = np.stack(list(told.values()), axis=1)
    accuracy, gain = draws.columns(right), draws.columns(right - told[_LONGER][:, None])
    return {
        name: {"accuracy": one, "gain": more, "is": "–" if name == _LONGER else verdict(more)}
        for name, one, more in zip(told, accuracy, gain, strict=True)
    }


def weights_of(differences_PA: Floats) -> Floats:
    """Return the weights [A] of attributes of which the sum tells the chosen response best: those that maximise the
    likelihood of a Bradley-Terry model, P(chosen) = 1 / (1 + exp(−w · d)), with d the difference of the attributes.

    It is a logistic regression without an intercept, with a penalty of ½ |w|² for attributes that are divided by their
    root mean square difference; the weights that are returned are per unit of the attributes. Solved by Newton's
    method. Without pairs all weights are 0.
    """
    scale = np.sqrt((differences_PA**2).mean(axis=0)) if len(differences_PA) else np.ones(differences_PA.shape[1])
    scale = np.where(scale > 0, scale, 1.0)
    x, w = differences_PA / scale, np.zeros(differences_PA.shape[1])

    def loss(weights: Floats) -> float:
        return float(np.logaddexp(0.0, -x @ weights).sum() + _RIDGE / 2.0 * weights @ weights)

    for _ in range(100):
        wrong = 0.5 * (1.0 - np.tanh(x @ w / 2.0))  # 1 / (1 + exp(x · w)), which cannot overflow
        gradient = _RIDGE * w - wrong @ x
        hessian = _RIDGE * np.eye(len(w)) + (x * (wrong * (1.0 - wrong))[:, None]).T @ x
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while loss(w - size * step) > loss(w) and size > 1e-6:
            size /= 2.0
        w = w - size * step
        if np.abs(step).max(initial=0.0) < 1e-10:
            break
    return w / scale
