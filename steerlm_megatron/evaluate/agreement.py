"""How well two series of values agree: errors, correlations, kappa of levels, each with its draws.

Owns: the formulas, of all items and of every draw at once. Does not own: which series are compared (the measures), the
same formulas without draws (``observe/stats.py``). Invariants: a figure of all items is what ``observe/stats.py`` or
scikit-learn gives; a NaN among the values makes the figures NaN, it is never masked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerlm_megatron.evaluate.intervals import NAN, Floats, Resamples
from steerlm_megatron.observe import stats

METRICS = ("mse", "mae", "pearson", "spearman", "kappa", "accuracy")


@dataclass(frozen=True)
class Drawn:
    """A figure of all items, and of each draw [draws]."""

    value: float
    draws: Floats

    def minus(self, other: Drawn) -> Drawn:
        """Return the difference, within each draw."""
        return Drawn(self.value - other.value, self.draws - other.draws)


def levels_of(values: Floats, top: int) -> NDArray[np.int64]:
    """Return the levels of values: rounded half to even, clamped to 0..``top`` (as ``AttributeSchema.level``)."""
    return np.rint(np.clip(values, 0, top)).astype(np.int64)


def agreement(
    predicted: Floats,
    wanted: Floats,
    draws: Resamples,
    top: int,
    weights: Floats | None = None,
    only: Sequence[str] = METRICS,
) -> dict[str, Drawn]:
    """Return the metrics ``only`` of predictions against targets, all [items], on a scale 0..``top``.

    * ``mse``, ``mae``: mean squared and mean absolute error.
    * ``pearson``: linear correlation; ``spearman``: that of the ranks, where ties share their mean rank (not with
      ``weights``).
    * ``kappa``: Cohen's kappa of the levels with quadratic weights (Cohen, Psychological Bulletin 70, 1968): 1 − the
      mean squared difference of the levels over that of independent ones with the same marginals.
    * ``accuracy``: share of equal levels.

    ``weights`` [items] count an item more or less than once. A figure that has no value is NaN.
    """
    w = np.ones(len(wanted)) if weights is None else weights
    if not len(wanted) or np.isnan(predicted).any() or np.isnan(wanted).any():
        return {name: Drawn(NAN, np.full(len(draws.times_BG), NAN)) for name in only}
    error, levels = predicted - wanted, (levels_of(predicted, top), levels_of(wanted, top))
    means = {"mse": error**2, "mae": np.abs(error), "accuracy": (levels[0] == levels[1]).astype(np.float64)}
    # The sums of all figures are drawn at once, which takes hardly longer than those of one.
    columns = {"weight": w, **{name: values * w for name, values in means.items() if name in only}}
    if "pearson" in only:
        columns |= _moments(predicted, wanted, w)
    if "spearman" in only:
        assert weights is None, "ranks are of items that count once"
        columns["influence"] = influence_on_spearman(predicted, wanted)
    sums = dict(zip(columns, draws.sums(np.stack(list(columns.values()), axis=1)).T, strict=True))
    whole = {name: values.sum() for name, values in columns.items()}
    found = {name: Drawn(float(whole[name] / whole["weight"]), _over(sums, name)) for name in means if name in only}
    if "pearson" in only:
        varied = np.ptp(predicted) > 0 and np.ptp(wanted) > 0
        found["pearson"] = Drawn(float(_correlation(whole)) if varied else NAN, _correlation(sums))
    if "spearman" in only:
        found["spearman"] = _spearman(stats.spearman(predicted, wanted), _over(sums, "influence"))
    if "kappa" in only:
        found["kappa"] = _kappa(*levels, w, draws, top)
    return {name: found[name] for name in only}


def figures(found: dict[str, Drawn], draws: Resamples, n: int) -> dict[str, dict[str, Any]]:
    """Return the figures of metrics with their intervals, ``n`` items each."""
    return {name: draws.figure(one.value, one.draws, n) for name, one in found.items()}


def _over(sums: Mapping[str, Floats], name: str) -> Floats:
    """Return the mean of a column within each draw, NaN for a draw without items."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(sums["weight"] > 0, sums[name] / sums["weight"], NAN)


