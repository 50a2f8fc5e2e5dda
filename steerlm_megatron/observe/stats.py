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


def attribute_metrics(
    predictions_PA: ArrayLike, targets_PA: ArrayLike, names: Sequence[str], constants_A: ArrayLike
) -> dict[str, dict[str, float]]:
    """Return the report's ``ap`` section: per attribute ``mse mae pearson spearman constant_mse n``.

    Args:
        predictions_PA: [pairs, attributes] values on the schema's scale.
        targets_PA: [pairs, attributes], NaN where unlabelled.
        names: the attributes, in column order.
        constants_A: the constant predictor's values: the *training* mean of each attribute.
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
    return table
