"""SteerLM 2.0: likelihood of labels, groups of responses, their packing, the loss."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from steerlm_megatron.config.load import finalize, from_container
from steerlm_megatron.data.batch import RowBatch
from steerlm_megatron.data.feed.collate import collate
from steerlm_megatron.data.feed.packing import pack_groups
from steerlm_megatron.data.groups import TARGETS, Groups, read_groups, shares
from steerlm_megatron.data.views import Sample
from steerlm_megatron.errors import UserError
from steerlm_megatron.evaluate.label_likelihood import bounds, level_probabilities, log_likelihood
from steerlm_megatron.train.group_objective import GroupObjective, effective, group_softmax

# ---- P(a | x, y)


@given(
    st.integers(1, 9), st.floats(0, 1), st.floats(2.5, 200), st.sampled_from(["nearest", "equal"])
)  # fmt: skip
def test_levels_have_all_probability(levels: int, share: float, concentration: float, bins: str) -> None:
    found = level_probabilities(share * levels, levels, concentration, bins)
    assert len(found) == levels + 1 and min(found) >= 0 and math.isclose(sum(found), 1.0, rel_tol=1e-9)


@pytest.mark.parametrize("bins", ["nearest", "equal"])
@pytest.mark.parametrize("value", [0.6, 1.0, 2.0, 2.5, 3.3])
def test_a_level_has_the_mass_of_a_beta_distribution(value: float, bins: str) -> None:
    """By scipy's distribution: α = 24 r, β = 24 − α (arXiv 2406.08673 §4.5)."""
    beta = scipy.stats.beta(24 * value / 4, 24 - 24 * value / 4)
    expected = np.diff(beta.cdf(bounds(4, bins)))
    assert level_probabilities(value, 4, 24.0, bins) == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-15)


def test_the_bounds_differ_as_their_names_say() -> None:
    """A quarter of the scale is level 1 of 4: by rounding it is the likeliest, by equal parts as well, but less so."""
    assert bounds(4, "equal") == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1]) and bounds(1, "nearest") == [0, 0.5, 1]
    nearest, equal = (level_probabilities(1.0, 4, 24.0, bins) for bins in ("nearest", "equal"))
    assert nearest == pytest.approx([0.059, 0.855, 0.086, 0, 0], abs=1e-3)
    assert equal == pytest.approx([0.305, 0.641, 0.054, 0, 0], abs=1e-3)


@pytest.mark.parametrize("level", range(10))
def test_a_prediction_that_is_a_level_makes_it_the_likeliest(level: int) -> None:
    found = level_probabilities(float(level), 9)
    assert int(np.argmax(found)) == level, "at the ends of the scale too, where alpha or beta would be 0"


def test_the_likelihood_is_a_sum_over_the_named_attributes() -> None:
    asked, predicted = {"quality": 4, "humor": 0, "verbosity": 2}, {"quality": 3.2, "humor": 0.5, "verbosity": 4.0}
    found = log_likelihood(asked, predicted, ["quality", "humor"], 4)
    expected = sum(math.log(level_probabilities(predicted[name], 4)[asked[name]]) for name in ("quality", "humor"))
    assert found == pytest.approx(expected)
    assert log_likelihood(asked, predicted, list(asked), 4) < found, "a third attribute that is missed by far"
    far = log_likelihood({"quality": 0}, {"quality": 4.0}, ["quality"], 4, concentration=1e6)
    assert math.isfinite(far) and far < -600


# ---- groups


def sample(name: str, size: int) -> Sample:
    mask = np.ones(size, np.bool_)
    mask[0] = False
    return Sample(name, np.arange(size, dtype=np.int32), mask, np.zeros(0, np.int32), np.zeros((0, 0), np.float32))


