"""Packing splits, loses and repeats nothing, is deterministic and fast, and a stored plan equals the computed one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlm_megatron.data.feed.packing import PackPlan, load_plan, pack, save_plan


def rows_of(offsets: np.ndarray, samples: np.ndarray) -> list[list[int]]:
    return [samples[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """Pack by the textbook loop, and return the sorted room that is left in its rows."""
    left: list[int] = []
    for length in sorted((n for n in lengths if n), reverse=True):
        fitting = [room for room in left if room >= length]
        if fitting:
            left.remove(min(fitting))
            left.append(min(fitting) - length)
        else:
            left.append(capacity - length)
    return sorted(left)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), capacity=st.integers(2, 60), seed=st.integers(0, 3))
def test_nothing_is_split_lost_or_repeated(data: st.DataObject, capacity: int, seed: int) -> None:
    lengths = np.array(data.draw(st.lists(st.integers(0, capacity), max_size=80)), np.int64)
    offsets, samples = pack(lengths, capacity, seed)
    assert sorted(samples.tolist()) == np.flatnonzero(lengths).tolist()
    rows = rows_of(offsets, samples)
    assert all(rows) and all(lengths[row].sum() <= capacity for row in rows)
    assert sorted(capacity - int(lengths[row].sum()) for row in rows) == best_fit_decreasing(lengths.tolist(), capacity)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_function_of_lengths_row_and_seed(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 50, 200)
    first, again = pack(lengths, 128, seed), pack(lengths.astype(np.int32), 128, seed)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))


def test_seed_changes_the_company_not_the_fill() -> None:
    lengths = np.full(1000, 7)
    one, two = pack(lengths, 70, 1), pack(lengths, 70, 2)
    assert len(one[0]) == len(two[0]) == 101
    assert (one[1] != two[1]).any()


def test_too_long_is_our_bug() -> None:
    with pytest.raises(ValueError, match="exceeds row_tokens=10"):
        pack(np.array([3, 11]), 10, 0)


def test_nothing_to_pack() -> None:
    for lengths in ([], [0, 0]):
        offsets, samples = pack(np.array(lengths, np.int64), 10, 0)
        assert offsets.tolist() == [0] and len(samples) == 0


@pytest.mark.parametrize("row_tokens", [4096, 32768])
def test_a_million_lengths_well_filled(row_tokens: int) -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.0, 1_000_000).astype(np.int64), 5, 4096)
    offsets, samples = pack(lengths, row_tokens, 1)
    assert len(samples) == 1_000_000
    used = np.add.reduceat(lengths[samples], offsets[:-1])
    assert used.max() <= row_tokens and used.mean() / row_tokens > 0.98


def make_plan() -> PackPlan:
    lengths = np.random.default_rng(0).integers(1, 50, 200)
    offsets, samples = pack(lengths, 128, 3)
    return PackPlan(offsets, samples, 128, "ap", "drop", int(lengths.sum()), 210, 4, 99, 7, 3)


def test_stored_plan(tmp_path) -> None:
    plan, path = make_plan(), tmp_path / "plans" / "p.npy"
    assert load_plan(path, 128, "ap", "drop") is None
    assert save_plan(path, plan)
    stored = load_plan(path, 128, "ap", "drop")
    assert stored is not None and stored.report() == plan.report()
    assert (stored.samples == plan.samples).all() and (stored.offsets == plan.offsets).all()
    assert [p.name for p in path.parent.iterdir()] == ["p.npy"]
    assert load_plan(path, 256, "ap", "drop") is None
    path.write_bytes(path.read_bytes()[:-80])
    assert load_plan(path, 128, "ap", "drop") is None
    path.write_bytes(b"")
    assert load_plan(path, 128, "ap", "drop") is None


def test_a_plan_that_cannot_be_stored_is_only_not_stored(tmp_path) -> None:
    (tmp_path / "plans").write_text("a file where the folder should be")
    assert not save_plan(tmp_path / "plans" / "p.npy", make_plan())


def test_report() -> None:
    report = make_plan().report()
    assert report["samples"] == 200 and report["samples_total"] == 210
    assert report["samples_total"] == report["samples"] + report["dropped_overlong"] + report["dropped_masked"]
    assert 0.9 < report["fill"] <= 1
