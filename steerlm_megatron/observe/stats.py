"""Agreement of two series: errors, correlations, and their spread. Pure numpy.

Owns: the definitions that evaluation, validation during training and the report share. Invariant: a pair counts if its
*target* is not NaN (an unlabelled attribute). A NaN *prediction* is a fault and makes the result NaN; it is never
masked. A result without a value (nothing labelled, a constant series) is NaN too, never 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def labelled(predictions: ArrayLike, targets: ArrayLike) -> tuple[Floats, Floats]:
    """Return the pairs whose target is not NaN, flattened, as float64. The shapes must be equal."""
    predicted = np.asarray(predictions, dtype=np.float64).reshape(-1)
    wanted = np.asarray(targets, dtype=np.float64).reshape(-1)
    if predicted.shape != wanted.shape:
        raise ValueError(f"{predicted.size} predictions for {wanted.size} targets")
    present = ~np.isnan(wanted)
    return predicted[present], wanted[present]


def mse(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Return mean squared error over the labelled pairs; NaN without any."""
    predicted, wanted = labelled(predictions, targets)
    return float(np.mean((predicted - wanted) ** 2)) if wanted.size else float("nan")


def mae(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Return mean absolute error over the labelled pairs; NaN without any."""
    predicted, wanted = labelled(predictions, targets)
    return float(np.mean(np.abs(predicted - wanted))) if wanted.size else float("nan")


def pearson(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Return the linear correlation in [-1, 1]; NaN for fewer than two pairs or where either series is constant."""
    predicted, wanted = labelled(predictions, targets)
    if wanted.size < 2 or np.ptp(predicted) == 0 or np.ptp(wanted) == 0:
        return float("nan")
    x, y = predicted - predicted.mean(), wanted - wanted.mean()
    scale = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(np.clip(np.dot(x, y) / scale, -1.0, 1.0)) if scale else float("nan")


def spearman(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Return the Pearson correlation of the ranks, where ties share their mean rank; NaN where ``pearson`` is."""
    predicted, wanted = labelled(predictions, targets)
    if np.isnan(predicted).any():
        return float("nan")
    return pearson(ranks(predicted), ranks(wanted))


def ranks(values: ArrayLike) -> Floats:
    """Return ranks from 1, where equal values share their mean rank: [10, 20, 20, 30] -> [1, 2.5, 2.5, 4]. No NaN."""
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    _, group, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[group]


def sem(values: ArrayLike) -> float:
    """Return the standard error of the mean over the non-NaN values (n - 1 in the variance); NaN for fewer than two."""
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    array = array[~np.isnan(array)]
    return float(array.std(ddof=1) / np.sqrt(array.size)) if array.size >= 2 else float("nan")


def predicted_from(values: ArrayLike, targets: ArrayLike) -> Floats:
    """Return what a straight line in ``values``, fitted by least squares to all *other* targets, predicts of each one.

    Leaving out the target itself makes the errors those of held-out predictions. With the residual e of the line
    through all pairs and its leverage h, the residual without a pair is e / (1 - h) (Cook and Weisberg, Residuals and
    Influence in Regression, 1982, chapter 2). Entries without a target are NaN, and all are for fewer than three
    targets.
    """
    x, y = np.asarray(values, dtype=np.float64).reshape(-1), np.asarray(targets, dtype=np.float64).reshape(-1)
    out, present = np.full(y.size, np.nan), ~np.isnan(y)
    if (count := int(present.sum())) < 3:
        return out
    from_mean, wanted = x[present] - x[present].mean(), y[present]
    spread = float(from_mean @ from_mean)
    slope = float(from_mean @ wanted) / spread if spread else 0.0
    leverage = 1.0 / count + (from_mean**2 / spread if spread else 0.0)
    residual = wanted - (wanted.mean() + slope * from_mean)
    # A pair that alone decides the slope has a leverage of 1, and without it there is no line: its mean is taken.
    out[present] = wanted - residual / np.maximum(1.0 - leverage, 1.0 / count)
    return out


def mean_interval(values: ArrayLike, groups: Sequence[str], resamples: int = 2000) -> tuple[float, float]:
    """Return the bounds of the 95 % interval of the mean of ``values``, by a bootstrap over groups (percentiles).

    Whole groups are drawn with replacement (a cluster bootstrap: Davison and Hinkley, Bootstrap Methods and their
    Application, 1997, §3.8), since responses to one prompt are more alike than others. NaN values do not count. The
    draws have a fixed seed. NaN for fewer than two groups.
    """
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    present = ~np.isnan(array)
    _, owner = np.unique(np.asarray(groups)[present], return_inverse=True)
    sums, counts = np.bincount(owner, array[present]), np.bincount(owner)
    if sums.size < 2:
        return float("nan"), float("nan")
    rng, shares = np.random.default_rng(0), np.full(sums.size, 1.0 / sums.size)
    means = np.empty(resamples)
    for i in range(resamples):
        times = rng.multinomial(sums.size, shares)
        means[i] = times @ sums / (times @ counts)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def attribute_metrics(
    predictions_PA: ArrayLike,
    targets_PA: ArrayLike,
    names: Sequence[str],
    constants_A: ArrayLike,
    lengths_P: ArrayLike | None = None,
    groups_P: Sequence[str] = (),
) -> dict[str, dict[str, float]]:
    """Return the report's ``ap`` section: per attribute ``mse mae pearson spearman constant_mse n``.

    With lengths there are also ``length_mse`` and ``length_spearman``, of a predictor that knows a response's length
    alone (:func:`predicted_from` of its logarithm), and ``length_gain_low`` and ``length_gain_high``, the interval of
    ``length_mse - mse`` (:func:`mean_interval`). The line is fitted to the held-out labels themselves, each predicted
    by the others, so that it knows their mean and spread, which the model has to guess: this is the harder comparison.

    Args:
        predictions_PA: [pairs, attributes] values on the schema's scale.
        targets_PA: [pairs, attributes], NaN where unlabelled.
        names: the attributes, in column order.
        constants_A: the constant predictor's values: the *training* mean of each attribute.
        lengths_P: [pairs] characters of each response.
        groups_P: for each pair the prompt that it answers; pairs of one prompt are drawn together.
    """
    predicted = np.asarray(predictions_PA, dtype=np.float64).reshape(-1, len(names))
    wanted = np.asarray(targets_PA, dtype=np.float64).reshape(-1, len(names))
    constants = np.asarray(constants_A, dtype=np.float64).reshape(len(names))
    table: dict[str, dict[str, float]] = {}
    for column, name in enumerate(names):
        x, y = predicted[:, column], wanted[:, column]
        table[name] = {
            "mse": mse(x, y),
            "mae": mae(x, y),
            "pearson": pearson(x, y),
            "spearman": spearman(x, y),
            "constant_mse": mse(np.full_like(y, constants[column]), y),
            "n": int(np.count_nonzero(~np.isnan(y))),
        }
        if lengths_P is not None:
            by_length = predicted_from(np.log1p(np.asarray(lengths_P, dtype=np.float64)), y)
            low, high = mean_interval((by_length - y) ** 2 - (x - y) ** 2, groups_P)
            table[name] |= {
                "length_mse": mse(by_length, y),
                "length_spearman": spearman(np.asarray(lengths_P), y),
                "length_gain_low": low,
                "length_gain_high": high,
            }
    return table
