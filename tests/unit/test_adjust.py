"""What changes logits before a token is drawn, against plain numpy and transformers' processors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from steerlm_megatron.generate.adjust import Adjustments, History
from steerlm_megatron.generate.sampling import BatchSampler, RowParams, distribution, prompt_logprobs

VOCAB = 40
CPU = torch.device("cpu")
IDS = st.integers(0, VOCAB - 1)
PENALTIES = st.sampled_from([-2.0, -0.5, 0.0, 0.7, 2.0])


def row(history: tuple[Sequence[int], Sequence[int]] | None = None, key: str = "a", **params: Any) -> RowParams:
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 1, **params}
    if history is not None:
        values["history"] = History(key, tuple(history[0]), tuple(history[1]))
    return RowParams(**values)


ROWS = st.builds(
    lambda prompt, output, repetition, presence, frequency, bias, allowed, min_tokens, stops, drawn, penalised: (
        row(
            (prompt, output) if penalised else None,
            repetition_penalty=repetition if penalised else 1.0,
            presence_penalty=presence if penalised else 0.0,
            frequency_penalty=frequency if penalised else 0.0,
            logit_bias=tuple(bias.items()),
            allowed_ids=tuple(allowed) if allowed else None,
            min_tokens=min_tokens,
            stop_ids=tuple(stops) if min_tokens else (),
        ),
        drawn,
    ),
    st.lists(IDS, min_size=1, max_size=12),
    st.lists(IDS, max_size=12),
    st.sampled_from([0.3, 1.0, 1.2, 5.0]),
    PENALTIES,
    PENALTIES,
    st.dictionaries(IDS, st.sampled_from([-100.0, -1.5, 0.0, 2.0, 100.0]), max_size=4),
    st.one_of(st.none(), st.sets(IDS, min_size=1, max_size=6)),
    st.integers(0, 4),
    st.sets(IDS, min_size=1, max_size=3),
    st.integers(0, 6),
    st.booleans(),
)


def by_hand(logits_V: np.ndarray, params: RowParams, drawn: int) -> np.ndarray:
    """Do in plain numpy what vLLM documents, in its order: allowed ids, min_tokens, bias, repetition, frequency,
    presence."""
    out = logits_V.astype(np.float32)
    if params.allowed_ids is not None:
        out[[i for i in range(VOCAB) if i not in params.allowed_ids]] = -np.inf
    if drawn < params.min_tokens:
        out[list(params.stop_ids)] = -np.inf
    for i, bias in params.logit_bias:
        out[i] += np.float32(bias)
    if params.history is not None:
        for i in {*params.history.prompt_ids, *params.history.output_ids}:
            factor = np.float32(params.repetition_penalty)
            out[i] = out[i] / factor if out[i] > 0 else out[i] * factor
        for i in set(params.history.output_ids):
            out[i] -= np.float32(params.frequency_penalty) * params.history.output_ids.count(i)
            out[i] -= np.float32(params.presence_penalty)
    return out


@settings(max_examples=80, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=6), st.integers(0, 1000))
def test_each_row_is_changed_as_by_hand(rows: list[tuple[RowParams, int]], seed: int) -> None:
    logits_BV = torch.randn((len(rows), VOCAB), generator=torch.Generator().manual_seed(seed)) * 4
    params = [
        one if one.history is None else replace(one, history=replace(one.history, key=str(i)))
        for i, (one, _) in enumerate(rows)
    ]
    drawn = [count for _, count in rows]
    sampler = BatchSampler(VOCAB, (), CPU)
    sampler.set_rows(params)
    changed_BV = logits_BV.clone()
    sampler._adjustments.apply(changed_BV, drawn)
    for i, one in enumerate(params):
        np.testing.assert_allclose(changed_BV[i].numpy(), by_hand(logits_BV[i].numpy(), one, drawn[i]), rtol=1e-6)
        if not (one.history or one.logit_bias or one.allowed_ids or one.min_tokens):
            assert torch.equal(changed_BV[i], logits_BV[i]), "a row that asks for nothing is not touched"


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.5, "temperature": 0.7},
        {"logit_bias": ((3, 5.0), (7, -100.0)), "top_k": 10},
        {"min_p": 0.1},
        {"min_p": 0.3, "temperature": 2.0, "top_k": 20},
        {"min_p": 0.05, "top_p": 0.8, "top_k": 30},
        {"min_p": 0.02, "top_p": 0.9},
        {"top_k": 5, "top_p": 0.6},
        {"min_tokens": 3, "stop_ids": (1, 2, 3)},
        {"repetition_penalty": 1.2, "logit_bias": ((4, 3.0),), "min_p": 0.05, "top_k": 25, "top_p": 0.95},
        {"min_p": 1.0},
    ],
)
def test_probabilities_are_those_of_transformers(params: dict[str, Any]) -> None:
    prompt, output = [5, 9, 9, 30], [3, 4, 4]
    scores_BV = torch.randn((20, VOCAB), generator=torch.Generator().manual_seed(7)) * 3
    needs_history = "repetition_penalty" in params
    rows = [row((prompt, output) if needs_history else None, str(i), **params) for i in range(20)]
    sampler = BatchSampler(VOCAB, (), CPU)
    sampler.set_rows(rows)
    changed_BV = scores_BV.clone()
    sampler._adjustments.apply(changed_BV, [len(output) - 1] * 20)
    probs_BK, ids_BK = distribution(changed_BV, sampler._groups[0])
    mine_BV = torch.zeros((20, VOCAB), dtype=torch.float64)
    mine_BV = probs_BK if ids_BK is None else mine_BV.scatter(1, ids_BK, probs_BK)
    theirs = LogitsProcessorList()
    if "min_tokens" in params:
        theirs.append(MinNewTokensLengthLogitsProcessor(len(prompt) + 1, 3, list(params["stop_ids"]), device="cpu"))
    if "logit_bias" in params:
        theirs.append(SequenceBiasLogitsProcessor([[[i], bias] for i, bias in params["logit_bias"]]))
    if needs_history:
        theirs.append(RepetitionPenaltyLogitsProcessor(params["repetition_penalty"]))
    theirs.append(TemperatureLogitsWarper(float(params.get("temperature", 1.0))))
    if "min_p" in params:
        theirs.append(MinPLogitsWarper(params["min_p"]))
    if "top_k" in params:
        theirs.append(TopKLogitsWarper(params["top_k"]))
    if "top_p" in params:
        theirs.append(TopPLogitsWarper(params["top_p"]))
    sequence = torch.tensor([[*prompt, *output]] * 20)
    expected_BV = torch.softmax(theirs(sequence, scores_BV.clone()).double(), 1)
    torch.testing.assert_close(mine_BV / mine_BV.sum(1, keepdim=True), expected_BV, rtol=1e-5, atol=1e-8)


def test_counts_follow_what_is_drawn_whatever_rows_come_and_go() -> None:
    """Each sequence, alone and among others that come, go and move, draws the same tokens, and none again and again."""

    def params(key: str) -> RowParams:
        return row(((1, 2), ()), key, temperature=0.0, frequency_penalty=2.0, repetition_penalty=1.5)

    logits = {key: torch.randn(VOCAB, generator=torch.Generator().manual_seed(i)) for i, key in enumerate("abcdef")}

    def draw(sampler: BatchSampler, keys: str, plain: bool = False) -> dict[str, int]:
        rows = [params(key) for key in keys]
        batch = torch.stack([logits[key] for key in keys])
        if plain:
            rows, batch = [row(temperature=0.0), *rows], torch.cat([logits["a"][None], batch])
        sampler.set_rows(rows)
        ids = sampler.sample(batch, [0] * len(rows))[0].tolist()
        return dict(zip(keys, ids[plain:], strict=True))

    alone = {}
    for key in logits:
        sampler = BatchSampler(VOCAB, (), CPU)
        alone[key] = [draw(sampler, key)[key] for _ in range(8)]
        assert len(set(alone[key])) > 1
    together: dict[str, list[int]] = {key: [] for key in logits}
    sampler = BatchSampler(VOCAB, (), CPU)
    for i, keys in enumerate(["abc", "abc", "cab", "cdab", "adec", "edf", "def", "fed", "dfe", "f", "f"]):
        for key, id_ in draw(sampler, keys, plain=i % 2 == 1).items():
            together[key].append(id_)
    for key, ids in together.items():
        assert ids == alone[key][: len(ids)] and ids
    # A sequence that comes back brings along what it had drawn.
    again = BatchSampler(VOCAB, (), CPU)
    again.set_rows([params("a").after(alone["a"][:3])])
    assert again.sample(logits["a"][None].clone(), [3])[0].tolist() == alone["a"][3:4]


def test_a_batch_whose_drawing_raises_keeps_its_counts() -> None:
    def sampler() -> BatchSampler:
        one = BatchSampler(VOCAB, (), CPU)
        one.set_rows(rows)
        return one

    rows = [row(((1,), ()), key, temperature=0.0, presence_penalty=2.0) for key in "ab"]
    logits_BV = torch.randn(2, VOCAB)
    batch, each = sampler(), sampler()
    expected = [batch.sample(logits_BV.clone(), [0, 0])[0].tolist() for _ in range(3)]
    assert [each.sample_each(rows, logits_BV.clone(), [0, 0])[0].tolist() for _ in range(3)] == expected
    assert expected[0] != expected[1]


def test_log_probabilities_are_those_of_the_model() -> None:
    """Neither penalties nor allowed ids change what is reported; what is never drawn has no share."""
    rows = [
        row(allowed_ids=(4, 5), temperature=0.0, logprobs=True, top_logprobs=3),
        row(((1,), (7,)), repetition_penalty=9.0, logit_bias=((8, 50.0),), logprobs=True, top_logprobs=20),
        row(temperature=0.0),
    ]
    sampler = BatchSampler(VOCAB, (0, 11), CPU)
    logits_BV = torch.randn(3, VOCAB + 8) * 2
    sampler.set_rows(rows)
    top = sampler.most_likely(logits_BV)
    ids_B, logprobs_B = sampler.sample(logits_BV.clone(), [0] * 3)
    allowed_BV = logits_BV[:, :VOCAB].clone()
    allowed_BV[:, [0, 11]] = -math.inf
    expected_BV = allowed_BV.log_softmax(1)
    assert logprobs_B is not None and ids_B[0].item() in (4, 5) and ids_B[1].item() == 8
    torch.testing.assert_close(logprobs_B, expected_BV.gather(1, ids_B[:, None]).squeeze(1))
    torch.testing.assert_close(top[1], expected_BV.topk(20).values)
    assert torch.equal(top[0], expected_BV.topk(20).indices)


def test_log_probabilities_of_a_prompt() -> None:
    logits_TV = torch.randn(600, VOCAB + 8).bfloat16()
    ids_T = torch.randint(0, VOCAB, (600,))
    chosen_T, top_ids_TN, top_TN = prompt_logprobs(logits_TV, ids_T, VOCAB)
    expected_TV = logits_TV[:, :VOCAB].float().log_softmax(1)
    torch.testing.assert_close(chosen_T, expected_TV.gather(1, ids_T[:, None]).squeeze(1))
    torch.testing.assert_close(expected_TV.gather(1, top_ids_TN), top_TN)
    torch.testing.assert_close(top_TN, expected_TV.topk(20).values)


def test_no_change_is_no_work() -> None:
    assert not Adjustments(VOCAB, CPU)
    sampler = BatchSampler(VOCAB, (), CPU)
    sampler.set_rows([row(min_p=0.5), row()])
    assert not sampler._adjustments
