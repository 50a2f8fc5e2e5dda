"""The generator: equality with and without cache, independence of the batch, admission, stops, failure."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.generator import Generator
from steerlm_megatron.generate.protocol import Delta, EngineDead, QueueFull, Request, Result, SamplingParams
from steerlm_megatron.generate.text import ResponseText
from steerlm_megatron.model.packed_tokens import PackedTokens
from tests.helpers.fake_model import LABEL, TURN, VOCAB, FakeModel, FakeTemplate, FakeTokenizer, limits


def make(model: FakeModel | None = None, **changes: Any) -> Generator:
    return Generator(model or FakeModel(), FakeTokenizer(), FakeTemplate(), limits(**changes))


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(62) for _ in range(rng.randint(1, longest))) for _ in range(count)]


def requests_for(
    asked: Sequence[tuple[int, ...]], *, max_tokens: int = 20, temperature: float = 1.0, **more: Any
) -> list[Request]:
    return [
        Request(f"r{i}", ids, SamplingParams(temperature=temperature, max_tokens=max_tokens + i % 7, seed=i, **more))
        for i, ids in enumerate(asked)
    ]


@torch.no_grad()
def greedy_without_cache(model: FakeModel, prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(max_tokens):
        logits = model(torch.tensor([ids]), torch.arange(len(ids))[None], None)[0, -1, :VOCAB].clone()
        logits[LABEL] = -torch.inf
        ids.append(int(logits.argmax()))
        if ids[-1] == TURN:
            break
    return ids[len(prompt) :]


def test_an_id_that_is_used_again_is_another_request() -> None:
    """What penalties have counted for the first one is not the second one's."""
    generator = make()
    params = SamplingParams(temperature=0.0, max_tokens=20, frequency_penalty=2.0)
    first, second = (generator.generate([Request("again", (5, 6, 7), params)])[0] for _ in range(2))
    assert first == second


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_greedy_equals_recomputation_without_cache(groups: int) -> None:
    model = FakeModel(groups=groups)
    asked = prompts(30)
    results = make(model).generate(requests_for(asked, temperature=0.0))
    for request, result in zip(requests_for(asked), results, strict=True):
        assert list(result.token_ids) == greedy_without_cache(model, request.prompt_ids, request.params.max_tokens)
        assert result.completion_tokens == len(result.token_ids)
        assert result.prompt_tokens == len(request.prompt_ids)
        assert result.finish_reason == ("stop" if result.token_ids[-1] == TURN else "length")


def test_result_does_not_depend_on_batch_or_order() -> None:
    asked = requests_for(prompts(24), logprobs=True)
    reference = {r.id: r for r in make(max_batch=1).generate(asked)}
    for max_batch, cache in ((8, 1024), (24, 400), (5, 4096)):
        shuffled = asked[:]
        random.Random(max_batch).shuffle(shuffled)
        generator = make(max_batch=max_batch, max_cache_tokens=cache)
        results = generator.generate(shuffled)
        assert [r.id for r in results] == [r.id for r in shuffled]
        for result in results:
            assert result.token_ids == reference[result.id].token_ids
            assert result.logprobs == pytest.approx(reference[result.id].logprobs, abs=1e-4)
            assert result.logprobs is not None and len(result.logprobs) == len(result.token_ids)


def test_arrivals_in_the_middle_do_not_matter() -> None:
    asked = requests_for(prompts(16, seed=3))
    reference = {r.id: r.token_ids for r in make(max_batch=16).generate(asked)}
    generator = make()
    handles = []
    for request in asked:
        handles.append(generator.submit(request))
        generator.step()
    while generator.step():
        pass
    assert {h.id: h.future.result(0).token_ids for h in handles} == reference


def test_equal_prompts_are_computed_once() -> None:
    model = FakeModel()
    prompt = tuple(range(30))
    asked = [Request(str(i), prompt, SamplingParams(max_tokens=5, seed=i)) for i in range(6)]
    shared = make(model).generate(asked)
    assert model.calls[0] == 30
    alone = [make().generate([request])[0] for request in asked]
    assert sum(model.calls) == 30 + sum(len(r.token_ids) - 1 for r in shared)
    assert [r.token_ids for r in shared] == [r.token_ids for r in alone]
    assert len({r.token_ids for r in shared}) > 1


