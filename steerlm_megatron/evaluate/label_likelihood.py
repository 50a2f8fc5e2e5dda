"""P(a | x, y): how likely the asked levels are for a response whose attributes were predicted (SteerLM 2.0).

An attribute-prediction model predicts a value r of the scale 0 … L. The label that a person would give is taken to be
around r/L with a beta distribution of α = c · r/L and β = c − α, where c = 24 matches the spread of HelpSteer2's labels
(arXiv 2406.08673 §4.5). The probability of level n is that distribution's mass between n's bounds.

The paper does not say where the bounds are. ``nearest``: level n has what rounds to it, (n − ½)/L … (n + ½)/L, so that
a prediction of exactly n has n as its likeliest level. ``equal``: L + 1 equal parts of the scale, n/(L + 1) …
(n + 1)/(L + 1). Nor does it say what holds at the ends of the scale, where α or β would be 0: here neither is less than
1, so that the density is finite and the likeliest level at an end is that end. Attributes are taken to be independent
of each other given the response, as their predictions are.

Owns: these formulas. Does not own: predictions, which responses are compared (``stages/weigh.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

_SMALLEST_SHAPE = 1.0
_SMALLEST = 1e-300  # a probability below it counts as this, so that its logarithm is a number


def bounds(max_level: int, bins: str) -> list[float]:
    """Return the ``max_level`` + 2 bounds of the levels on the scale 0 … 1, from 0 to 1.

    Args:
        bins: ``nearest`` or ``equal`` (see the module).
    """
    if bins == "equal":
        return [n / (max_level + 1) for n in range(max_level + 2)]
    return [0.0, *((n + 0.5) / max_level for n in range(max_level)), 1.0]


def level_probabilities(
    value: float, max_level: int, concentration: float = 24.0, bins: str = "nearest"
) -> list[float]:
    """Return P(level) of each of 0 … ``max_level`` for a predicted ``value`` on that scale. They sum to 1.

    Args:
        concentration: c = α + β of the beta distribution; at least twice the smallest shape, 1, counts.
    """
    from scipy.special import betainc, betaincc

    share = min(max(value / max_level, 0.0), 1.0)
    alpha = max(concentration * share, _SMALLEST_SHAPE)
    beta = max(concentration * (1.0 - share), _SMALLEST_SHAPE)
    edges, mean = bounds(max_level, bins), alpha / (alpha + beta)
    below, above = betainc(alpha, beta, edges), betaincc(alpha, beta, edges)
    # Both tails are differences of small numbers: that of the nearer end keeps its digits.
    return [
        float(above[n] - above[n + 1] if edges[n] > mean else below[n + 1] - below[n]) for n in range(max_level + 1)
    ]


def log_likelihood(
    asked: Mapping[str, int],
    predicted: Mapping[str, float],
    names: Sequence[str],
    max_level: int,
    concentration: float = 24.0,
    bins: str = "nearest",
) -> float:
    """Return log P(a | x, y) = Σ over ``names`` of log P(asked level), natural logarithm."""
    total = 0.0
    for name in names:
        found = level_probabilities(predicted[name], max_level, concentration, bins)[asked[name]]
        total += math.log(max(found, _SMALLEST))
    return total
