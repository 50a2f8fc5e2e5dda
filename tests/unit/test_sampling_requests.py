"""Sampling parameters and log-probabilities of requests: in the generator, and through HTTP with the openai client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlm_megatron.config.schema import SamplingConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.generator import Generator
from steerlm_megatron.generate.job import Handle
from steerlm_megatron.generate.protocol import Delta, Request, Result, SamplingParams
from steerlm_megatron.serve.api import ChatBody, CompletionBody, read
from steerlm_megatron.serve.client import SamplingClient
from steerlm_megatron.serve.logprobs import Pending, TokenTexts
from steerlm_megatron.serve.sampling_fields import fields_of, params_of
from steerlm_megatron.serve.service import Service
from steerlm_megatron.serve.stream import Pump, Stream
from tests.helpers.fake_model import LABEL, TURN, VOCAB, FakeModel, FakeTemplate, FakeTokenizer, limits
from tests.helpers.server import SCHEMA, TOKENIZER, USER, Server, make_generator, running


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as one:
        yield one


class Scripted(FakeModel):
    """A model that says ``script``, whose first entry follows the first token of the prompt."""

    script: list[int]

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = super().forward(*args, **kwargs)
        position = int(kwargs["position_ids"][0, -1])
        logits[:, -1, self.script[position]] += 1e3
        return logits


def say(script: str | list[int], **params: Any) -> tuple[Result, str]:
    """Return the result, and the text of the deltas, of a model that says ``script`` and then stops."""
    model = Scripted()
    model.script = [*(FakeTokenizer().encode(script) if isinstance(script, str) else script), TURN, TURN]
    generator = Generator(model, FakeTokenizer(), FakeTemplate(), limits())
    deltas: list[Delta] = []
    given_ = SamplingParams(**{"temperature": 0.0, "max_tokens": 30, **params})
    handle = generator.submit(Request("x", (0,), given_), deltas.append)
    while generator.step():
        pass
    result = handle.future.result(0)
    quiet = generator.generate([Request("y", (0,), given_)])[0]
    assert (quiet.text, quiet.token_ids, quiet.stop_reason) == (result.text, result.token_ids, result.stop_reason)
    return result, "".join(delta.text for delta in deltas)


def test_stop_strings_and_tokens() -> None:
    b = FakeTokenizer().encode("b")[0]
    for params, text, reason, drawn in (
        ({}, "abcabc", None, 7),
        ({"stop": ("ca",)}, "ab", "ca", 4),
        ({"stop": ("ca",), "include_stop_str_in_output": True}, "abca", "ca", 4),
        ({"stop": ("cab", "bc")}, "a", "bc", 3),
        ({"stop_token_ids": (b,)}, "a", b, 2),
        ({"stop_token_ids": (b,), "include_stop_str_in_output": True}, "ab", b, 2),
        ({"stop": ("a",), "min_tokens": 1}, "abc", "a", 4),
        ({"stop": ("a",), "min_tokens": 4}, "abcabc", None, 7),
        ({"max_tokens": 4}, "abca", None, 4),
    ):
        result, streamed = say("abcabc", **params)
        assert (result.text, streamed, result.stop_reason, len(result.token_ids)) == (text, text, reason, drawn), params
        assert result.finish_reason == ("length" if "max_tokens" in params else "stop")


def test_ignore_eos_goes_on_and_min_tokens_draws_another() -> None:
    a, b = FakeTokenizer().encode("ab")
    result, streamed = say([a, TURN, b, TURN, b, b], ignore_eos=True, max_tokens=6)
    assert result.token_ids == (a, TURN, b, TURN, b, b) and result.finish_reason == "length"
    assert result.text == streamed == "abbb"
    result, _ = say([a, TURN, b, b, b], min_tokens=3)
    assert len(result.token_ids) > 3 and TURN not in result.token_ids[:3]
    result, _ = say([a, a, a, TURN], min_tokens=2, stop_token_ids=(a,))
    assert a not in result.token_ids[:2] and TURN not in result.token_ids[:2]


def test_allowed_tokens_and_biases() -> None:
    generator = Generator(FakeModel(), FakeTokenizer(), FakeTemplate(), limits())
    asked = [
        Request(str(i), (i,), SamplingParams(allowed_token_ids=(3, 4, TURN), max_tokens=12, seed=i)) for i in range(6)
    ]
    drawn = {i for result in generator.generate(asked) for i in result.token_ids}
    assert drawn <= {3, 4, TURN} and len(drawn) > 1
    forced = generator.generate([Request("x", (1,), SamplingParams(logit_bias=((9, 100.0),), max_tokens=5))])[0]
    assert forced.token_ids == (9,) * 5
    for params, words in (
        ({"allowed_token_ids": (LABEL,)}, "allowed_token_ids leaves no token"),
        ({"allowed_token_ids": (TURN,), "min_tokens": 1}, "allowed_token_ids leaves no token"),
        ({"allowed_token_ids": (VOCAB,)}, "allowed_token_ids: the token id 64 is outside"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids: the token id -1 is outside"),
        ({"logit_bias": ((VOCAB, 1.0),)}, "logit_bias: the token id 64 is outside"),
        ({"logit_bias": ((1, 101.0),)}, "logit_bias"),
        ({"min_tokens": 600}, "min_tokens=600"),
        ({"top_logprobs": 21}, "top_logprobs=21"),
        ({"prompt_logprobs": 21}, "prompt_logprobs=21"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"presence_penalty": 2.5}, "presence_penalty=2.5"),
        ({"frequency_penalty": -3.0}, "frequency_penalty=-3.0"),
    ):
        with pytest.raises(UserError, match=words):
            generator.submit(Request("x", (1,), SamplingParams(**{"max_tokens": 9, **params})))  # type: ignore[arg-type]


def test_penalties_do_not_depend_on_the_batch() -> None:
    """Rows that come and go, with and without penalties, draw what each draws alone."""

    def asked(i: int) -> Request:
        penalties = {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.2} if i % 3 else {}
        params = SamplingParams(max_tokens=5 + i, seed=i, min_p=0.1 * (i % 2), logprobs=True, **penalties)
        return Request(str(i), tuple(range(1, 4 + i % 4)), params)

    requests = [asked(i) for i in range(14)]
    together = Generator(FakeModel(), FakeTokenizer(), FakeTemplate(), limits(max_batch=5)).generate(requests)
    for request, result in zip(requests, together, strict=True):
        alone = Generator(FakeModel(), FakeTokenizer(), FakeTemplate(), limits()).generate([request])[0]
        assert alone.token_ids == result.token_ids and alone.logprobs == pytest.approx(result.logprobs, abs=1e-4)
    plain = Generator(FakeModel(), FakeTokenizer(), FakeTemplate(), limits())
    bare = SamplingParams(max_tokens=5 + 1, seed=1)
    assert plain.generate([Request("x", requests[1].prompt_ids, bare)])[0].token_ids != together[1].token_ids


@torch.no_grad()
def model_logprobs(model: FakeModel, ids: list[int], vocab_size: int) -> torch.Tensor:
    """Return the log-probabilities [T, V] after each of ``ids``, from one pass without a cache."""
    logits = model(torch.tensor([ids]), torch.arange(len(ids))[None], None)[0, :, :vocab_size]
    return logits.float().log_softmax(1)


def test_log_probabilities_of_prompts() -> None:
    model = FakeModel()
    generator = Generator(model, FakeTokenizer(), FakeTemplate(), limits(max_batch=4))
    prompts = [(5, LABEL, 7, 8), (1, 2, 3), (5, LABEL, 7, 8), (9,), (1, 2, 3), tuple(range(40))]
    wanted = [2, None, 0, 3, 20, 1]
    results = generator.generate(
        [
            Request(str(i), ids, SamplingParams(max_tokens=3, seed=i, prompt_logprobs=top))
            for i, (ids, top) in enumerate(zip(prompts, wanted, strict=True))
        ]
    )
    for ids, top, result in zip(prompts, wanted, results, strict=True):
        if top is None:
            assert result.prompt_logprobs is None and result.prompt_top_logprobs is None
            continue
        expected_TV = model_logprobs(model, list(ids), VOCAB)[:-1]
        chosen = expected_TV.gather(1, torch.tensor(ids[1:], dtype=torch.int64)[:, None]).squeeze(1)
        assert result.prompt_logprobs is not None and result.prompt_logprobs[0] is None
        assert result.prompt_logprobs[1:] == pytest.approx(chosen.tolist(), abs=1e-4)
        assert result.prompt_top_logprobs is not None and len(result.prompt_top_logprobs) == len(ids)
        for place, row in zip(result.prompt_top_logprobs[1:], expected_TV, strict=True):
            values = row.topk(top) if top else None
            assert place is not None and [i for i, _ in place] == ([] if values is None else values.indices.tolist())
            assert [v for _, v in place] == pytest.approx([] if values is None else values.values.tolist(), abs=1e-4)
    bare = [Request(str(i), ids, SamplingParams(max_tokens=3, seed=i)) for i, ids in enumerate(prompts)]
    fresh = Generator(FakeModel(), FakeTokenizer(), FakeTemplate(), limits(max_batch=4))
    assert [r.token_ids for r in fresh.generate(bare)] == [r.token_ids for r in results]


PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2),
    top_k=st.integers(0, 100),
    top_p=st.floats(0.1, 1),
    max_tokens=st.integers(5, 20),
    seed=st.integers(0, 2**63 - 1),
    stop=st.lists(st.text("ab", min_size=1), max_size=2, unique=True).map(tuple),
    logprobs=st.just(True),
    top_logprobs=st.just(3),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.5, 2),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(st.integers(0, 99), st.floats(-100, 100), max_size=3).map(lambda d: tuple(d.items())),
    allowed_token_ids=st.one_of(st.none(), st.lists(st.integers(0, 99), min_size=1, unique=True).map(tuple)),
    stop_token_ids=st.lists(st.integers(0, 99), max_size=3, unique=True).map(tuple),
    include_stop_str_in_output=st.booleans(),
    ignore_eos=st.booleans(),
    min_tokens=st.integers(0, 5),
    prompt_logprobs=st.sampled_from([None, 3]),
)


@settings(max_examples=100, deadline=None)
@given(PARAMS)
def test_a_body_carries_all_parameters(params: SamplingParams) -> None:
    body = read(CompletionBody, json.loads(json.dumps({"prompt": [1], **fields_of(params)})))
    assert params_of(body, SamplingConfig(), params.max_tokens, params.seed) == params
    assert set(fields_of(SamplingParams())) == {"max_tokens", "temperature", "top_k", "top_p", "seed"}


# Through HTTP


def test_parameters_reach_the_engine(server: Server) -> None:
    ids = TOKENIZER.encode("hello world")
    for i, fields in enumerate(
        (
            {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 0.5},
            {"min_p": 0.3, "logit_bias": {"40": 5, "41": -100}},
            {"allowed_token_ids": [40, 41, 42, 43], "min_tokens": 4},
            {"ignore_eos": True, "stop_token_ids": [ids[0]]},
            {"include_stop_str_in_output": True, "stop": ["o", "e"]},
        )
    ):
        params = params_of(read(CompletionBody, {"prompt": ids, **fields}), SamplingConfig(), 15, i)
        mine = make_generator()[0].generate([Request("x", tuple(ids), params)])[0]
        (theirs,) = server.post(
            "completions", prompt=ids, max_tokens=15, seed=i, return_token_ids=True, **fields
        ).json()["choices"]
        assert (theirs["text"], theirs["token_ids"]) == (mine.text, list(mine.token_ids))
        assert (theirs["finish_reason"], theirs["stop_reason"]) == (mine.finish_reason, mine.stop_reason)


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("completions", {"prompt": "hi", "min_tokens": 9, "max_tokens": 5}, "min_tokens", "more than max_tokens=5"),
        ("completions", {"prompt": "hi", "max_tokens": 0}, "max_tokens", "echo=true"),
        ("completions", {"prompt": "hi", "allowed_token_ids": [99999]}, "allowed_token_ids", "99999"),
        ("completions", {"prompt": "hi", "allowed_token_ids": []}, "allowed_token_ids", "at least one"),
        ("completions", {"prompt": "hi", "stop_token_ids": [99999]}, "stop_token_ids", "99999"),
        ("completions", {"prompt": "hi", "stop_token_ids": [-1]}, "stop_token_ids", "list of token ids"),
        ("completions", {"prompt": "hi", "logit_bias": {"99999": 1}}, "logit_bias", "99999"),
        ("completions", {"prompt": "hi", "logit_bias": {"x": 1}}, "logit_bias", "'x'"),
        ("completions", {"prompt": "hi", "logit_bias": {"5": 101}}, "logit_bias", "101"),
        ("completions", {"prompt": "hi", "logit_bias": [5]}, "logit_bias", "object"),
        ("completions", {"prompt": "hi", "min_p": 2}, "min_p", "min_p=2"),
        ("completions", {"prompt": "hi", "repetition_penalty": 0}, "repetition_penalty", "repetition_penalty=0"),
        ("completions", {"prompt": "hi", "presence_penalty": -3}, "presence_penalty", "presence_penalty=-3"),
        ("chat/completions", {"messages": USER, "top_logprobs": 3}, "top_logprobs", "logprobs=true"),
        ("chat/completions", {"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "21"),
        ("chat/completions", {"messages": USER, "tools": [{"type": "function"}]}, "tools", "tools"),
        (
            "chat/completions",
            {"messages": USER, "response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format",
            "json_schema",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    server: Server, path: str, body: dict[str, Any], param: str, words: str
) -> None:
    response = server.post(path, **body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param and words in error["message"] and error["type"] == "invalid_request_error"


def test_a_body_without_a_content_type_is_told_what_to_send(server: Server) -> None:
    """As ``curl -N -d '{…}'`` sends it."""
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    for given_ in (headers, {}):
        response = server.client.post(f"{server.url}/v1/completions", content=b'{"prompt": "hi"}', headers=given_)
        assert response.status_code == 400
        assert "-H 'Content-Type: application/json'" in response.json()["error"]["message"]


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_echo_with_log_probabilities(server: Server, max_tokens: int) -> None:
    """What lm-eval asks for: the prompt's tokens, each with what the model said of it and the most likely ones."""
    prompts = [TOKENIZER.encode("hello world, how are you"), TOKENIZER.encode("today 7")]
    asked = {"prompt": prompts, "max_tokens": max_tokens, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}
    body = server.post("completions", **asked).json()
    plain = server.post("completions", **{**asked, "echo": False, "max_tokens": max(1, max_tokens)}).json()
    assert body["usage"]["completion_tokens"] == (0 if not max_tokens else plain["usage"]["completion_tokens"])
    for ids, choice, bare in zip(prompts, body["choices"], plain["choices"], strict=True):
        shown, text = choice["logprobs"], TOKENIZER.decode(ids)
        assert choice["text"] == text + (bare["text"] if max_tokens else "")
        expected_TV = model_logprobs(server.model, ids, TOKENIZER.vocab_size)
        chosen = expected_TV[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1).tolist()
        drawn = bare["logprobs"]["token_logprobs"] if max_tokens else []
        assert shown["token_logprobs"][0] is None
        assert shown["token_logprobs"][1:] == pytest.approx([*chosen, *drawn], abs=1e-4)
        assert shown["tokens"] == [TOKENIZER.decode([i]) for i in ids] + (
            bare["logprobs"]["tokens"] if max_tokens else []
        )
        assert shown["text_offset"] == sorted(shown["text_offset"]) and shown["text_offset"][0] == 0
        for at, offset in enumerate(shown["text_offset"][: len(ids)]):
            assert choice["text"][offset:].startswith(shown["tokens"][at])
        for at, row in enumerate(expected_TV[:-1], 1):
            likely = shown["top_logprobs"][at]
            greedy = int(row.argmax()) == ids[at]
            assert (shown["token_logprobs"][at] == max(likely.values())) == greedy, "as lm-eval looks for greedy tokens"
            assert len(likely) == 2 - greedy
    (by_text,) = server.post("completions", **{**asked, "prompt": "today 7", "logprobs": None}).json()["choices"]
    assert by_text["text"] == body["choices"][1]["text"] and by_text["logprobs"] is None


