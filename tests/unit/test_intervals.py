"""Intervals have the coverage that they promise, and figures agree with scipy and scikit-learn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

from steerlm_megatron.evaluate import intervals
from steerlm_megatron.evaluate.agreement import METRICS, agreement, figures, influence_on_spearman, levels_of
from steerlm_megatron.evaluate.diversity import jackknife
from steerlm_megatron.evaluate.intervals import Resamples, figure, tail, verdict
from steerlm_megatron.evaluate.preferences import weights_of
from steerlm_megatron.observe import stats
from steerlm_megatron.steer.attributes import AttributeSchema

NAN = float("nan")


def pairs_of(seed: int, size: int, top: int = 9) -> tuple[Any, Any]:
    """Return predictions and labels with ties, which agree in part."""
    rng = np.random.default_rng(seed)
    wanted = np.clip(np.round(rng.normal(5, 2, size) * 2) / 2, 0, top)
    return np.clip(np.round(0.6 * wanted + 2 + rng.normal(size=size), 1), 0, top), wanted


@pytest.mark.parametrize("seed", range(3))
def test_figures_are_those_of_scipy_and_of_our_own_formulas(seed: int) -> None:
    predicted, wanted = pairs_of(seed, 300)
    found = agreement(predicted, wanted, Resamples(range(300), 50), 9)
    assert set(found) == set(METRICS)
    assert found["mse"].value == pytest.approx(stats.mse(predicted, wanted))
    assert found["mae"].value == pytest.approx(stats.mae(predicted, wanted))
    assert found["pearson"].value == pytest.approx(scipy.stats.pearsonr(predicted, wanted).statistic)
    assert found["spearman"].value == pytest.approx(scipy.stats.spearmanr(predicted, wanted).statistic)
    schema = AttributeSchema("own", ("quality",), 9)
    assert levels_of(predicted, 9).tolist() == [schema.level(float(value)) for value in predicted]
    equal = [schema.level(float(x)) == schema.level(float(y)) for x, y in zip(predicted, wanted, strict=True)]
    assert found["accuracy"].value == pytest.approx(np.mean(equal))


def test_kappa_and_levels_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    for seed in range(3):
        predicted, wanted = pairs_of(seed, 200)
        found = agreement(predicted, wanted, Resamples(range(200), 10), 9)
        levels = levels_of(predicted, 9), levels_of(wanted, 9)
        expected = metrics.cohen_kappa_score(*levels, weights="quadratic", labels=list(range(10)))
        assert found["kappa"].value == pytest.approx(expected, abs=1e-12)
        assert found["accuracy"].value == pytest.approx(metrics.accuracy_score(*levels), abs=1e-12)
        assert found["mse"].value == pytest.approx(metrics.mean_squared_error(wanted, predicted), abs=1e-12)
        assert found["mae"].value == pytest.approx(metrics.mean_absolute_error(wanted, predicted), abs=1e-12)


def test_kappa_worked_by_hand() -> None:
    # Levels 0 0 1 1 against 0 1 1 2: one step off twice, so the mean square is 2/4. With marginals (2, 2, 0) and
    # (1, 2, 1) the expected one is (2·2·1 + 2·1·4 + 2·1·1 + 2·1·1) / 16 = 1.
    found = agreement(np.array([0.0, 0, 1, 1]), np.array([0.0, 1, 1, 2]), Resamples(range(4), 10), 2)
    assert found["kappa"].value == pytest.approx(0.5)
    same = agreement(np.array([1.0, 1]), np.array([1.0, 1]), Resamples(range(2), 10), 2)
    assert math.isnan(same["kappa"].value) and math.isnan(same["pearson"].value) and math.isnan(same["spearman"].value)


def test_each_draw_has_the_figure_of_its_items() -> None:
    predicted, wanted = pairs_of(5, 60)
    groups = [f"{i // 3}" for i in range(60)]
    draws = Resamples(groups, 20, seed=3)
    found = agreement(predicted, wanted, draws, 9)
    names, owner = np.unique(groups, return_inverse=True)
    assert draws.groups == len(names) == 20 and draws.times_BG.sum(axis=1).tolist() == [20] * 20
    for draw in range(20):
        chosen = np.repeat(np.arange(60), draws.times_BG[draw][owner])
        x, y = predicted[chosen], wanted[chosen]
        assert found["mse"].draws[draw] == pytest.approx(stats.mse(x, y))
        assert found["pearson"].draws[draw] == pytest.approx(stats.pearson(x, y))
        alone = agreement(x, y, Resamples(range(len(x)), 2), 9)
        assert found["kappa"].draws[draw] == pytest.approx(alone["kappa"].value)
        assert found["accuracy"].draws[draw] == pytest.approx(alone["accuracy"].value)


def test_the_influence_of_an_item_is_the_derivative_of_the_rank_correlation() -> None:
    """Each item is counted a little more often, and the rank correlation is computed anew."""
    x, y = pairs_of(1, 40)
    found = influence_on_spearman(x, y)
    assert found.mean() == pytest.approx(0.0, abs=1e-12)
    copies, step = 500, 1
    for item in (0, 7, 23):
        times = np.full(40, copies)
        times[item] += step
        moved = stats.spearman(np.repeat(x, times), np.repeat(y, times))
        share = step / times.sum()  # of all items, which this item gains
        assert (moved - stats.spearman(x, y)) / share == pytest.approx(found[item], rel=0.01, abs=0.01)
    np.testing.assert_array_equal(influence_on_spearman(np.ones(5), np.arange(5.0)), np.zeros(5))


def test_the_draws_of_the_rank_correlation_are_near_those_with_new_ranks() -> None:
    x, y = pairs_of(2, 200)
    draws = Resamples(range(200), 400)
    found = agreement(x, y, draws, 9, only=("spearman",))["spearman"]
    exact = [stats.spearman(np.repeat(x, times), np.repeat(y, times)) for times in draws.times_BG]
    assert np.corrcoef(found.draws, exact)[0, 1] > 0.98
    assert draws.bounds(found.draws) == pytest.approx(draws.bounds(exact), abs=0.01)


def test_weights_count_items_as_often() -> None:
    predicted, wanted = pairs_of(3, 30)
    weights = np.random.default_rng(0).integers(1, 4, 30)
    only = ("mse", "mae", "pearson", "kappa", "accuracy")
    found = agreement(predicted, wanted, Resamples(range(30), 5), 9, weights.astype(float), only)
    x, y = np.repeat(predicted, weights), np.repeat(wanted, weights)
    plain = agreement(x, y, Resamples(range(len(x)), 5), 9, only=only)
    assert {name: one.value for name, one in found.items()} == pytest.approx({n: o.value for n, o in plain.items()})


def test_a_nan_is_never_masked() -> None:
    found = agreement(np.array([NAN, 1.0, 2.0]), np.array([1.0, 1.0, 2.0]), Resamples(range(3), 5), 4)
    shown = figures(found, Resamples(range(3), 5), 3)
    assert all(math.isnan(one["value"]) and math.isnan(one["low"]) for one in shown.values())


def test_taking_items_keeps_the_draws() -> None:
    values, groups = np.arange(12.0), [i // 2 for i in range(12)]
    draws = Resamples(groups, 30)
    part = draws.take(np.array([4, 5, 5, 0]))
    assert (part.groups, part.items) == (2, 4)
    expected = draws.times_BG[:, 2] * (4 + 5 + 5.0) + draws.times_BG[:, 0] * 0.0
    np.testing.assert_array_equal(part.sums(values[[4, 5, 5, 0]]), expected)
    mask = draws.take(np.array(groups) < 2)
    np.testing.assert_array_equal(mask.sums(np.ones(4)), draws.times_BG[:, :2].sum(axis=1) * 2.0)


def test_means_leave_out_what_is_absent() -> None:
    draws = Resamples(range(4), 500)
    (found, none) = draws.columns([[1.0, NAN], [3.0, NAN], [NAN, NAN], [2.0, NAN]])
    assert (found["value"], found["n"]) == (2.0, 3) and 1.0 <= found["low"] < 2.0 < found["high"] <= 3.0
    assert math.isnan(none["value"]) and math.isnan(none["low"]) and none["n"] == 0
    assert math.isnan(Resamples(["a", "a"], 5).mean([1.0, 2.0])["low"]), "one group has no interval"


def test_verdicts_say_when_zero_is_inside() -> None:
    assert [verdict(figure(0, *bounds)) for bounds in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.2), (NAN, NAN))] == [
        "above", "below", "not told apart", "not measured"
    ]  # fmt: skip
    assert verdict({"low": None, "high": None}) == "not measured"


@pytest.mark.parametrize("degrees", [1, 2, 3, 5, 11, 47, 1000])
def test_the_share_of_draws_in_a_tail(degrees: int) -> None:
    n = degrees + 1
    expected = scipy.stats.norm.cdf(-math.sqrt(n / degrees) * scipy.stats.t.ppf(0.975, degrees))
    assert tail(n) == pytest.approx(expected, rel=0.03)


def covered(truth: float, bounds: Any) -> float:
    low, high = bounds
    return float(np.mean([(low <= truth) & (truth <= high)]))


@pytest.mark.parametrize("groups", [12, 48, 300])
def test_the_interval_of_a_mean_covers_the_truth_as_often_as_it_says(groups: int) -> None:
    """Three responses to each prompt are alike; their values are skewed, as qualities near the top of a scale are."""
    rng, times = np.random.default_rng(groups), 600
    draws = Resamples(np.repeat(np.arange(groups), 3), 400)
    values = rng.gamma(4.0, size=(groups, times)).repeat(3, axis=0) + rng.normal(size=(3 * groups, times))
    assert 0.92 <= covered(4.0, draws.bounds(draws.means(values))) <= 0.975


@pytest.mark.parametrize("size", [120, 400])
def test_intervals_of_agreement_cover_the_truth_as_often_as_they_say(size: int) -> None:
    """Responses of the normal distribution, for which the truth is known: r, and 6/π arcsin(r/2) of the ranks."""
    rng, r, times = np.random.default_rng(size), 0.5, 400
    truth = {"pearson": r, "spearman": 6 / math.pi * math.asin(r / 2), "mse": 2 - 2 * r, "mae": math.sqrt(2 / math.pi)}
    inside = dict.fromkeys(truth, 0)
    draws = Resamples(range(size), 300)
    for _ in range(times):
        x = rng.normal(size=size)
        y = r * x + math.sqrt(1 - r * r) * rng.normal(size=size)
        for name, one in agreement(x, y, draws, 4, only=tuple(truth)).items():
            low, high = draws.bounds(one.draws)
            inside[name] += low <= truth[name] <= high
    assert all(0.91 <= count / times <= 0.98 for count in inside.values()), inside


def test_a_paired_interval_is_narrow_where_prompts_differ_more_than_models() -> None:
    rng = np.random.default_rng(0)
    prompts, gain = rng.normal(0, 3, 60), 0.4
    first, second = prompts + 0.3 * rng.normal(size=60), prompts + gain + 0.3 * rng.normal(size=60)
    found = Resamples(range(60)).mean(second - first)
    assert verdict(found) == "above" and found["high"] - found["low"] < 0.3
    assert stats.sem(first) > 0.3, "an interval of unpaired means would include zero"


def test_the_jackknife_is_the_usual_interval_for_a_mean_and_covers_the_truth() -> None:
    values = np.random.default_rng(1).normal(size=50)
    without = (values.sum() - values) / 49
    found = jackknife(float(values.mean()), without)
    half = scipy.stats.norm.ppf(0.975) * stats.sem(values)
    assert (found["low"], found["high"]) == pytest.approx((values.mean() - half, values.mean() + half))
    assert math.isnan(jackknife(1.0, np.array([1.0]))["low"])


def test_weights_of_preferences_are_those_of_a_logistic_regression() -> None:
    rng = np.random.default_rng(2)
    truth = np.array([1.5, -0.5, 0.0])
    differences = rng.normal(size=(400, 3)) * np.array([1.0, 3.0, 0.2])
    chosen = rng.random(400) < scipy.special.expit(differences @ truth)
    differences *= np.where(chosen, 1.0, -1.0)[:, None]
    found = weights_of(differences)
    scale = np.sqrt((differences**2).mean(axis=0))

    def loss(w: Any) -> float:
        return float(np.logaddexp(0, -(differences / scale) @ w).sum() + 0.5 * w @ w)

    best = scipy.optimize.minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-8})
    assert found == pytest.approx(best.x / scale, abs=1e-4)
    assert found[:2] == pytest.approx(truth[:2], abs=0.4)
    assert weights_of(np.zeros((0, 3))).tolist() == [0.0, 0.0, 0.0]
    assert np.isfinite(weights_of(np.full((50, 1), 1e6))).all(), "pairs that are all told apart have finite weights"


def test_scikit_learn_finds_the_same_weights() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(3)
    x = rng.normal(size=(200, 4)) + 0.3
    x /= np.sqrt((x**2).mean(axis=0))
    signs = np.where(rng.random(200) < 0.5, 1.0, -1.0)
    model = linear_model.LogisticRegression(C=1.0, fit_intercept=False, tol=1e-10, max_iter=1000)
    model.fit(x * signs[:, None], signs > 0)
    assert weights_of(x) == pytest.approx(model.coef_[0], abs=1e-5)


def test_a_chunk_of_draws_has_no_part_in_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).normal(size=(30, 2))
    whole = Resamples(range(30), 40).sums(values)
    monkeypatch.setattr(intervals, "_CACHED", 70)
    np.testing.assert_allclose(Resamples(range(30), 40).sums(values), whole)