def test_as_many_samples_as_the_prompt_has_tokens() -> None:
    """Each sample is drawn after the complete prompt, even if there are as many rows as tokens."""
    prompt = tuple(range(3, 15))
    asked = [Request(str(i), prompt, SamplingParams(max_tokens=5, seed=i)) for i in range(12)]
    together = make(max_batch=12).generate(asked)
    assert [r.token_ids for r in together] == [make().generate([request])[0].token_ids for request in asked]


@pytest.mark.parametrize(
    "changes",
    [
        {"chunk_tokens": 7},
        {"chunk_tokens": 1, "block_tokens": 1},
        {"max_cache_tokens": 128, "block_tokens": 4},  # preempts
        {"max_cache_tokens": 160, "block_tokens": 4, "reserve": True},
        {"overlap": True},
        {"overlap": True, "max_cache_tokens": 128, "block_tokens": 4, "chunk_tokens": 7},
    ],
    ids=str,
)
def test_chunks_blocks_and_preemption_change_nothing(changes: dict[str, int]) -> None:
    asked = requests_for(prompts(24, seed=2, longest=60), max_tokens=24, logprobs=True)
    for i in range(0, len(asked), 3):  # some whose next token depends on the tokens before it, prompts with values
        params = replace(asked[i].params, frequency_penalty=0.7, repetition_penalty=1.3, prompt_logprobs=2)
        asked[i] = replace(asked[i], params=params)
    reference = make(max_batch=1, max_cache_tokens=4096, chunk_tokens=4096).generate(asked)
    generator = make(**{"max_batch": 16, **changes})
    results = generator.generate(asked)
    assert [r.token_ids for r in results] == [r.token_ids for r in reference]
    for result, expected in zip(results, reference, strict=True):
        assert result.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert (result.prompt_logprobs or ())[1:] == pytest.approx((expected.prompt_logprobs or ())[1:], abs=1e-4)
    scored = [r for r in results if r.prompt_logprobs is not None]
    assert len(scored) == 8 and all(len(r.prompt_logprobs or ()) == r.prompt_tokens for r in scored)
    scheduler = generator.scheduler
    assert scheduler.pool.used == 0
    assert (scheduler.preemptions > 0) == ("max_cache_tokens" in changes and "reserve" not in changes)


def test_a_step_is_queued_before_the_one_before_it_is_read() -> None:
    generator = make(overlap=True)
    request = Request("a", (1, 2), SamplingParams(max_tokens=3, ignore_eos=True))
    handle = generator.submit(request)
    taken = []
    while generator.step():
        taken.append((generator.steps, generator.sampled_tokens))
    assert taken == [(0, 0), (1, 1), (2, 2), (3, 3)], "no step beyond max_tokens, and none is lost"
    assert handle.future.result(0).token_ids == make().generate([request])[0].token_ids


def test_a_known_prefix_is_not_computed_again() -> None:
    model = FakeModel()
    generator = make(model, max_cache_tokens=4096)
    start = prompts(1, seed=8)[0] + tuple(range(40))
    first = generator.generate([Request("first", start, SamplingParams(temperature=0.0, max_tokens=20))])[0]
    turn = (*start, *first.token_ids, 1, 2, 3)
    model.calls.clear()
    asked = Request("second", turn, SamplingParams(temperature=0.0, max_tokens=9))
    second = generator.generate([asked])[0]
    known = (len(start) + len(first.token_ids) - 1) // 16 * 16  # the last token was sampled, and never fed
    assert model.calls[0] == len(turn) - known
    counts = generator.counters()
    assert (counts["prefix_hit_tokens_total"], counts["prefix_asked_tokens_total"]) == (known, len(start) + len(turn))
    assert counts["cache_blocks_used"] == counts["running"] == counts["waiting"] == 0
    assert counts["sampled_tokens_total"] == len(first.token_ids) + len(second.token_ids)
    assert second.token_ids == make().generate([asked])[0].token_ids