def test_the_client_gets_all_that_the_generator_gives(server: Server) -> None:
    ids = tuple(TOKENIZER.encode("hello world"))
    requests = [
        Request("a", ids, SamplingParams(max_tokens=8, seed=1, logprobs=True, top_logprobs=3)),
        Request("b", ids, SamplingParams(max_tokens=8, seed=1, logprobs=True, top_logprobs=2, prompt_logprobs=2)),
        Request("c", ids, SamplingParams(max_tokens=8, seed=1, prompt_logprobs=0)),
        Request("d", ids, SamplingParams(max_tokens=8, seed=1, stop=("e", "o", "a"), repetition_penalty=1.1)),
    ]
    mine, theirs = make_generator()[0].generate(requests), SamplingClient([server.url]).generate(requests)
    for own, got in zip(mine, theirs, strict=True):
        assert (own.text, own.token_ids, own.stop_reason) == (got.text, got.token_ids, got.stop_reason)
        for name in ("logprobs", "prompt_logprobs", "top_logprobs", "prompt_top_logprobs"):
            a, b = getattr(own, name), getattr(got, name)
            assert (a is None) == (b is None), name
            assert flat(a) == pytest.approx(flat(b), abs=1e-4), name


def flat(values: Any) -> list[float]:
    """Return the numbers in nested tuples, None as 0."""
    if isinstance(values, tuple):
        return [number for value in values for number in flat(value)]
    return [float(values or 0)]


