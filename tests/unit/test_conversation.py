"""The official client continues conversations and reads log-probabilities, and odd requests affect nobody else."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlm_megatron.steer.records import Message
from tests.helpers.server import SCHEMA, TEMPLATE, TOKENIZER, USER, Server, expected, running


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as one:
        yield one


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one


def prompt_tokens(messages: list[Message]) -> int:
    prefix = TEMPLATE.prefix(messages, SCHEMA, SCHEMA.complete({}))
    return len(TOKENIZER.encode_segments(prefix)[0])


@pytest.mark.parametrize("way", ["message", "model_dump", "to_dict", "streamed"])
def test_five_turns_of_the_official_client(client: openai.OpenAI, way: str) -> None:
    messages: list[Any] = [{"role": "developer", "content": "Be brief."}]
    spoken = [Message("system", "Be brief.")]
    for turn in range(5):
        question = f"hello {turn}"
        messages.append({"role": "user", "content": question})
        spoken.append(Message("user", question))
        asked: dict[str, Any] = {"model": "steerlm", "messages": messages, "seed": turn, "max_tokens": 8}
        if way == "streamed":
            stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
            chunks = list(stream)
            answer: dict[str, Any] = {"role": chunks[0].choices[0].delta.role, "content": ""}
            for chunk in chunks:
                for choice in chunk.choices:
                    answer["content"] += choice.delta.content or ""
            messages.append(answer)
            text, usage = answer["content"], chunks[-1].usage
        else:
            whole = client.chat.completions.create(**asked)
            message = whole.choices[0].message
            messages.append({"message": lambda m=message: m, "model_dump": message.model_dump,
                             "to_dict": message.to_dict}[way]())  # fmt: skip
            text, usage = message.content or "", whole.usage
        assert usage is not None and usage.prompt_tokens == prompt_tokens(spoken)
        assert text == expected(spoken, {}, turn, 8).text
        spoken.append(Message("assistant", text))


def test_the_stream_helper_of_the_client(client: openai.OpenAI) -> None:
    """The helper gathers chunks by itself, and dumps messages with all their nulls."""
    with client.chat.completions.stream(model="steerlm", messages=USER, max_tokens=350, seed=1, stop="e") as stream:  # type: ignore[arg-type]
        message = stream.get_final_completion().choices[0].message
    again: Any = [*USER, message.model_dump(), *USER]
    assert client.chat.completions.create(model="steerlm", messages=again, max_tokens=4).choices


def test_models_are_listed_and_retrieved(server: Server, client: openai.OpenAI) -> None:
    assert client.models.retrieve("steerlm") == client.models.list().data[0]
    for name in ("gpt-4", "a/b", "steerlm/"):
        with pytest.raises(openai.NotFoundError) as missing:
            client.models.retrieve(name)
        assert missing.value.code == "model_not_found"
    assert "code" in server.client.get(f"{server.url}/v1/model").json()["error"]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    temperature=st.sampled_from([1, 100]),
    max_tokens=st.integers(1, 40),
    stop=st.sampled_from([None, "e", "\ufffd", "lo"]),
)
def test_logprob_bytes_are_the_text(server: Server, **params: Any) -> None:
    """Tokens that are a part of a character, which a high temperature draws, are included, and cut-off texts."""
    answer = server.post("chat/completions", messages=USER, logprobs=True, top_k=0, **params).json()["choices"][0]
    content = answer["logprobs"]["content"]
    data = b"".join(bytes(token["bytes"]) for token in content)
    assert data.decode("utf-8", "replace").replace("\ufffd", "") == answer["message"]["content"].replace("\ufffd", "")
    byte_tokens = [token for token in content if token["token"] == "\ufffd"]
    assert all(len(token["bytes"]) <= 1 for token in byte_tokens)
    if answer["finish_reason"] == "length":
        assert all(token["bytes"] for token in content)


def test_text_offsets_count_characters(server: Server) -> None:
    choice = server.post(
        "completions", prompt="hello", logprobs=0, temperature=100, top_k=0, max_tokens=60, seed=4
    ).json()["choices"][0]
    offsets, tokens, text = choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"], choice["text"]
    assert len(offsets) == len(tokens) and offsets == sorted(offsets)
    for offset, token in zip(offsets, tokens, strict=True):
        if "\ufffd" not in token and offset + len(token) <= len(text):
            assert text[offset : offset + len(token)] == token


ODD = [
    {"temperature": 1e-308}, {"temperature": 5e-324}, {"top_k": 2**63}, {"top_k": 10**30}, {"top_p": 5e-324},
    {"seed": -(2**63)}, {"seed": 2**63 - 1}, {"max_tokens": 2**63}, {"max_tokens": 10**40}, {"prompt": [2**63]},
    {"prompt": [-1]}, {"temperature": 1e-310, "top_k": 2**64, "top_p": 1e-320}, {"top_p": 1e-17, "top_k": 0},
    {"seed": 2**64}, {"n": 2**40}, {"temperature": -1e-320}, {"top_k": -(2**70)},
]  # fmt: skip


def test_odd_requests_are_nobody_elses(server: Server) -> None:
    """Odd requests, legal or not, get their answer, and requests beside them get the same tokens as alone."""
    usual = {"prompt": "hello", "max_tokens": 30, "seed": 9, "temperature": 1.0}
    alone = server.post("completions", **usual).json()["choices"][0]["text"]
    answers: list[str] = []
    statuses: list[int] = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(server.post("completions", **usual).json()["choices"][0]["text"])
        )
        for _ in range(8)
    ]
    threads += [
        threading.Thread(
            target=lambda odd=odd: statuses.append(server.post("completions", **{**usual, **odd}).status_code)
        )
        for odd in ODD
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [alone] * 8
    assert len(statuses) == len(ODD) and set(statuses) <= {200, 400}
    assert server.client.get(f"{server.url}/health").status_code == 200
    greedy = [
        server.post("completions", **{**usual, "temperature": temperature}).json()["choices"][0]["text"]
        for temperature in (0, 1e-308, 1e-320)
    ]
    assert len(set(greedy)) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails_is_told_so_and_others_go_on(stream: bool) -> None:
    with running() as server:
        original = server.generator.new_job

        def new_job(request: Any, *more: Any) -> Any:
            job = original(request, *more)
            if request.params.seed == 13:

                def fail(*_: Any) -> Any:
                    raise ValueError("of this one")

                job.text.finish = fail
            return job

        server.generator.new_job = new_job  # type: ignore[method-assign]

        async def ask(client: openai.AsyncOpenAI, seed: int) -> Any:
            asked: Any = {"model": "steerlm", "prompt": "hello", "seed": seed, "max_tokens": 20, "stream": stream}
            answer = await client.completions.create(**asked)
            return "".join([chunk.choices[0].text async for chunk in answer]) if stream else answer.choices[0].text

        async def all_of_them() -> list[Any]:
            async with server.openai() as client:
                return await asyncio.gather(*(ask(client, seed) for seed in range(10, 16)), return_exceptions=True)

        answers = asyncio.run(all_of_them())
        assert isinstance(answers[3], openai.APIError) and "this request failed: ValueError: of this one" in str(
            answers[3]
        )
        for seed, answer in zip(range(10, 16), answers, strict=True):
            if seed != 13:
                again = server.post("completions", prompt="hello", seed=seed, max_tokens=20).json()
                assert answer == again["choices"][0]["text"]
        assert server.client.get(f"{server.url}/health").status_code == 200


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.text(max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "developer", "tool"])},
    optional={
        "content": st.one_of(st.text(st.characters(), max_size=9), st.none(), JSON),
        "attributes": st.one_of(st.dictionaries(st.sampled_from(["quality", "humor", "x"]), JSON, max_size=2), JSON),
        "refusal": st.one_of(st.none(), JSON),
        "tool_calls": st.one_of(st.none(), st.just([]), JSON),
    },
)
SAMPLING: dict[str, Any] = {
    "temperature": st.one_of(st.floats(0, 100), JSON),
    "top_p": st.one_of(st.floats(0, 1), JSON),
    "top_k": st.one_of(st.integers(-1, 2**65), JSON),
    "seed": st.one_of(st.integers(-(2**64), 2**64), JSON),
    "n": st.one_of(st.integers(0, 3), JSON),
    "stop": st.one_of(st.text(max_size=3), st.lists(st.text(max_size=3), max_size=3), JSON),
    "logprobs": st.one_of(st.sampled_from([0, True, None]), JSON),
    "return_token_ids": st.one_of(st.booleans(), JSON),
    "attributes": st.one_of(st.dictionaries(st.sampled_from(["quality", "humor", "x"]), JSON, max_size=2), JSON),
    "stream": st.one_of(st.booleans(), JSON),
    "stream_options": st.one_of(st.just({"include_usage": True}), JSON),
}
CHATS = st.fixed_dictionaries({"messages": st.one_of(st.lists(MESSAGE, max_size=4), JSON)}, optional=SAMPLING)
PROMPTS = st.one_of(
    st.text(st.characters(), max_size=9),
    st.lists(st.integers(-1, 500), max_size=6),
    st.lists(st.text(max_size=4)),
    JSON,
)
COMPLETIONS = st.fixed_dictionaries({"prompt": PROMPTS}, optional=SAMPLING)


@settings(max_examples=250, deadline=None)
@given(st.one_of(CHATS.map(lambda b: ("chat/completions", b)), COMPLETIONS.map(lambda b: ("completions", b))))
def test_any_json_is_answered_or_refused(server: Server, asked: tuple[str, dict[str, Any]]) -> None:
    """No request body causes an error of the server, and none ends it."""
    path, body = asked
    data = json.dumps({**body, "max_tokens": 3})  # JSON may contain lone surrogates
    answer = server.client.post(f"{server.url}/v1/{path}", content=data, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert answer.json()["error"]["message"]
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.text.endswith("data: [DONE]\n\n")
    assert server.generator.error is None