def groups_of(
    sizes: Sequence[Sequence[int]], normalize: str = "none", seed: int = 0
) -> tuple[list[list[Sample]], Groups]:
    """Return groups of responses of these lengths, with weights and log-probabilities drawn at random."""
    drawn = np.random.default_rng(seed)
    names = [f"{g}/{i}" for g, group in enumerate(sizes) for i in range(len(group))]
    group_N = np.repeat(np.arange(len(sizes)), [len(group) for group in sizes])
    flat = [size for group in sizes for size in group]
    logprob_N = -5.0 * np.array(flat) + drawn.normal(size=len(names))
    known = Groups(
        dict(zip(names, range(len(names)), strict=True)),
        group_N,
        drawn.normal(size=len(names)),
        logprob_N,
        "",
        normalize,
    )
    samples = [[sample(f"{g}/{i}", size) for i, size in enumerate(group)] for g, group in enumerate(sizes)]
    return samples, known


SIZES = [(5, 9, 3), (7, 2), (4, 4, 4, 6)]


def batch_of(normalize: str = "none", rows: int = 2) -> tuple[RowBatch, Groups]:
    samples, groups = groups_of(SIZES, normalize)
    laid = [samples[0] + samples[1], samples[2]] if rows == 2 else [[s for group in samples for s in group]]
    return groups.attach(collate(laid, 40 if rows == 2 else 64)), groups


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=12), st.integers(1, 4))
def test_shares_of_a_group_sum_to_one(weights: list[float], groups: int) -> None:
    group_S = np.arange(len(weights)) % groups
    found = shares(np.array(weights), group_S, groups)
    for group in set(group_S.tolist()):
        assert found[group_S == group].sum() == pytest.approx(1.0)
    if groups == 1:
        assert found == pytest.approx(torch.tensor(weights, dtype=torch.float64).softmax(0).numpy())


def test_weights_that_are_all_zero_are_equal() -> None:
    found = shares(np.array([-math.inf, -math.inf, 0.0, -math.inf]), np.array([0, 0, 1, 1]), 2)
    assert found.tolist() == [0.5, 0.5, 1.0, 0.0]


def test_a_batch_knows_the_sample_of_each_target() -> None:
    batch, groups = batch_of()
    assert batch.groups == 3 and batch.group_S.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    counted = torch.bincount(batch.sample_K).tolist()
    assert counted == [size - 1 for group in SIZES for size in group], "every token but the first is a target"
    assert batch.logprob_S.tolist() == groups.logprob_N.tolist()
    for rank in range(2):  # of two ranks that share the row
        part = batch.part(rank, 2)
        whole = dict(zip(batch.target_K.tolist(), batch.sample_K.tolist(), strict=True))
        index = np.concatenate([np.arange(c.start, c.stop) for c in part.chunks])
        assert [whole[int(index[k])] for k in part.target_K] == part.sample_K.tolist()
        assert part.groups == 3 and len(part.weight_S) == 9, "what a group is compared by is complete on each rank"


def write(path: Path, *found: object) -> str:
    lines = [
        {"id": f"p/{i}", "messages": [], **({TARGETS: one} if one is not None else {})} for i, one in enumerate(found)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_file_of_weights_is_read(tmp_path: Path) -> None:
    one = {"group": "a", "log_weight": -3.0, "logprob": -20.5}
    path = write(tmp_path / "w.jsonl", one, {**one, "group": "b"}, {**one, "log_weight": None, "logprob": -1})
    found = read_groups(path)
    assert found.group_N.tolist() == [0, 1, 0] and found.count == 2
    assert found.log_weight_N.tolist() == [-3.0, -3.0, -math.inf] and found.logprob_N.tolist() == [-20.5, -20.5, -1.0]
    assert found.hash != read_groups(write(tmp_path / "x.jsonl", one, one, one)).hash


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (None, "no weights of this response"),
        ({"group": "a", "log_weight": -1.0}, "is not what `steerlm weigh` writes"),
        ({"group": "a", "log_weight": "1", "logprob": -1.0}, "is not what `steerlm weigh` writes"),
        ({"group": 3, "log_weight": 1.0, "logprob": -1.0}, "is not what `steerlm weigh` writes"),
    ],
)
def test_a_file_without_weights_is_refused(tmp_path: Path, found: object, told: str) -> None:
    good = {"group": "a", "log_weight": -3.0, "logprob": -20.5}
    with pytest.raises(UserError, match=told) as caught:
        read_groups(write(tmp_path / "w.jsonl", good, found))
    assert "w.jsonl:2" in str(caught.value)


