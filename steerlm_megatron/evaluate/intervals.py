"""Figures with their 95 % intervals, by a bootstrap over groups of responses. Pure numpy.

Owns: which responses are drawn together, and how an interval follows from the draws. Does not own: the figures that
are computed of each draw (the measures beside this module). Invariants: whole groups are drawn, since responses to one
prompt are more alike than others; the draws have a fixed seed, so that the same numbers give the same interval; two
things that are compared are compared within each draw (paired).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
RESAMPLES = 1000
COVERAGE = 0.95
NAN = float("nan")
_CACHED = 1 << 17  # floats of a chunk of draws


def figure(value: float, low: float = NAN, high: float = NAN, n: int | None = None) -> dict[str, Any]:
    """Return a figure for JSON: ``{value, low, high, n}``, the bounds those of its 95 % interval, NaN where there is
    none, ``n`` the number of responses (or pairs of them) that it is of.
    """
    return {"value": float(value), "low": float(low), "high": float(high), "n": n}


def verdict(of: dict[str, Any]) -> str:
    """Return what the interval of a difference says: ``above``, ``below`` (zero), ``not told apart``, or ``not
    measured``.
    """
    low, high = of["low"], of["high"]
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return "not measured"
    return "above" if low > 0 else "below" if high < 0 else "not told apart"


def tail(groups: int) -> float:
    """Return the share of draws below the lower bound (and above the upper one) of a 95 % interval over ``groups``.

    It would be 0.025, but percentiles of bootstrap draws are too narrow for few groups: the spread of the draws is too
    small by sqrt((n − 1) / n), and the normal distribution takes the place of Student's t. The share Φ(−sqrt(n /
    (n − 1)) · t(0.975; n − 1)) makes up for both (the expanded percentile interval: Hesterberg, What Teachers Should
    Know About the Bootstrap, arXiv 1411.5279, §4.3). With 12 groups it is 0.011, with 1000 it is 0.025.
    """
    degrees = groups - 1
    return NormalDist().cdf(-math.sqrt(groups / degrees) * _student(degrees))


def _student(degrees: int) -> float:
    """Return Student's t of which 0.975 lies below, for ``degrees`` of freedom."""
    if degrees in (1, 2):
        return (12.7062, 4.3027)[degrees - 1]
    z = NormalDist().inv_cdf(1.0 - (1.0 - COVERAGE) / 2.0)
    # Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5; off by less than 0.01 from 3 degrees on.
    terms = (
        (z**3 + z) / 4.0,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96.0,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384.0,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160.0,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))