def test_control_ids_and_padding_are_never_sampled() -> None:
    results = make().generate(requests_for(prompts(20), temperature=50.0, top_k=0))
    assert {i for r in results for i in r.token_ids} <= set(range(63))  # TURN may be drawn, LABEL and padding may not


def test_stop_token_ends_text_and_takes_the_suffix() -> None:
    class Scripted(FakeModel):
        script: Sequence[int] = ()

        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            logits = super().forward(*args, **kwargs)
            position = int(kwargs["position_ids"][0, -1])
            logits[:, -1, self.script[position]] = 1e4
            return logits

    model, tokenizer = Scripted(), FakeTokenizer()

    def run(text: str, end: bool, **params: Any) -> tuple[Result, str]:
        model.script = [*tokenizer.encode(text), *([TURN] if end else [])]
        deltas: list[Delta] = []
        generator = make(model)
        handle = generator.submit(
            Request("x", (0,), SamplingParams(temperature=0, **{"max_tokens": 50, **params})), deltas.append
        )
        while generator.step():
            pass
        return handle.future.result(0), "".join(delta.text for delta in deltas)

    result, streamed = run("hello\n\n", end=True)
    assert (result.text, result.finish_reason, result.completion_tokens) == ("hello\n", "stop", 8)
    assert streamed == "hello\n"
    result, streamed = run("hello\n", end=False, max_tokens=6)
    assert (result.text, result.finish_reason, streamed) == ("hello\n", "length", "hello\n")
    result, streamed = run("one END two", end=True, stop=("END", "zzz"))
    assert (result.text, result.finish_reason, streamed) == ("one ", "stop", "one ")
    assert result.completion_tokens == len("one END")
    result, streamed = run("one ENd two", end=True, stop=("END",))
    assert result.text == streamed == "one ENd two"
    result, streamed = run("ab", end=True, stop=("abc",))
    assert result.text == streamed == "ab"


def test_streaming_text_waits_for_whole_characters() -> None:
    data = "é→x".encode()
    text = ResponseText(lambda ids: bytes(ids).decode("utf-8", "replace"), (), "")
    assert "".join(text.push(b) for b in data) == "é→x"
    assert text.finish(list(data), False) == ("é→x", "")
    text = ResponseText(lambda ids: bytes(ids).decode("utf-8", "replace"), (), "")
    assert text.push(0xC3) == ""
    assert text.finish([0xC3], False) == ("\ufffd", "\ufffd")


def test_cancel_waiting_and_running() -> None:
    generator = make(max_batch=2)
    handles = generator.submit_all(requests_for(prompts(5), max_tokens=60))
    generator.step()
    handles[0].cancel()
    handles[4].cancel()
    assert handles[0].future.result(0).finish_reason == "cancelled"
    assert handles[4].future.result(0).completion_tokens == 0
    while generator.step():
        pass
    reference = {r.id: r.token_ids for r in make().generate(requests_for(prompts(5), max_tokens=60))}
    for handle in handles[1:4]:
        assert handle.future.result(0).token_ids == reference[handle.id]
    handles[1].cancel()  # cancelling a finished request does nothing


def test_refusals() -> None:
    generator = make(max_queue=3, max_batch=2)
    with pytest.raises(UserError, match=r"100 tokens and max_tokens=40.*max_sequence_tokens=128"):
        generator.submit(Request("a", (1,) * 100, SamplingParams(max_tokens=40)))
    with pytest.raises(UserError, match="empty"):
        generator.submit(Request("a", ()))
    with pytest.raises(UserError, match="outside"):
        generator.submit(Request("a", (VOCAB,), SamplingParams(max_tokens=4)))
    with pytest.raises(UserError, match="unique"):
        generator.generate([Request("a", (1,), SamplingParams(max_tokens=4))] * 2)
    asked = requests_for(prompts(6))
    generator.submit_all(asked[:5])
    with pytest.raises(QueueFull) as full:
        generator.submit(asked[5])
    assert full.value.retry_after_sec >= 1
    while generator.step():
        pass
    generator.submit(asked[5])


