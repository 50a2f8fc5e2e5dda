"""One request's parameters, logits, text and callback cannot affect other requests."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.drawn import NOT_DRAWN, NOT_FINITE
from steerlm_megatron.generate.generator import Generator
from steerlm_megatron.generate.protocol import MAX_SEED, Delta, Request, RequestFailed, SamplingParams
from steerlm_megatron.generate.sampling import BatchSampler, RowParams
from tests.helpers.fake_model import VOCAB, FakeModel, FakeTemplate, FakeTokenizer, limits

CPU = torch.device("cpu")
KINDS = ["callback", "text", "stop", "draw", "logits", "fine"]
POISON = 61  # a prompt with this token has no finite logits in PoisonedModel

TEMPERATURES = st.one_of(
    st.floats(0, sys.float_info.max),
    st.sampled_from([0, 1, 100, 10**308, 5e-324, 1e-310, 1e-308, 1e-30, 1e-6, 9.9e-6, 1e-5, 1e-4, sys.float_info.max]),
)
TOP_PS = st.one_of(st.floats(0, 1, exclude_min=True), st.sampled_from([5e-324, 1e-310, 1e-17, 1 - 1e-16, 1.0]))
TOP_KS = st.one_of(st.integers(0, 2 * VOCAB), st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, 10**30]))
SEEDS = st.one_of(st.integers(0, MAX_SEED), st.sampled_from([0, MAX_SEED]))
ROWS = st.builds(RowParams, TEMPERATURES, TOP_KS, TOP_PS, SEEDS, st.booleans())
LOGITS = st.sampled_from([0.0, -0.0, 1.0, -math.inf, 3e38, -3e38, 1e-45, 88.0, -1e4])
ODD_LOGITS = st.sampled_from([math.nan, math.inf, -math.inf])


class PoisonedModel(FakeModel):
    """A model whose keys, values and logits are NaN for a sequence that contains ``POISON``, as after an overflow. Only
    prompts contain it, since both this model and the healthy one practically never draw it."""

    def __init__(self, poisoned: bool = True) -> None:
        super().__init__()
        if poisoned:
            with torch.no_grad():
                self.embedding[POISON] = math.nan

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = super().forward(*args, **kwargs)
        logits[..., POISON] -= 1e9
        return logits


def make(model: FakeModel | None = None, **changes: int) -> Generator:
    return Generator(model or FakeModel(), FakeTokenizer(), FakeTemplate(), limits(**changes))


def request(name: str, ids: Sequence[int] = (5, 6, 7), **params: Any) -> Request:
    return Request(name, tuple(ids), SamplingParams(**{"max_tokens": 12, "seed": 3, **params}))


def run(generator: Generator) -> None:
    while generator.step():
        pass


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(ROWS, st.lists(LOGITS, min_size=4, max_size=4)), min_size=1, max_size=8), st.data())
def test_every_legal_parameter_draws_a_token(rows: list[tuple[RowParams, list[float]]], data: st.DataObject) -> None:
    """Rows draw alone and together, beside rows that have no distribution."""
    sampler, alone = BatchSampler(VOCAB, (1,), CPU), BatchSampler(VOCAB, (1,), CPU)
    logits_BV = torch.randn(len(rows), VOCAB)
    for i, (_, values) in enumerate(rows):
        logits_BV[i, 2:6] = torch.tensor(values)
    broken = data.draw(st.sets(st.integers(0, len(rows) - 1)))
    for i in broken:
        odd = data.draw(ODD_LOGITS)
        logits_BV[i, 7 if odd != -math.inf else slice(None)] = odd
    params = [row for row, _ in rows]
    sampler.set_rows(params)
    ids_B, logprobs_B = sampler.sample(logits_BV.clone(), list(range(len(rows))))
    each_B, _ = BatchSampler(VOCAB, (1,), CPU).sample_each(params, logits_BV.clone(), list(range(len(rows))))
    assert ids_B.tolist() == each_B.tolist()
    for i, row in enumerate(params):
        alone.set_rows([row])
        id_1, _ = alone.sample(logits_BV[i : i + 1].clone(), [i])
        assert id_1.item() == ids_B[i].item()
        if i in broken:
            assert ids_B[i].item() == NOT_FINITE
        else:
            assert 0 <= ids_B[i].item() < VOCAB and ids_B[i].item() != 1
            assert logprobs_B is None or math.isfinite(logprobs_B[i].item())


def test_a_log_probability_below_float32_is_its_lowest_number() -> None:
    """A temperature of 1e39 makes logits of ±3e38 alike, and the drawn token may be one of the lowest."""
    lowest = torch.finfo(torch.float32).min
    sampler = BatchSampler(VOCAB, (1,), CPU)
    logits_1V = torch.full((1, VOCAB), -3e38)
    logits_1V[0, 0] = 3e38
    sampler.set_rows([RowParams(1e39, 0, 0.99, 0, logprobs=True)])
    ids_1, logprobs_1 = sampler.sample(logits_1V, [0])
    assert ids_1.item() != 0 and logprobs_1 is not None and logprobs_1.item() == lowest


@settings(max_examples=200, deadline=None)
@given(
    temperature=st.one_of(TEMPERATURES, st.sampled_from([math.nan, math.inf, -1.0, -5e-324, 10**400])),
    top_k=st.one_of(TOP_KS, st.integers(max_value=-1)),
    top_p=st.one_of(TOP_PS, st.sampled_from([0.0, math.nan, 1.0000001, math.inf])),
    seed=st.one_of(SEEDS, st.sampled_from([-1, 2**63, 2**64])),
    max_tokens=st.sampled_from([0, -1, 1, 3, 2**31, 2**63, 10**30]),
)
def test_parameters_are_refused_by_name_or_served(**params: Any) -> None:
    generator = _GENERATOR
    try:
        handle = generator.submit(request("x", **params))
    except UserError as error:
        assert any(name in str(error) for name in params)
        return
    run(generator)
    assert handle.future.result(0).completion_tokens >= 1


_GENERATOR = make()


def test_below_some_temperature_is_greedy() -> None:
    greedy = make().generate([request("x", temperature=0.0)])[0].token_ids
    for temperature in (5e-324, 1e-310, 1e-308, 1e-100, 9e-6):
        assert make().generate([request("x", temperature=temperature)])[0].token_ids == greedy


@pytest.mark.parametrize("prefilled_together", [True, False])
def test_a_row_without_finite_logits_ends_alone(prefilled_together: bool) -> None:
    good = [request(f"good{i}", range(i + 1), seed=i) for i in range(12)]
    expected = {r.id: r for r in make(PoisonedModel(False)).generate(good)}
    generator = make(PoisonedModel(), max_batch=4)
    handles, poisoned = [], []
    for i, one in enumerate(good):
        handles.append(generator.submit(one))
        # Equal prompts of one step are computed once. Longer prompts leave more in the cache than the next one
        # overwrites.
        poisoned.append(generator.submit(request(f"bad{i}", [*range(i % 5), POISON, *range(30)])))
        if not prefilled_together:
            generator.step()
    poisoned.append(generator.submit(request("twin", [POISON] * 20)))
    poisoned.append(generator.submit(request("other twin", [POISON] * 20)))
    run(generator)
    for handle in poisoned:
        with pytest.raises(RequestFailed, match="logits are not finite"):
            handle.future.result(0)
    for handle in handles:
        assert handle.future.result(0) == expected[handle.id]
    assert generator.error is None and not generator.scheduler.running


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(KINDS), min_size=2, max_size=8), st.data())
def test_an_exception_of_one_request_ends_it_alone(kinds: list[str], data: st.DataObject) -> None:
    at = [data.draw(st.integers(0, 3)) for _ in kinds]
    asked = [
        request(f"{kind}{i}", [POISON] if kind == "logits" else [i, 2], seed=i, stop=("zz",) if kind == "stop" else ())
        for i, kind in enumerate(kinds)
    ]
    fine = [one for one, kind in zip(asked, kinds, strict=True) if kind == "fine"]
    expected = {r.id: r for r in make(PoisonedModel(False)).generate(fine)}
    generator = make(PoisonedModel())
    drawn = generator.runner.sampler.draw

    def draw(logits_BV: torch.Tensor, group: Any, indices: Sequence[int]) -> torch.Tensor:
        for row in group.rows:
            seed = generator.runner.sampler.rows[row].seed
            if kinds[seed] == "draw" and indices[row] >= at[seed]:
                raise ZeroDivisionError("of one row")
        return drawn(logits_BV, group, indices)

    generator.runner.sampler.draw = draw  # type: ignore[method-assign]
    handles = []
    for i, (one, kind) in enumerate(zip(asked, kinds, strict=True)):

        def callback(delta: Delta, i: int = i, kind: str = kind, seen: list[int] = []) -> None:  # noqa: B006
            seen.append(1)
            if kind == "callback" and len(seen) > at[i]:
                raise ValueError("of the callback")

        handle = generator.submit(one, callback)
        if kind in ("text", "stop"):
            job = generator.jobs[one.id]

            def fail(*_: Any) -> Any:
                raise IndexError("of the text")

            setattr(job.text, "push" if kind == "stop" else "finish", fail)
        handles.append(handle)
    run(generator)
    for handle, kind in zip(handles, kinds, strict=True):
        if kind == "fine":
            assert handle.future.result(0) == expected[handle.id]
        elif (
            kind != "callback" or handle.future.exception(0) is not None
        ):  # a short response may end before the callback raises
            with pytest.raises(RequestFailed):
                handle.future.result(0)
    assert generator.error is None and not generator.jobs and not generator.scheduler.running
    generator.runner.sampler.draw = drawn  # type: ignore[method-assign]
    assert generator.generate([request("later")]) == make(PoisonedModel(False)).generate([request("later")])


def test_a_row_whose_drawing_raises_has_no_token() -> None:
    sampler = BatchSampler(VOCAB, (), CPU)
    rows = [RowParams("hot", 5, 1.0, 1), RowParams(1.0, 5, 1.0, 1)]  # type: ignore[arg-type]
    ids_B, _ = sampler.sample_each(rows, torch.randn(2, VOCAB), [0, 0])
    assert ids_B[0].item() == NOT_DRAWN and ids_B[1].item() >= 0


def test_cancelling_a_request_whose_text_raises_resolves_it() -> None:
    generator = make()
    handle = generator.submit(request("x"), lambda delta: None)
    generator.step()

    def fail(*_: Any) -> Any:
        raise IndexError("of the text")

    generator.jobs["x"].text.finish = fail  # type: ignore[method-assign]
    handle.cancel()
    with pytest.raises(RequestFailed, match="IndexError: of the text"):
        handle.future.result(0)
    run(generator)
    assert generator.error is None