class Resamples:
    """Draws of whole groups with replacement: a cluster bootstrap (Davison and Hinkley, Bootstrap Methods and their
    Application, 1997, §3.8).

    Args:
        groups: of each item (a response, a pair) the group that it belongs to; G different ones.
        resamples: the number B of draws.
        seed: of the draws.
    """

    def __init__(self, groups: Sequence[Any] | NDArray[Any], resamples: int = RESAMPLES, seed: int = 0) -> None:
        names, owner = np.unique(np.asarray(groups), return_inverse=True)
        count, rng = len(names), np.random.default_rng(seed)
        times = np.empty((resamples, count), dtype=np.uint8)  # a group is in a draw some few times
        for draw in times:
            draw[:] = np.bincount(rng.integers(max(count, 1), size=count), minlength=count)
        self._set(owner, times)

    def _set(self, owner: NDArray[Any], times_BG: NDArray[np.uint8]) -> None:
        self.owner, self.times_BG = owner, times_BG
        self.items, self.groups = len(owner), times_BG.shape[1]

    def take(self, places: NDArray[Any]) -> Resamples:
        """Return the same draws for other items: ``places`` [items] are the places of the present items that they
        belong to, such as the response that a pair of annotations is of; or a mask of the items that are left.
        """
        found = object.__new__(Resamples)
        names, owner = np.unique(self.owner[places], return_inverse=True)
        found._set(owner, self.times_BG[:, names])
        return found

    def sums(self, values: ArrayLike) -> Floats:
        """Return [draws, …] sums of ``values`` [items, …] over the items of each draw."""
        array = np.asarray(values, dtype=np.float64)
        flat = array.reshape(self.items, math.prod(array.shape[1:]))
        columns = [np.bincount(self.owner, column, self.groups) for column in flat.T]
        return self._drawn(np.asarray(columns, dtype=np.float64).T).reshape(-1, *array.shape[1:])

    def tables(self, cells: NDArray[np.int64], size: int, weights: Floats) -> Floats:
        """Return [draws, size]: the sum of ``weights`` [items] in each cell of a table, of which ``cells`` [items] has
        an item's number.
        """
        by_group = np.bincount(self.owner * size + cells, weights, self.groups * size)
        return self._drawn(np.asarray(by_group, dtype=np.float64).reshape(self.groups, size))

    def _drawn(self, by_group: Floats) -> Floats:
        """Return [draws, k] sums of ``by_group`` [groups, k], for some draws at a time, which a cache can hold."""
        rows = max(1, _CACHED // max(self.groups, 1))
        parts = range(0, len(self.times_BG), rows)
        return np.concatenate([self.times_BG[at : at + rows].astype(np.float64) @ by_group for at in parts])

    def means(self, values: ArrayLike) -> Floats:
        """Return [draws, …] means of ``values`` [items, …]; NaN values do not count."""
        array = np.asarray(values, dtype=np.float64)
        present = ~np.isnan(array)
        sums = self.sums(np.stack((np.where(present, array, 0.0), present), axis=-1))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], NAN)

    def bounds(self, draws: ArrayLike) -> tuple[Any, Any]:
        """Return the bounds of the 95 % interval of a figure from its ``draws`` [B, …], each of shape […].

        Draws in which the figure has no value (a correlation with a constant) do not count, unless they are more than
        a tenth; the bounds are NaN then, and for fewer than two groups.
        """
        array = np.asarray(draws, dtype=np.float64)
        if self.groups < 2:
            none = np.full(array.shape[1:], NAN)
            return (none, none) if none.shape else (NAN, NAN)
        share = tail(self.groups)
        absent = np.isnan(array)
        lost = absent.mean(axis=0) > 0.1
        quantile = np.nanquantile if absent.any() else np.quantile  # the first is many times slower
        low, high = quantile(np.where(lost, 0.0, array), (share, 1.0 - share), axis=0)
        low, high = np.where(lost, NAN, low), np.where(lost, NAN, high)
        return (low, high) if low.shape else (float(low), float(high))

    def figure(self, value: float, draws: ArrayLike, n: int | None = None) -> dict[str, Any]:
        """Return ``value`` with the interval that ``draws`` [B] give."""
        low, high = self.bounds(draws)
        return figure(value, low, high, self.items if n is None else n)

    def mean(self, values: ArrayLike) -> dict[str, Any]:
        """Return the mean of ``values`` [items] with its interval; NaN values do not count."""
        return self.columns(np.asarray(values, dtype=np.float64)[:, None])[0]

    def columns(self, values: ArrayLike) -> list[dict[str, Any]]:
        """Return the mean of each column of ``values`` [items, k] with its interval; NaN values do not count."""
        array = np.asarray(values, dtype=np.float64)
        counts = np.count_nonzero(~np.isnan(array), axis=0)
        lows, highs = self.bounds(self.means(array))
        sums = np.nansum(array, axis=0)
        return [
            figure(total / n if n else NAN, low, high, int(n))
            for total, n, low, high in zip(sums, counts, lows, highs, strict=True)
        ]


def mean_over_seeds(values_SP: ArrayLike, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return the bounds of the 95 % interval of the mean of values [seeds, prompts], by a bootstrap (percentiles) that
    draws seeds and prompts with replacement, each by themselves.

    A training's luck moves all values of a seed, and a hard prompt those of all seeds, so neither may be taken for many
    independent values. This is the pigeonhole bootstrap of crossed data (Owen, The Pigeonhole Bootstrap, Annals of
    Applied Statistics 1(2), 2007). With few seeds it still sees less of their spread than there is (with three, two
    thirds of its variance). One seed gives an interval over prompts alone; NaN for fewer than two prompts.
    """
    table = np.asarray(values_SP, dtype=np.float64)
    seeds, prompts = table.shape
    if prompts < 2:
        return NAN, NAN
    rng = np.random.default_rng(0)
    times_S = rng.multinomial(seeds, np.full(seeds, 1.0 / seeds), size=resamples)
    times_P = rng.multinomial(prompts, np.full(prompts, 1.0 / prompts), size=resamples)
    means = ((times_S @ table) * times_P).sum(axis=1) / (seeds * prompts)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