# ---- packing


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), min_size=1, max_size=40),
    st.integers(20, 60),
    st.integers(0, 5),
)
def test_a_row_has_complete_groups(samples: list[tuple[int, int]], row_tokens: int, seed: int) -> None:
    lengths, group_N = (np.array(column, np.int64) for column in zip(*samples, strict=True))
    offsets, placed, too_long = pack_groups(lengths, group_N, row_tokens, seed)
    present = [i for i, (size, _) in enumerate(samples) if size]
    members = {g: [i for i in present if group_N[i] == g] for g in set(group_N.tolist())}
    expected = {g for g, those in members.items() if len(those) > 1 and sum(lengths[those]) <= row_tokens}
    assert sorted(placed.tolist()) == sorted(i for g in expected for i in members[g])
    assert set(too_long.tolist()) == {g for g, m in members.items() if len(m) > 1 and sum(lengths[m]) > row_tokens}
    for start, end in zip(offsets, offsets[1:], strict=False):
        row = placed[start:end].tolist()
        assert row and sum(lengths[row]) <= row_tokens
        for g in {int(group_N[i]) for i in row}:
            assert [i for i in row if group_N[i] == g] == members[g], "side by side, and all of them"


# ---- the loss


def plain(loss_K: torch.Tensor, batch: RowBatch) -> torch.Tensor:
    """Return Σ over groups of Σ w' log(w' / b'), with gradients through b'."""
    policy_S = torch.zeros_like(batch.logprob_S).index_add(0, batch.sample_K, -loss_K)
    total = torch.zeros((), dtype=torch.float64)
    for group in range(batch.groups):
        of = batch.group_S == group
        share = (policy_S[of] - batch.logprob_S[of]).log_softmax(0)
        total = total + (batch.weight_S[of] * (batch.weight_S[of].log() - share)).sum()
    return total


