"""Elo and Bradley–Terry ratings against published figures, closed forms and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from steerlm_megatron.evaluate.elo import (
    Games,
    bradley_terry,
    elo_ratings,
    expected_score,
    resampled_ratings,
    win_matrix,
)
from steerlm_megatron.evaluate.intervals import Resamples

# Ratings and expected win rates (%) against ChatGPT 3.5 of the SteerLM paper, arXiv 2310.05344, table 2.
AUTOMATIC = {
    "SteerLM 43B": (1139, 66), "SteerLM 13B": (1110, 62), "Guanaco 65B": (1065, 56), "ChatGPT 3.5": (1023, 50),
    "Vicuna 13B": (1001, 47), "LLaMA 30B RLHF": (925, 36), "LLaMA 30B SFT": (935, 37), "text-davinci-003": (800, 22),
}  # fmt: skip
HUMAN = {"SteerLM 43B": (1040, 59), "ChatGPT 3.5": (981, 50), "Guanaco 65B": (977, 50)}


@pytest.mark.parametrize("published", [AUTOMATIC, HUMAN])
def test_the_papers_win_rates_follow_from_its_ratings(published: dict[str, tuple[int, int]]) -> None:
    against = published["ChatGPT 3.5"][0]
    for name, (rating, percent) in published.items():
        assert abs(100 * float(expected_score(rating, against)) - percent) < 1, name


def games(rows: list[tuple[int, int, float]], models: int = 2) -> Games:
    first, second, result = (np.array(column) for column in zip(*rows, strict=True))
    return Games(models, first, second, result.astype(float))


def test_elo_of_few_games_by_hand() -> None:
    assert elo_ratings(games([(0, 1, 1.0)]), orders=3).tolist() == [[1016.0, 984.0]] * 3
    assert elo_ratings(games([(0, 1, 0.5)]), orders=1).tolist() == [[1000.0, 1000.0]]
    after = elo_ratings(games([(0, 1, 1.0), (0, 1, 1.0)]), k=10, orders=1)[0, 0]
    assert after == pytest.approx(1005 + 10 * (1 - 1 / (1 + 10 ** (-10 / 400))))
    early_or_late = elo_ratings(games([(0, 1, 1.0), (0, 1, 0.0)]), orders=64)[:, 0]
    assert sorted(set(early_or_late.round(3))) == pytest.approx([998.528, 1001.472], abs=0.01), "both orders occur"


def plainly(played: Games, order: list[int], k: float) -> list[float]:
    ratings = [1000.0] * played.models
    for game in order:
        a, b = played.first_G[game], played.second_G[game]
        gain = k * (played.result_G[game] - 1 / (1 + 10 ** ((ratings[b] - ratings[a]) / 400)))
        ratings[a] += gain
        ratings[b] -= gain
    return ratings


def test_elo_orders_equal_a_plain_loop_and_do_not_depend_on_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 3, 40)
    played = Games(4, first, (first + 1) % 4, rng.choice([0.0, 0.5, 1.0], 40))
    many = elo_ratings(played, orders=500, seed=3)
    assert np.allclose(many.sum(axis=1), 4000)
    order = np.argsort(np.random.default_rng(3).random((500, 40), dtype=np.float32), axis=1)
    for row in (0, 7, 499):
        assert many[row] == pytest.approx(plainly(played, order[row].tolist(), 32.0))
    monkeypatch.setattr("steerlm_megatron.evaluate.elo._MOST_CELLS", 40 * 64)
    assert np.array_equal(elo_ratings(played, orders=500, seed=3), many)


def test_bradley_terry_of_two_models_is_their_log_odds() -> None:
    ratings = bradley_terry(win_matrix(games([(0, 1, 1.0)] * 15 + [(1, 0, 1.0)] * 5)), prior=0.0)
    assert ratings[0] - ratings[1] == pytest.approx(400 * np.log10(3)) and ratings.mean() == pytest.approx(1000)
    assert bradley_terry([[0, 1.5], [1.5, 0]], prior=0.0) == pytest.approx([1000, 1000])


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 9), min_size=16, max_size=16), st.sampled_from([0.0, 0.5]))
def test_bradley_terry_is_the_maximum(counts: list[int], prior: float) -> None:
    wins = np.array(counts, dtype=float).reshape(4, 4)
    wins += 0.0 if prior else 1.0  # without a prior there is a maximum only where nobody is unbeaten
    np.fill_diagonal(wins, 0.0)
    found = bradley_terry(wins, prior)
    if not ((wins + wins.T + np.eye(4)) > 0).all():
        return  # two models that did not meet; their distance is not in question here
    used = wins + prior * (1 - np.eye(4))

    def loss(strengths: np.ndarray) -> float:
        gaps = strengths[None, :] - strengths[:, None]
        return float((used * np.logaddexp(0, gaps)).sum())

    best = minimize(loss, np.zeros(4), tol=1e-10).x
    expected = 1000 + 400 / np.log(10) * (best - best.mean())
    assert found == pytest.approx(expected, abs=0.05)


def test_a_model_that_always_wins_has_a_finite_rating_and_one_without_games_none() -> None:
    rows = [(0, 1, 1.0)] * 10 + [(1, 2, 1.0)] * 3 + [(1, 2, 0.0)] * 3
    ratings = bradley_terry(win_matrix(games(rows, 4)))
    assert ratings[0] > ratings[1] and np.isfinite(ratings[:3]).all() and np.isnan(ratings[3])
    assert ratings[0] - ratings[1] < 400 * np.log10(21) + 1e-6
    assert np.isfinite(bradley_terry(win_matrix(games(rows, 4)), prior=0.0)[:3]).all(), "the iteration ends"


def simulated(rng: np.random.Generator, truth: np.ndarray, questions: int) -> Games:
    """Return games of three models, one of each pair per question, with the chances of the ratings ``truth``."""
    first, second = np.tile([0, 0, 1], questions), np.tile([1, 2, 2], questions)
    won = rng.random(3 * questions) < expected_score(truth[first], truth[second])
    return Games(3, first, second, won.astype(float))


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng, truth, held = np.random.default_rng(5), np.array([1100.0, 1000.0, 900.0]), []
    for _ in range(80):
        resamples = Resamples(np.repeat(np.arange(60), 3), 400)
        low, high = resamples.bounds(resampled_ratings(simulated(rng, truth, 60), resamples))
        held.append((low < truth) & (truth < high))
    assert 0.9 < np.mean(held) < 0.99


def test_a_draw_is_the_rating_of_the_games_of_its_questions() -> None:
    played = simulated(np.random.default_rng(6), np.array([1100.0, 1000.0, 900.0]), 50)
    played.result_G[7] = np.nan  # an undecided game
    resamples = Resamples(np.repeat(np.arange(50), 3), 20)
    draws = resampled_ratings(played, resamples)
    there = np.repeat(np.arange(150), np.repeat(resamples.times_BG[11].astype(int), 3))
    there = there[there != 7]
    again = Games(3, played.first_G[there], played.second_G[there], played.result_G[there])
    assert draws[11] == pytest.approx(bradley_terry(win_matrix(again)))