def test_streamed_log_probabilities_are_those_of_the_whole(server: Server) -> None:
    async def ask(chat: bool, **body: Any) -> tuple[Any, list[Any]]:
        async with server.openai() as client:
            create: Any = client.chat.completions.create if chat else client.completions.create
            return await create(model="steerlm", **body), [
                c async for c in await create(model="steerlm", stream=True, **body)
            ]

    for seed, more in ((1, {}), (2, {"stop": ["o", " a"]}), (3, {"extra_body": {"ignore_eos": True}}), (4, {"n": 3})):
        chat = {"messages": USER, "logprobs": True, "top_logprobs": 2, "max_tokens": 25, "seed": seed, **more}
        whole, chunks = asyncio.run(ask(True, **chat))
        for choice in whole.choices:
            mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == choice.index]
            joined = [token for c in mine if c.logprobs for token in c.logprobs.content]
            assert [t.model_dump() for t in joined] == [t.model_dump() for t in choice.logprobs.content]
            if "\ufffd" not in choice.message.content:  # which stands for bytes that are no characters
                assert b"".join(bytes(t.bytes) for t in joined).decode() == choice.message.content
            assert all(len(t.top_logprobs) == 2 for t in joined)
            assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        completion = {"prompt": "hello", "logprobs": 2, "max_tokens": 25, "seed": seed, **more}
        whole, chunks = asyncio.run(ask(False, **completion))
        for choice in whole.choices:
            mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == choice.index]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                joined = [value for c in mine if c.logprobs for value in getattr(c.logprobs, name)]
                assert joined == getattr(choice.logprobs, name), name
            assert "".join(c.text for c in mine) == choice.text
    _, chunks = asyncio.run(ask(False, prompt="hello", echo=True, max_tokens=3, seed=1))
    assert "".join(c.choices[0].text for c in chunks).startswith("hello")