@pytest.mark.parametrize("rows", [1, 2])
def test_the_gradient_is_that_of_the_divergence(rows: int) -> None:
    """Eq. 11 is the gradient of Eq. 12: every target's coefficient is w' − b', which sums to 0 in a group."""
    batch, _ = batch_of(rows=rows)
    drawn = torch.rand(len(batch.target_K), generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 10
    wanted = drawn.clone().requires_grad_()
    plain(wanted, batch).backward()
    given_K = drawn.float().requires_grad_()
    total, sums = GroupObjective().loss(given_K[None], batch)
    total.backward()
    assert torch.allclose(given_K.grad.double(), wanted.grad, atol=1e-6)
    means = GroupObjective().means(sums.tolist())
    assert means["loss"] == pytest.approx(float(plain(drawn, batch)) / 3, rel=1e-5) and means["loss"] > 0
    first = torch.tensor([int((batch.sample_K == s).nonzero()[0]) for s in range(9)])
    of_groups = torch.zeros(3).index_add(0, batch.group_S, given_K.grad[first])
    assert of_groups.abs().max() < 1e-6


def test_at_the_model_that_drew_them_all_responses_count_alike() -> None:
    batch, _ = batch_of()
    counts_S = torch.bincount(batch.sample_K)
    loss_K = (-batch.logprob_S / counts_S)[batch.sample_K]
    total, sums = GroupObjective().loss(loss_K[None].float(), batch)
    means = GroupObjective().means(sums.tolist())
    assert means["model_responses"] == pytest.approx((3 + 2 + 4) / 3, rel=1e-5), "b' is uniform"
    assert 1 <= means["target_responses"] < means["model_responses"]


def test_nothing_is_left_to_learn_at_the_target() -> None:
    batch, _ = batch_of()
    counts_S = torch.bincount(batch.sample_K)
    loss_K = (-(batch.logprob_S + batch.weight_S.log()) / counts_S)[batch.sample_K].float().requires_grad_()
    total, sums = GroupObjective().loss(loss_K[None], batch)
    total.backward()
    assert GroupObjective().means(sums.tolist())["loss"] == pytest.approx(0, abs=1e-6)
    assert loss_K.grad.abs().max() < 1e-5


def test_a_groups_loss_can_be_divided_by_its_tokens() -> None:
    batch, _ = batch_of("tokens")
    means = [np.mean([size - 1 for size in group]) for group in SIZES]
    assert batch.scale_S.tolist() == pytest.approx([1 / means[g] for g in batch.group_S.tolist()])
    plain_batch, _ = batch_of()
    grads = []
    for one in (batch, plain_batch):
        loss_K = torch.full((len(one.target_K),), 3.0, requires_grad=True)
        GroupObjective().loss(loss_K[None], one)[0].backward()
        grads.append(loss_K.grad)
    assert torch.allclose(grads[0], grads[1] * batch.scale_S[batch.sample_K].float(), rtol=1e-5)


def test_a_micro_batch_without_groups_has_no_loss() -> None:
    _, groups = groups_of(SIZES)
    batch = groups.attach(collate([[]], 16))
    output = torch.ones(1, 1, requires_grad=True)
    total, sums = GroupObjective().loss(output, batch)
    total.backward()
    assert float(total.detach()) == 0 and output.grad.tolist() == [[0.0]] and sums.tolist() == [0, 0, 0, 0]
    assert GroupObjective().terms(batch) == 0 and GroupObjective().means(sums.tolist())["loss"] == 0


@given(st.lists(st.tuples(st.floats(-300, 300), st.integers(0, 3)), min_size=1, max_size=20))
def test_a_softmax_of_groups_is_that_of_each_alone(rows: list[tuple[float, int]]) -> None:
    score_S, group_S = torch.tensor([a for a, _ in rows], dtype=torch.float64), torch.tensor([b for _, b in rows])
    found = group_softmax(score_S, group_S, 4)
    for group in set(group_S.tolist()):
        assert torch.allclose(found[group_S == group], score_S[group_S == group].softmax(0))


def test_effective_responses_are_counted_over_groups() -> None:
    share_S = torch.tensor([0.25, 0.25, 0.25, 0.25, 1.0, 0.0], dtype=torch.float64)
    assert float(effective(share_S, torch.tensor([0, 0, 0, 0, 1, 1]), 2)) == pytest.approx(4 + 1)


# ---- the configuration


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({}, "data.targets is not set"),
        ({"data": {"targets": "w.jsonl", "valid": "x"}}, "data.valid=x has no weights"),
        ({"data": {"targets": "w.jsonl"}, "attributes": {"names": []}}, "choose the attributes"),
        ({"data": {"targets": "w.jsonl"}, "init_from": None}, "goes on from the model"),
        ({"data": {"targets": "w.jsonl"}, "model": {"dropout": 0.1}}, "model.dropout=0.1"),
        ({"data": {"targets": "w.jsonl"}, "train": {"objective": "sft"}}, "data.targets=w.jsonl is of"),
        ({"train": {"objective": "sft"}, "steerlm2": {"normalize": "tokens"}}, "steerlm2.normalize=tokens is of"),
    ],
)
def test_keys_that_do_not_fit_are_refused(overrides: dict[str, object], told: str) -> None:
    base = {
        "command": "train_sft", "init_from": "acsft", "train": {"objective": "steerlm2"},
        "attributes": {"names": ["quality"], "max_level": 4},
    }  # fmt: skip
    with pytest.raises(UserError, match=told):
        finalize(from_container(base, overrides), alone=True)


def test_a_key_of_the_loss_may_stand_beside_steps_of_other_objectives() -> None:
    """In a pipeline it is for the steps that read it."""
    for objective in ({}, {"train": {"objective": "steerlm2"}, "data": {"targets": "w.jsonl"}, "init_from": "acsft"}):
        given = {"command": "train_sft", "attributes": {"names": ["quality"]}, "steerlm2": {"normalize": "tokens"}}
        assert finalize(from_container(given, objective)).steerlm2.normalize == "tokens"
