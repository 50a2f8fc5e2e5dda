"""The engine over vLLM, with a strict stand-in for vLLM: what it asks, and that responses are the generator's."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.generator import Generator
from steerlm_megatron.generate.protocol import Delta, EngineDead, QueueFull, Request, RequestFailed, Result
from steerlm_megatron.generate.protocol import SamplingParams as Params
from steerlm_megatron.generate.vllm_engine import VllmEngine
from steerlm_megatron.generate.vllm_process import VllmSettings, start_vllm
from steerlm_megatron.serve.engine_loop import EngineLoop
from tests.helpers.fake_model import LABEL, TURN, FakeModel, FakeTemplate, FakeTokenizer, limits

STAND_IN = Path(__file__).parents[1] / "helpers" / "vllm_stand_in"
PADDING = tuple(range(64, 72))  # rows of the fake model that are no tokens
PROMPTS = [(5, 6, 7), (30, 2, 9, 9, 4), (1,), tuple(range(40)), (17, 18)]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in, with the model that the generator has."""
    monkeypatch.syspath_prepend(str(STAND_IN))
    import vllm

    monkeypatch.setattr(vllm, "MODEL", logits_of(FakeModel()))
    yield vllm
    monkeypatch.undo()  # before the modules are removed: a test that hid one would put it back, and half of it alone
    for name in [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]:
        del sys.modules[name]


def logits_of(model: FakeModel, without: tuple[int, ...] = ()) -> Any:
    """The model as a function of ids [T] to logits [T, V]; the tokens ``without`` have no probability."""

    def logits(ids_T: torch.Tensor) -> torch.Tensor:
        logits_TV = model(ids_T[None], torch.arange(len(ids_T))[None], None)[0]
        logits_TV[:, list(without)] = -1e4
        return logits_TV

    return logits


def make(timeout_sec: float = 60.0, **changes: Any) -> VllmEngine:
    bounds = limits(**changes)
    settings = VllmSettings(
        Path("no-folder"), "fp32", 1, 1, bounds.max_batch, bounds.max_sequence_tokens, 64, 1 << 20, 0.8, True
    )
    return VllmEngine(start_vllm(settings), FakeTokenizer(), FakeTemplate(), bounds, timeout_sec=timeout_sec)


def requests(**params: Any) -> list[Request]:
    values = {"temperature": 0.0, "max_tokens": 16, **params}
    return [Request(f"r{i}", ids, Params(**values)) for i, ids in enumerate(PROMPTS)]


CASES: list[dict[str, Any]] = [
    {},
    {"logprobs": True, "top_logprobs": 3},
    {"prompt_logprobs": 2},
    {"stop": ("a", "bc", "Q")},
    {"stop": ("a",), "include_stop_str_in_output": True},
    {"stop_token_ids": tuple(range(10, 20))},
    {"ignore_eos": True},
    {"min_tokens": 9},
    {"repetition_penalty": 1.7},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"logit_bias": ((3, 4.0), (LABEL, 50.0))},
    {"allowed_token_ids": (1, 2, 3, LABEL, TURN)},
]


@pytest.mark.parametrize("tokens_a_step", [1, 3])
def test_greedy_results_are_the_generators(vllm: Any, monkeypatch: pytest.MonkeyPatch, tokens_a_step: int) -> None:
    """Whatever parameter a request has, and however many tokens an output of vLLM has."""
    monkeypatch.setattr(vllm, "TOKENS_A_STEP", tokens_a_step)
    expected, engine = Generator(FakeModel(), FakeTokenizer(), FakeTemplate(), limits()), make()
    for case in CASES:
        # vLLM's log-probabilities are over all rows of the table, the generator's over tokens that may be drawn, and
        # for prompts over all tokens.
        without = {"logprobs": (LABEL, *PADDING), "prompt_logprobs": PADDING}.get(next(iter(case), ""), ())
        vllm.LLMEngine.started[-1].logits = logits_of(FakeModel(), without)
        for theirs, ours in zip(engine.generate(requests(**case)), expected.generate(requests(**case)), strict=True):
            assert _without_numbers(theirs) == _without_numbers(ours), case
            for mine, other in zip(_numbers(ours), _numbers(theirs), strict=True):
                assert other == pytest.approx(mine, abs=1e-4), case
    assert not engine.jobs and not vllm.LLMEngine.started[-1].requests
    engine.close()
    assert vllm.LLMEngine.started[-1].dead
    with pytest.raises(EngineDead):
        engine.submit(requests()[0])


def _without_numbers(result: Result) -> Result:
    def ids(top: Any) -> Any:
        return None if top is None else tuple(None if t is None else len(t) for t in top)

    return replace(
        result, logprobs=None, prompt_logprobs=None, top_logprobs=ids(result.top_logprobs),
        prompt_top_logprobs=ids(result.prompt_top_logprobs),
    )  # fmt: skip


def _numbers(result: Result) -> list[float]:
    prompt = [number for number in result.prompt_logprobs or () if number is not None]
    tops = [t for t in (*(result.top_logprobs or ()), *(result.prompt_top_logprobs or ())) if t is not None]
    return [*(result.logprobs or ()), *prompt, *(number for top in tops for _, number in top[:1])]


def test_a_seeded_response_is_a_function_of_its_request(vllm: Any) -> None:
    asked = [Request(f"r{i}", (5, 6, 7), Params(temperature=1.0, max_tokens=12, seed=i % 3)) for i in range(6)]
    found = [result.token_ids for result in make().generate(asked)]
    assert found[:3] == found[3:] and len(set(found)) == 3
    assert found[1] == make(max_batch=1).generate(asked[1:2])[0].token_ids
    assert all(LABEL not in ids and max(ids) < 64 for ids in found), "no control token, no row of padding"