def test_names_of_tokens(server: Server) -> None:
    body = {"prompt": "hello", "max_tokens": 4, "seed": 1, "logprobs": 1, "return_tokens_as_token_ids": True}
    choice = server.post("completions", **body, return_token_ids=True).json()["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]
    assert all(name.startswith("token_id:") for names in choice["logprobs"]["top_logprobs"] for name in names)


def test_pending_tokens_are_shown_once() -> None:
    texts, pending = TokenTexts(TOKENIZER), Pending()
    ids = TOKENIZER.encode("hello world, how are you today?")
    for i in ids[:2]:
        pending.add(Delta("", (i,), (-1.0,), (((i, -1.0),),)))
    first = texts.of_stream(pending, frozenset())
    pending.take(TOKENIZER.decode(ids[:2]))
    assert list(first.ids) == ids[:2] and first.offsets[0] == 0
    assert not texts.of_stream(pending, frozenset()).ids
    pending.add(Delta("", (ids[2],), (-2.0,)))
    assert texts.of_stream(pending, frozenset()).offsets == [len(TOKENIZER.decode(ids[:2]))]


def test_several_turns_with_its_own_messages(server: Server) -> None:
    """The message that the client got goes back as it is, by the synchronous client and the asynchronous one."""
    messages: list[Any] = [{"role": "user", "content": "hello"}]
    options: dict[str, Any] = {
        "tools": [], "response_format": {"type": "text"}, "metadata": {"a": "b"}, "user": "me", "store": False,
        "service_tier": "auto", "parallel_tool_calls": True,
    }  # fmt: skip
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        for turn in range(3):
            answer = client.chat.completions.create(
                model="steerlm", messages=messages, max_completion_tokens=8, seed=turn, **options
            )
            messages += [answer.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "and?"}]}]
    assert len(messages) == 7

    async def again() -> Any:
        async with server.openai() as client:
            return await client.chat.completions.create(
                model="steerlm", messages=messages, max_completion_tokens=8, seed=2
            )

    assert asyncio.run(again()).usage.prompt_tokens > answer.usage.prompt_tokens
    dumped = [m if isinstance(m, dict) else m.model_dump() for m in messages]
    assert server.post("chat/completions", messages=dumped, max_tokens=3).status_code == 200


