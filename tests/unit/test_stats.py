"""observe/stats.py agrees with values computed by hand and with scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from steerlm_megatron.observe import stats

NAN = float("nan")


def test_values_worked_by_hand() -> None:
    predictions, targets = [1.0, 2.0, 4.0, 9.0], [1.0, 4.0, 1.0, NAN]
    assert stats.mse(predictions, targets) == pytest.approx((0 + 4 + 9) / 3)
    assert stats.mae(predictions, targets) == pytest.approx((0 + 2 + 3) / 3)
    # The means are 7/3 and 2, the deviations (-4/3, -1/3, 5/3) and (-1, 2, -1), so the covariance is -1, norms² 42/9
    # and 6.
    assert stats.pearson(predictions, targets) == pytest.approx(-1 / math.sqrt(42 / 9 * 6))
    assert stats.ranks([10, 20, 20, 30, 10]).tolist() == [1.5, 3.5, 3.5, 5.0, 1.5]
    assert stats.spearman([1, 2, 3], [1, 8, 27]) == pytest.approx(1.0)
    assert stats.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert stats.sem([1.0, 3.0, NAN]) == pytest.approx(1.0)  # std 1.414 over √2


@pytest.mark.parametrize("seed", range(5))
def test_scipy_agrees_with_ties_and_missing_labels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 5, size=200).astype(float)
    predictions = np.round(targets + rng.normal(size=200), 1)
    targets[rng.random(200) < 0.3] = NAN
    present = ~np.isnan(targets)
    expected_pearson = scipy.stats.pearsonr(predictions[present], targets[present]).statistic
    expected_spearman = scipy.stats.spearmanr(predictions[present], targets[present]).statistic
    assert stats.pearson(predictions, targets) == pytest.approx(expected_pearson, abs=1e-12)
    assert stats.spearman(predictions, targets) == pytest.approx(expected_spearman, abs=1e-12)
    np.testing.assert_array_equal(stats.ranks(predictions), scipy.stats.rankdata(predictions))
    assert stats.sem(targets) == pytest.approx(scipy.stats.sem(targets, nan_policy="omit"), abs=1e-12)


def test_what_has_no_value_is_nan() -> None:
    for function in (stats.mse, stats.mae, stats.pearson, stats.spearman):
        assert math.isnan(function([1.0, 2.0], [NAN, NAN]))
        assert math.isnan(function([NAN, 2.0, 3.0], [1.0, 2.0, 4.0])), "a NaN prediction must not be masked away"
    assert math.isnan(stats.pearson([1, 2, 3], [2, 2, 2]))
    assert math.isnan(stats.spearman([2, 2, 2], [1, 2, 3]))
    assert math.isnan(stats.pearson([1], [1]))
    with pytest.raises(ValueError, match="2 predictions for 3 targets"):
        stats.mse([1, 2], [1, 2, 3])


def test_attribute_metrics_per_column() -> None:
    predictions = [[1.0, 0.0], [2.0, 5.0], [4.0, 1.0]]
    targets = [[1.0, NAN], [3.0, NAN], [3.0, NAN]]
    table = stats.attribute_metrics(predictions, targets, ["quality", "humor"], [2.0, 1.0])
    assert table["quality"]["mse"] == pytest.approx(2 / 3)
    assert table["quality"]["constant_mse"] == pytest.approx(1.0)
    assert table["quality"]["n"] == 3
    assert table["humor"]["n"] == 0 and math.isnan(table["humor"]["mse"])


def test_the_length_predictor_leaves_out_what_it_predicts() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 500, size=40).astype(float)
    targets = 0.01 * lengths + rng.normal(size=40)
    targets[[3, 17]] = NAN
    found = stats.predicted_from(lengths, targets)
    for index in range(40):
        others = ~np.isnan(targets) & (np.arange(40) != index)
        slope, start = np.polyfit(lengths[others], targets[others], 1)
        if np.isnan(targets[index]):
            assert math.isnan(found[index])
        else:
            assert found[index] == pytest.approx(start + slope * lengths[index], abs=1e-9)
    same = stats.predicted_from([5.0, 5.0, 5.0], [1.0, 2.0, 6.0])
    np.testing.assert_allclose(same, [4.0, 3.5, 1.5])  # without a slope: the mean of the others
    assert np.isnan(stats.predicted_from([1.0, 2.0], [1.0, 2.0])).all()
    assert np.isfinite(stats.predicted_from([0.0, 0.0, 9.0], [1.0, 2.0, 3.0])).all()


def test_intervals_are_of_groups_and_not_of_single_values() -> None:
    rng = np.random.default_rng(1)
    values, groups = rng.normal(size=400), [f"{i}" for i in range(400)]
    low, high = stats.mean_interval(values, groups)
    assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 * stats.sem(values), rel=0.1)
    twice = stats.mean_interval(np.repeat(values, 4), [g for g in groups for _ in range(4)])
    assert twice == pytest.approx((low, high)), "four copies of a response tell no more than one"
    assert stats.mean_interval([*values, NAN], [*groups, "x"]) == (low, high) == stats.mean_interval(values, groups)
    assert all(math.isnan(bound) for bound in stats.mean_interval([1.0, 2.0], ["a", "a"]))


def test_a_model_that_reads_beats_the_length_and_one_that_only_counts_does_not() -> None:
    rng = np.random.default_rng(2)
    lengths = rng.integers(10, 2000, size=300)
    by_length, words = np.log1p(lengths), rng.normal(size=300)
    targets = by_length + words
    table = stats.attribute_metrics(
        np.stack([by_length + 0.8 * words, by_length + rng.normal(size=300)], axis=1),
        np.stack([targets, targets], axis=1),
        ["reads", "counts"],
        [5.0, 5.0],
        lengths,
        [f"{i // 2}" for i in range(300)],
    )
    reads, counts = table["reads"], table["counts"]
    assert reads["length_mse"] == counts["length_mse"] == pytest.approx(1.0, rel=0.2)
    assert 0 < reads["length_gain_low"] < reads["length_mse"] - reads["mse"] < reads["length_gain_high"]
    assert counts["length_gain_high"] < 0 and reads["length_spearman"] == stats.spearman(lengths, targets)
