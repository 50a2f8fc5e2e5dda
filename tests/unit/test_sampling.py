"""Sampling: distribution, truncation, and independence of the batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.protocol import SamplingParams, derive_seed, mix64
from steerlm_megatron.generate.sampling import BatchSampler, RowParams, uniforms

VOCAB = 200
CPU = torch.device("cpu")


def sampler(banned: tuple[int, ...] = (), vocab_size: int = VOCAB) -> BatchSampler:
    return BatchSampler(vocab_size, banned, CPU)


def draw(logits_V: torch.Tensor, params: RowParams, count: int, banned: tuple[int, ...] = ()) -> list[int]:
    """Draw ``count`` tokens from the same logits, in batches."""
    chosen: list[int] = []
    one = sampler(banned)
    one.set_rows([params] * 50)
    for start in range(0, count, 50):
        ids_B, _ = one.sample(logits_V.repeat(50, 1), list(range(start, start + 50)))
        chosen += ids_B.tolist()
    return chosen


def test_uniform_is_uniform_and_fixed() -> None:
    seeds, indices = (grid.ravel() for grid in np.meshgrid(*(np.arange(100, dtype=np.uint64) for _ in range(2))))
    values = uniforms(seeds, indices)
    assert min(values) >= 0.0 and max(values) < 1.0
    assert abs(values.mean() - 0.5) < 0.01
    assert len(set(values)) == len(values) == 10_000
    # These values are frozen, since a change would alter every seeded result of every user.
    pairs = np.array([1234, 0], np.uint64), np.array([0, 5], np.uint64)
    assert uniforms(*pairs).tolist() == [0.0192574172783736, 0.4480180066472548]
    # By their definition, in numbers of any size.
    for seed, index in ((0, 0), (1234, 3), (2**63 - 1, 2**31), (2**62 + 5, 77)):
        mixed = mix64(mix64(seed) ^ mix64(index + 0x632BE59BD9B4E019)) >> 11
        assert uniforms(np.array([seed], np.uint64), np.array([index], np.uint64))[0] == mixed * 2.0**-53


def test_greedy_is_argmax() -> None:
    logits = torch.randn(8, VOCAB)
    one = sampler()
    one.set_rows([RowParams(0.0, 50, 1.0, 1)] * 8)
    ids_B, logprobs_B = one.sample(logits.clone(), [0] * 8)
    assert ids_B.tolist() == logits.argmax(1).tolist()
    assert logprobs_B is None


@pytest.mark.parametrize("top_k", [1, 5, 50, 100])
def test_top_k_never_leaves_the_top(top_k: int) -> None:
    logits_V = torch.randn(VOCAB)
    allowed = set(logits_V.topk(top_k).indices.tolist())
    chosen = set(draw(logits_V, RowParams(5.0, top_k, 1.0, 7), 2000))
    assert chosen <= allowed
    assert len(chosen) > top_k * 0.9 or top_k == 1


def test_top_p_keeps_the_smallest_prefix() -> None:
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits_V = torch.full((VOCAB,), -math.inf)
    logits_V[[10, 20, 30, 40]] = probs.log()
    assert set(draw(logits_V, RowParams(1.0, 0, 0.7, 1), 500)) == {10, 20}
    assert set(draw(logits_V, RowParams(1.0, 0, 0.81, 1), 500)) == {10, 20, 30}
    assert set(draw(logits_V, RowParams(1.0, 0, 1e-6, 1), 100)) == {10}
    assert set(draw(logits_V, RowParams(1.0, 3, 0.7, 1), 500)) == {10, 20}


@pytest.mark.parametrize("params", [RowParams(1.0, 0, 1.0, 3), RowParams(1.0, 50, 1.0, 3), RowParams(0.5, 50, 1.0, 3)])
def test_frequencies_follow_the_softmax(params: RowParams) -> None:
    logits_V = torch.full((VOCAB,), -30.0)
    logits_V[:4] = torch.tensor([1.0, 0.0, 2.0, 0.5])
    count = 10000
    chosen = torch.bincount(torch.tensor(draw(logits_V, params, count)), minlength=VOCAB)[:4] / count
    expected = torch.softmax(logits_V[:4] / params.temperature, 0)
    assert torch.allclose(chosen, expected, atol=0.02)


def test_banned_and_padding_are_never_drawn() -> None:
    logits_V = torch.zeros(VOCAB + 24)  # the embedding has 24 rows of padding
    logits_V[VOCAB:] = 50.0
    logits_V[[3, 4]] = 40.0
    for temperature, top_k, top_p in ((1.0, 0, 1.0), (1.0, 50, 1.0), (0.0, 0, 1.0), (1.0, 0, 0.9)):
        chosen = draw(logits_V, RowParams(temperature, top_k, top_p, 1), 500, banned=(3, 4))
        assert max(chosen) < VOCAB and not {3, 4} & set(chosen)


def test_a_row_does_not_notice_the_batch() -> None:
    kinds = [(1.0, 50, 1.0), (0.0, 0, 1.0), (0.7, 0, 0.9), (1.3, 0, 1.0), (1.0, 150, 1.0), (1.0, 7, 0.5)]
    rows = [RowParams(*kinds[i % len(kinds)], seed=i, logprobs=i % 2 == 0) for i in range(36)]
    logits = torch.randn(36, VOCAB)
    whole = sampler()
    whole.set_rows(rows)
    ids_B, logprobs_B = whole.sample(logits.clone(), list(range(36)))
    assert logprobs_B is not None
    for order in (list(range(36)), list(range(35, -1, -1))):
        for i in order:
            alone = sampler()
            alone.set_rows([rows[i]])
            id_1, logprob_1 = alone.sample(logits[i : i + 1].clone(), [i])
            assert id_1.item() == ids_B[i].item()
            if logprob_1 is not None:
                assert logprob_1.item() == pytest.approx(logprobs_B[i].item(), abs=1e-6)
    expected = torch.log_softmax(logits, 1).gather(1, ids_B[:, None]).squeeze(1)
    assert torch.allclose(logprobs_B, expected, atol=1e-5)


def test_set_rows_again_takes_effect() -> None:
    logits = torch.randn(2, VOCAB)
    one = sampler()
    one.set_rows([RowParams(0.0, 0, 1.0, 1)] * 2)
    one.set_rows([RowParams(0.0, 0, 1.0, 1)])
    assert one.sample(logits[:1].clone(), [0])[0].shape == (1,)


def test_parameters_out_of_range_are_named() -> None:
    wrong = [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("max_tokens", 0),
        ("seed", -1),
    ]
    for name, value in wrong:
        with pytest.raises(UserError, match=name):
            SamplingParams(**{name: value}).checked()  # type: ignore[arg-type]


def test_derived_seeds_differ() -> None:
    assert derive_seed(5, 0) == 5
    seeds = {derive_seed(seed, i) for seed in range(50) for i in range(1, 50)}
    assert len(seeds) == 50 * 49 and all(0 <= s < 2**63 for s in seeds)