def test_models_say_what_a_client_needs(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        (listed,) = client.models.list().data
        assert client.models.retrieve("steerlm") == listed
    described = listed.model_dump()
    assert described["max_model_len"] == 400 and described["attributes"]["best"] == {"quality": 9, "toxicity": 0}
    assert described["sampling"] == {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "max_tokens": 12}
    assert described["scored_attributes"] == []


def test_a_token_that_a_stop_string_cuts_has_the_bytes_that_are_sent() -> None:
    """Also if its delta is sent before the engine has said that the response ended."""
    generator, config = make_generator()
    service = Service(generator, SCHEMA, config, SamplingConfig())
    given = {"messages": USER, "max_tokens": 30, "seed": 3, "logprobs": True, "stream": True}
    (free,) = generator.generate(service.chat(read(ChatBody, given)).requests)
    long = next(text for text in map(TOKENIZER.decode, zip(free.token_ids)) if len(text) > 1 and text.isascii())
    ask = service.chat(read(ChatBody, {**given, "stop": long[1:]}))
    (result,) = generator.generate(ask.requests)
    assert result.stop_reason == long[1:] and result.logprobs is not None
    stream = Stream(Pump(), service, ask)
    stream.handles = [Handle(ask.requests[0], lambda _: None)]
    put = stream._sink(0)

    async def chunks() -> list[bytes]:
        put(Delta("", result.token_ids, result.logprobs))
        sent = stream.chunks(lambda error: {})
        first = await anext(sent)
        put(result)
        return [first, *[chunk async for chunk in sent]]

    events = [e.removeprefix("data: ") for e in b"".join(asyncio.run(chunks())).decode().split("\n\n")[:-2]]
    shown = [json.loads(event)["choices"][0]["logprobs"] for event in events]
    tokens = [token for part in shown if part for token in part["content"]]
    assert tokens == service.response(ask, [result])["choices"][0]["logprobs"]["content"]
    assert bytes(byte for token in tokens for byte in token["bytes"]).decode(errors="replace") == result.text