def test_failure_reaches_everyone() -> None:
    model = FakeModel()
    model.fail_at = 3
    generator = make(model, max_batch=2)
    handles = generator.submit_all(requests_for(prompts(5)))
    with pytest.raises(RuntimeError, match="broke"):
        while generator.step():
            pass
    for handle in handles:
        with pytest.raises(EngineDead, match="the model broke"):
            handle.future.result(0)
    with pytest.raises(EngineDead):
        generator.submit(Request("late", (1,)))


def test_progress_and_its_exceptions() -> None:
    seen: list[str] = []
    results = make().generate(requests_for(prompts(9)), lambda r: seen.append(r.id))
    assert sorted(seen) == sorted(r.id for r in results)

    def stop(result: Result) -> None:
        raise KeyboardInterrupt

    generator = make()
    with pytest.raises(KeyboardInterrupt):
        generator.generate(requests_for(prompts(9)), stop)
    assert len(generator.generate(requests_for(prompts(3)))) == 3  # the generator still works


def test_submission_from_threads_while_running() -> None:
    generator = make()
    asked = requests_for(prompts(40, seed=9))
    reference = {r.id: r.token_ids for r in make(max_batch=16).generate(asked)}
    stop = threading.Event()
    engine = threading.Thread(target=generator.run_until, args=(stop,))
    engine.start()
    found: dict[str, tuple[int, ...]] = {}

    def client(part: list[Request]) -> None:
        for request in part:
            found[request.id] = generator.submit(request).future.result(120).token_ids

    clients = [threading.Thread(target=client, args=(asked[i::4],)) for i in range(4)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    stop.set()
    generator.wake()
    engine.join(120)
    assert found == reference


def test_limits_that_contradict_each_other() -> None:
    with pytest.raises(UserError, match="max_cache_tokens=100"):
        limits(max_cache_tokens=100).checked()
    with pytest.raises(UserError, match="max_batch=0"):
        limits(max_batch=0).checked()


def test_real_model_with_cache_equals_without() -> None:
    """With Megatron-Core's GPT, greedy decoding through the cache picks the tokens that full forward passes pick."""
    from steerlm_megatron.config.schema import EngineConfig, ModelConfig, ParallelConfig
    from steerlm_megatron.model.gpt import build_model
    from steerlm_megatron.model.weights import initialize
    from steerlm_megatron.runtime import parallel

    parallel.initialize(ParallelConfig(), seed=1)
    config = ModelConfig(
        num_layers=2, hidden_size=64, num_heads=4, num_query_groups=2, ffn_hidden_size=96, init_std=0.2
    )
    model = build_model(config, ParallelConfig(), EngineConfig(), VOCAB, gather_logits=True)
    initialize(model, config, VOCAB, seed=3).eval()
    asked = requests_for(prompts(10), temperature=0.0, logprobs=True)
    results = Generator(model, FakeTokenizer(), FakeTemplate(), limits()).generate(asked)
    for request, result in zip(asked, results, strict=True):
        ids = torch.tensor(request.prompt_ids + result.token_ids)
        positions_T = torch.arange(len(ids))
        packed = PackedTokens.from_cu_seqlens(torch.tensor([0, len(ids)], dtype=torch.int32), positions_T)
        with torch.no_grad():
            logits_TV = model(ids[None], positions_T[None], None, packed_seq_params=packed)[0, :, :VOCAB]
        logits_TV[:, LABEL] = -torch.inf
        logits_TV = logits_TV[len(request.prompt_ids) - 1 : -1]
        assert logits_TV.argmax(1).tolist() == list(result.token_ids)
        expected = logits_TV.log_softmax(1).amax(1).tolist()
        assert result.logprobs == pytest.approx(expected, abs=1e-4)
