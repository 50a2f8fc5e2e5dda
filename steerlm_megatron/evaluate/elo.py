"""Ratings of models from games between pairs of them: Elo over many orders, and Bradley–Terry.

Owns: both formulas, and the chance to win that follows from two ratings. Does not own: what a game is (``wins.py``).
Pure numpy. Invariant: equal games give equal ratings, since all draws have a seed.

Dimension letters: G games, M models, R repetitions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from steerlm_megatron.evaluate.intervals import Floats, Resamples

Ints = NDArray[np.int64]

BASE, SCALE, INITIAL = 10.0, 400.0, 1000.0
_PASSES, _LONGEST_STEP, _CLOSE = 60, 2.0, 1e-9  # of Newton's method, in natural logarithms of strengths
_MOST_CELLS = 1 << 24  # orders times games that are in memory at once


def expected_score(rating: ArrayLike, other: ArrayLike) -> Floats:
    """Return the chance that a model with ``rating`` beats one with ``other``, a tie counted as half a win:
    1 / (1 + 10^((other - rating) / 400)) (Elo, The Rating of Chessplayers, 1978, §1.4; with this the SteerLM paper
    gives win rates, arXiv 2310.05344, table 2).
    """
    gap = (np.asarray(other, dtype=np.float64) - np.asarray(rating, dtype=np.float64)) / SCALE
    return np.asarray(1.0 / (1.0 + BASE**gap))


@dataclass(frozen=True)
class Games:
    """Games between ``models`` models: in game g ``first_G[g]`` met ``second_G[g]`` with the result ``result_G[g]``,
    which is 1 if the first won, 0 if the second did, 0.5 for a tie.
    """

    models: int
    first_G: Ints
    second_G: Ints
    result_G: Floats

    def __len__(self) -> int:
        return len(self.result_G)


def elo_ratings(games: Games, k: float = 32.0, orders: int = 1000, seed: int = 0) -> Floats:
    """Return Elo ratings [orders, M] after all games, in random orders of the games.

    Every model begins at 1000, and a game moves both ratings by k · (result - expected score). The last games count
    most, so one order says little; the SteerLM paper shuffles them 10,000 times (arXiv 2310.05344, §5.1). The spread
    over orders shows how much the order matters, not how sure a rating is: for that see :func:`bradley_terry`.
    """
    rng = np.random.default_rng(seed)
    most = max(1, _MOST_CELLS // max(1, len(games)))
    parts = [_elo(games, k, min(most, orders - done), rng) for done in range(0, orders, most)]
    return np.concatenate(parts)


def _elo(games: Games, k: float, orders: int, rng: np.random.Generator) -> Floats:
    """Do :func:`elo_ratings` for so few orders that they fit into memory."""
    rows, ratings = np.arange(orders), np.full((orders, games.models), INITIAL)
    order_RG = np.argsort(rng.random((orders, len(games)), dtype=np.float32), axis=1)
    for game_R in order_RG.T:  # one game of every order at a time
        first, second = games.first_G[game_R], games.second_G[game_R]
        gain = k * (games.result_G[game_R] - expected_score(ratings[rows, first], ratings[rows, second]))
        ratings[rows, first] += gain
        ratings[rows, second] -= gain
    return ratings


def win_matrix(games: Games) -> Floats:
    """Return [M, M]: how often the model of a row won against that of a column, a tie counted as half for both."""
    wins = np.zeros((games.models, games.models))
    np.add.at(wins, (games.first_G, games.second_G), games.result_G)
    np.add.at(wins, (games.second_G, games.first_G), 1.0 - games.result_G)
    return wins


def bradley_terry(wins_RMM: ArrayLike, prior: float = 0.5) -> Floats:
    """Return ratings [R, M] (or [M] for one matrix) on Elo's scale under which the wins are most likely.

    The model is Bradley and Terry's (Biometrika 39, 1952): i beats j with the chance of :func:`expected_score`. Its
    log-likelihood, Σ wins_ij · log p_ij, is concave, and Newton's method finds the maximum. Ratings have the mean 1000
    over the models that met others; one that met nobody has NaN.

    Args:
        wins_RMM: matrices of :func:`win_matrix`.
        prior: wins that are added to each side of every two models that met. Without it (0) there is no finite maximum
            if some models never lose to the others, and the ratings of such models run away until the iteration ends;
            0.5 is the usual correction for empty cells (Haldane, Annals of Human Genetics 20, 1956).
    """
    wins = np.asarray(wins_RMM, dtype=np.float64)
    single, models = wins.ndim == 2, wins.shape[-1]
    wins = wins.reshape(-1, models, models)
    met = (wins + wins.transpose(0, 2, 1)) > 0
    wins = wins + prior * met
    games, won = wins + wins.transpose(0, 2, 1), wins.sum(axis=2)
    log_strength, itself = np.zeros_like(won), np.arange(models)
    # All ratings may be raised together, which makes the Hessian singular; a small diagonal picks the shortest step.
    ridge = 1e-9 * np.eye(models)
    for _ in range(_PASSES):
        chance = 1.0 / (1.0 + np.exp(log_strength[:, None, :] - log_strength[:, :, None]))
        curvature = -games * chance * (1.0 - chance)
        curvature[:, itself, itself] -= curvature.sum(axis=2)
        gradient = won - (games * chance).sum(axis=2)
        step = np.linalg.solve(curvature + ridge, gradient[:, :, None])[:, :, 0].clip(-_LONGEST_STEP, _LONGEST_STEP)
        log_strength += step - step.mean(axis=1, keepdims=True)
        if np.abs(step).max(initial=0.0) < _CLOSE:
            break
    plays = met.any(axis=2)
    ratings = np.where(plays, SCALE * log_strength / np.log(BASE), np.nan)
    counts = np.maximum(plays.sum(axis=1, keepdims=True), 1)
    ratings += INITIAL - np.where(plays, ratings, 0.0).sum(axis=1, keepdims=True) / counts
    return ratings[0] if single else ratings


def resampled_ratings(games: Games, resamples: Resamples, prior: float = 0.5) -> Floats:
    """Return Bradley–Terry ratings [draws, M] of the games in each draw of ``resamples``, whose items are the games. A
    game whose result is NaN does not count.
    """
    cells_GC = np.zeros((len(games), games.models * games.models))
    rows = np.arange(len(games))
    cells_GC[rows, games.first_G * games.models + games.second_G] = np.nan_to_num(games.result_G)
    cells_GC[rows, games.second_G * games.models + games.first_G] = np.nan_to_num(1.0 - games.result_G)
    return bradley_terry(resamples.sums(cells_GC).reshape(-1, games.models, games.models), prior)