def _moments(x: Floats, y: Floats, w: Floats) -> dict[str, Floats]:
    x, y = x - np.average(x, weights=w), y - np.average(y, weights=w)  # near zero, squares lose no digits
    return {"x": w * x, "y": w * y, "xx": w * x * x, "yy": w * y * y, "xy": w * x * y}


def _correlation(sums: Mapping[str, Any]) -> Floats:
    """Return the correlation from sums of the weights and of moments; NaN where a series is constant."""
    n, x, y = sums["weight"], sums["x"], sums["y"]
    with np.errstate(invalid="ignore", divide="ignore"):
        varied, other = sums["xx"] - x * x / n, sums["yy"] - y * y / n
        # A constant series has a variance of rounding errors alone.
        there = (varied > 1e-12 * sums["xx"]) & (other > 1e-12 * sums["yy"])
        return np.where(there, np.clip((sums["xy"] - x * y / n) / np.sqrt(varied * other), -1.0, 1.0), NAN)


def _spearman(value: float, moved: Floats) -> Drawn:
    """Return the rank correlation r and its draws, from the mean influence of each draw's items.

    Ranking within every draw would take N log N steps each. The draws are of the expansion to first order instead (the
    infinitesimal jackknife: Efron, The Jackknife, the Bootstrap and Other Resampling Plans, 1982, chapter 6), on
    Fisher's scale arctanh r, where the expansion is closest.
    """
    if np.isnan(value):
        return Drawn(value, np.full(len(moved), NAN))
    left = 1.0 - value**2
    if left < 1e-12:
        return Drawn(value, np.full(len(moved), value))
    return Drawn(value, np.tanh(np.arctanh(value) + moved / left))


def influence_on_spearman(x: Floats, y: Floats) -> Floats:
    """Return how far each item moves the rank correlation: its derivative in the item's weight, [items] of mean zero.

    With u and v the places of x and y in their series, in [0, 1] with ties in the middle, less ½, the correlation is
    C / sqrt(A B), where C = mean(u v), A = mean(u²), B = mean(v²). An item's weight changes these means by its own term
    and, through the places of all others, by twice the part of the sum that lies above it (Croux and Dehon, Influence
    Functions of the Spearman and Kendall Correlation Measures, Statistical Methods & Applications 19, 2010, which has
    the case without ties).
    """
    n = len(x)
    u, v = (stats.ranks(x) - 0.5) / n - 0.5, (stats.ranks(y) - 0.5) / n - 0.5
    both, first, second = float(np.mean(u * v)), float(np.mean(u * u)), float(np.mean(v * v))
    on_both = u * v + _mean_above(x, v) + _mean_above(y, u) - 3 * both
    on_first = u * u + 2 * _mean_above(x, u) - 3 * first
    on_second = v * v + 2 * _mean_above(y, v) - 3 * second
    if not first or not second:
        return np.zeros(n)  # a constant series has no rank correlation that could move
    scale = np.sqrt(first * second)
    return np.asarray(on_both / scale - both / scale / 2.0 * (on_first / first + on_second / second))


def _mean_above(series: Floats, values: Floats) -> Floats:
    """Return for each item the sum of ``values`` over items that are above it in ``series``, half of those that are
    equal, divided by the number of items.
    """
    names, run = np.unique(series, return_inverse=True)
    of_run = np.bincount(run, values, len(names))
    above = of_run.sum() - np.cumsum(of_run)
    return np.asarray((above + of_run / 2.0)[run] / len(series))


def _kappa(x: NDArray[np.int64], y: NDArray[np.int64], w: Floats, draws: Resamples, top: int) -> Drawn:
    size = top + 1
    cells = x * size + y
    squares = (np.arange(size)[:, None] - np.arange(size)) ** 2.0

    def of(counts: Floats) -> Floats:
        table = counts.reshape(-1, size, size)
        total = table.sum(axis=(1, 2))
        expected = np.einsum("bi,bj,ij->b", table.sum(axis=2), table.sum(axis=1), squares)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(expected > 0, 1.0 - np.einsum("bij,ij->b", table, squares) * total / expected, NAN)

    whole = np.asarray(np.bincount(cells, w, size * size), dtype=np.float64)
    return Drawn(float(of(whole)[0]), of(draws.tables(cells, size * size, w)))