def test_what_vllm_refuses_is_refused_at_once(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    with pytest.raises(UserError, match=r"vLLM .* refuses it: temperature must be in \[0, 2\]"):
        engine.submit(Request("hot", (1, 2), Params(temperature=3.0, max_tokens=4)))
    with pytest.raises(UserError, match="max_sequence_tokens=128"):
        engine.submit(Request("long", (1, 2), Params(max_tokens=127)))
    good = engine.submit(requests()[0])
    bad = engine.submit(Request("bad", (1, 2), Params(temperature=0.0, max_tokens=4)))
    started = vllm.LLMEngine.started[-1]
    add = started.add_request

    def refusing(request_id: str, *rest: Any) -> str:
        if request_id == "bad":
            raise ValueError("not this one")
        return add(request_id, *rest)

    monkeypatch.setattr(started, "add_request", refusing)
    while engine.step():
        pass
    assert good.result is not None
    with pytest.raises(RequestFailed, match="not this one"):
        bad.future.result(0)


def test_rows_queue_deltas_and_cancelling(vllm: Any) -> None:
    engine = make(max_batch=2, max_queue=9)
    pieces: list[Delta] = []
    asked = [Request(f"r{i}", (5, 6, i), Params(temperature=0.0, max_tokens=16, ignore_eos=True)) for i in range(11)]
    handles = engine.submit_all(asked, [pieces.append, *[None] * 10])
    with pytest.raises(QueueFull):
        engine.submit_all([Request("more", (1,), Params(max_tokens=4))])
    assert engine.step()
    started = vllm.LLMEngine.started[-1]
    assert engine.running == 2 and len(started.requests) == 10, "some more than its rows, so that none is idle"
    counters = engine.counters()
    assert (counters["running"], counters["waiting"]) == (2, 9)
    assert (counters["prefix_hit_tokens_total"], counters["cache_blocks_used"]) == (3, 16)
    handles[1].cancel()
    assert engine.refuse_waiting(EngineDead("bye")) == 1
    with pytest.raises(EngineDead, match="bye"):
        handles[10].future.result(0)
    while engine.step():
        pass
    assert started.aborted == ["r1"] and not started.requests
    result = handles[1].result
    assert result is not None and result.finish_reason == "cancelled" and len(result.token_ids) == 1
    first = handles[0].result
    assert first is not None and "".join(piece.text for piece in pieces) == first.text and len(pieces) == 16


def test_a_response_that_vllm_gives_up_is_an_error_of_its_own(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    lost, kept = engine.submit_all(requests()[:2])
    started = vllm.LLMEngine.started[-1]
    advance = started._advance

    def giving_up(request: Any) -> Any:
        output = advance(request)
        if request.id == "r0":
            started.requests.pop("r0", None)
            output.finished, output.outputs[0].finish_reason = True, "error"
        return output

    monkeypatch.setattr(started, "_advance", giving_up)
    while engine.step():
        pass
    with pytest.raises(RequestFailed, match="vLLM has ended the request: error"):
        lost.future.result(0)
    assert kept.result is not None


def test_the_end_of_vllm_ends_the_engine(vllm: Any) -> None:
    failed = threading.Event()
    loop = EngineLoop(make(), on_failure=failed.set)
    vllm.LLMEngine.started[-1].dead = True
    loop.start()
    handle = loop.generator.submit(requests()[0])
    with pytest.raises(EngineDead, match="EngineDeadError"):
        handle.future.result(60)
    assert failed.wait(60) and "EngineDeadError" in (loop.problem() or "")


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_wait_for_vllm_has_an_end(vllm: Any, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """vLLM itself would wait for ever for processes that do not answer, in a command without a server too."""
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    from_engine_args = vllm.LLMEngine.from_engine_args

    def starting(args: Any) -> Any:
        process.start()
        return from_engine_args(args)

    monkeypatch.setattr(vllm.LLMEngine, "from_engine_args", starting)
    engine = make(timeout_sec=60.0 if how == "killed" else 0.2)
    vllm.GO.clear()
    if how == "killed":
        process.kill()
    try:
        with pytest.raises(EngineDead, match="has ended" if how == "killed" else "not finished a step for"):
            engine.generate(requests())
        with pytest.raises(EngineDead):
            engine.submit(requests()[0])
    finally:
        vllm.GO.set()
        process.kill()
        process.join()


def test_a_vllm_that_stands_still_is_given_up(vllm: Any) -> None:
    vllm.GO.clear()
    failed = threading.Event()
    loop = EngineLoop(make(), timeout_sec=0.4, on_failure=failed.set)
    loop.start()
    handle = loop.generator.submit(requests()[0])
    try:
        while not failed.wait(0.05):
            loop.look()
        with pytest.raises(EngineDead, match="not finished a step for"):
            handle.future.result(0)
    finally:
        vllm.GO.set()


def test_starting_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch, vllm: Any) -> None:
    settings = VllmSettings(Path("no-folder"), "fp32", 1, 1, 2, 64, 64, 10, 0.8, True)
    with pytest.raises(UserError, match="vLLM does not start with no-folder: RuntimeError: Engine core"):
        start_vllm(settings)
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="pip install vllm"):
        make()
    assert os.environ["RANK"] == "7" and "VLLM_WORKER_MULTIPROC_METHOD" not in os.environ
