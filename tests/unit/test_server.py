"""The HTTP server on loopback: the openai client, errors, back pressure, disconnects, failure, shutting down."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from steerlm_megatron.config.schema import SamplingConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.protocol import Request, SamplingParams, derive_seed
from steerlm_megatron.serve.client import SamplingClient, ServerFailure
from steerlm_megatron.serve.orderly import check_port
from steerlm_megatron.serve.server import serve
from steerlm_megatron.steer.records import Message
from tests.helpers.server import SCHEMA, TEMPLATE, TOKENIZER, USER, Server, expected, make_generator, running, wait_for


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as one:
        yield one


def test_sixteen_concurrent_chats_through_openai(server: Server) -> None:
    async def one(client: openai.AsyncOpenAI, i: int) -> Any:
        return await client.chat.completions.create(
            model="steerlm",
            messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"hello world {i}"}],
            seed=100 + i,
            max_tokens=20 + i,
            extra_body={"attributes": {"quality": i % 10, "humor": 9 - i % 10}},
        )

    async def all_of_them() -> list[Any]:
        async with server.openai() as client:
            return await asyncio.gather(*(one(client, i) for i in range(16)))

    for i, answer in enumerate(asyncio.run(all_of_them())):
        messages = [Message("system", "Be brief."), Message("user", f"hello world {i}")]
        result = expected(messages, {"quality": i % 10, "humor": 9 - i % 10}, 100 + i, 20 + i)
        assert answer.choices[0].message.content == result.text
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].finish_reason == result.finish_reason
        assert answer.usage.prompt_tokens == result.prompt_tokens
        assert answer.usage.completion_tokens == result.completion_tokens
        assert answer.usage.total_tokens == result.prompt_tokens + result.completion_tokens
        assert answer.model == "steerlm" and answer.object == "chat.completion"


def test_earlier_turns_keep_their_attributes_and_text_stays_text(server: Server) -> None:
    messages = [
        {"role": "user", "content": "hello <extra_id_1>"},
        {"role": "assistant", "content": "hi", "attributes": {"quality": 3.6}},
        {"role": "user", "content": [{"type": "text", "text": "how "}, {"type": "text", "text": "are you"}]},
    ]
    body = server.post("chat/completions", messages=messages, seed=5, max_tokens=9, return_token_ids=True).json()
    result = expected(
        [
            Message("user", "hello <extra_id_1>"),
            Message("assistant", "hi", {"quality": 4}),
            Message("user", "how are you"),
        ],
        {},
        5,
        9,
    )
    assert body["choices"][0]["token_ids"] == list(result.token_ids)
    assert body["usage"]["prompt_tokens"] == result.prompt_tokens


def test_stream_equals_whole(server: Server) -> None:
    async def both() -> tuple[Any, list[Any]]:
        async with server.openai() as client:
            asked: dict[str, Any] = {"model": "steerlm", "messages": USER, "seed": 3, "max_tokens": 40, "n": 3}
            whole = await client.chat.completions.create(**asked)
            stream = await client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
            return whole, [chunk async for chunk in stream]

    whole, chunks = asyncio.run(both())
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    for i, choice in enumerate(whole.choices):
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == i]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
    assert len({choice.message.content for choice in whole.choices}) > 1


def test_completions_text_ids_lists_and_logprobs(server: Server) -> None:
    async def ask(**body: Any) -> Any:
        async with server.openai() as client:
            return await client.completions.create(model="steerlm", max_tokens=8, seed=1, **body)

    ids = TOKENIZER.encode("hello world")
    text, by_ids = asyncio.run(ask(prompt="hello world")), asyncio.run(ask(prompt=ids))
    assert text.choices[0].text == by_ids.choices[0].text and text.usage.prompt_tokens == len(ids)
    many = asyncio.run(ask(prompt=["hello world", "hello"], n=2, logprobs=0))
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.choices[0].text == text.choices[0].text
    assert many.usage.prompt_tokens == len(ids) + len(TOKENIZER.encode("hello"))
    assert many.usage.completion_tokens == sum(len(c.logprobs.tokens) for c in many.choices)
    for choice in many.choices:
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) <= 8
        assert all(value <= 0 for value in choice.logprobs.token_logprobs)
    full = text.choices[0].text
    stopped = asyncio.run(ask(prompt="hello world", stop=full[2:4]))
    assert stopped.choices[0].text == full[: full.index(full[2:4])] and stopped.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("chat/completions", {"messages": USER, "attributes": {"qualty": 3}}, "attributes", "qualty"),
        ("chat/completions", {"messages": USER, "attributes": {"quality": 10}}, "attributes", "quality=10"),
        ("chat/completions", {"messages": USER, "attributes": {"quality": "high"}}, "attributes", "high"),
        ("chat/completions", {"messages": USER, "temprature": 3}, "temprature", "unknown parameter"),
        ("chat/completions", {"messages": USER, "temperature": -1}, "temperature", "temperature=-1"),
        (
            "chat/completions",
            {"messages": USER, "frequency_penalty": 2.5},
            "frequency_penalty",
            "frequency_penalty=2.5",
        ),
        ("chat/completions", {"messages": USER, "max_tokens": 500}, "messages", "max_sequence_tokens=400"),
        ("chat/completions", {"messages": []}, "messages", "messages"),
        ("chat/completions", {"messages": [{"role": "system", "content": "x"}]}, "messages", "last of messages"),
        (
            "chat/completions",
            {"messages": [{**USER[0], "attributes": {"quality": 1}}]},
            "messages",
            "assistant messages",
        ),
        ("chat/completions", {"messages": [{**USER[0], "colour": 1}]}, "messages.0.colour", "unknown parameter"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "messages", "role"),
        ("chat/completions", {"messages": USER, "model": "gpt-4"}, "model", "gpt-4"),
        ("chat/completions", {}, "messages", "missing parameter"),
        ("completions", {"prompt": "hi", "echo": True, "logprobs": 1, "stream": True}, "echo", "stream=true"),
        ("completions", {"prompt": [99999]}, None, "outside"),
        ("completions", {"prompt": ""}, "prompt", "empty"),
        ("completions", {"prompt": "hi", "logprobs": 21}, "logprobs", "logprobs=21"),
        ("completions", {"prompt": "hi", "best_of": 3}, "best_of", "best_of=3"),
        ("completions", {"prompt": "hi", "attributes": {"quality": 1}}, "attributes", "unknown parameter"),
    ],
)
def test_bad_parameters_are_named(
    server: Server, path: str, body: dict[str, Any], param: str | None, words: str
) -> None:
    response = server.post(path, **body)
    assert response.status_code == (404 if param == "model" else 400)
    error = response.json()["error"]
    assert error["param"] == param and words in error["message"]
    assert error["type"] == "invalid_request_error"


def test_other_routes(server: Server) -> None:
    assert server.client.get(f"{server.url}/health").json()["status"] == "ok"
    model = server.client.get(f"{server.url}/v1/models").json()["data"][0]
    assert model["id"] == "steerlm" and model["attributes"]["names"] == list(SCHEMA.names)
    server.post("completions", prompt="hello")
    metrics = server.client.get(f"{server.url}/metrics").text
    assert "steerlm_sampled_tokens_total" in metrics and 'steerlm_requests_total{endpoint="/v1/completions"' in metrics
    missing = server.client.get(f"{server.url}/nothing")
    assert missing.status_code == 404 and "error" in missing.json()
    broken = server.client.post(
        f"{server.url}/v1/completions", content=b"{", headers={"Content-Type": "application/json"}
    )
    assert broken.status_code == 400 and "JSON" in broken.json()["error"]["message"]


def test_client_gives_what_the_generator_gives(server: Server) -> None:
    requests = [
        Request(
            str(i), tuple(TOKENIZER.encode(f"hello {i}")), SamplingParams(max_tokens=10, seed=i, logprobs=i % 2 == 0)
        )
        for i in range(30)
    ]
    client = SamplingClient([server.url, server.url + "/v1/"], concurrency=8)
    client.check()
    seen: list[str] = []
    results = client.generate(requests, lambda result: seen.append(result.id))
    local = make_generator()[0].generate(requests)
    for mine, theirs in zip(results, local, strict=True):
        assert (mine.id, mine.token_ids, mine.text, mine.finish_reason) == (
            theirs.id,
            theirs.token_ids,
            theirs.text,
            theirs.finish_reason,
        )
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    assert sorted(seen) == sorted(request.id for request in requests)
    with pytest.raises(UserError, match="request too-long.*max_sequence_tokens"):
        client.generate([Request("too-long", (5,) * 300, SamplingParams(max_tokens=200))])


def test_without_attributes_they_are_refused() -> None:
    with running(schema=None) as server:
        assert server.post("chat/completions", messages=USER).status_code == 200
        response = server.post("chat/completions", messages=USER, attributes={"quality": 3})
        assert response.status_code == 400 and "quality" in response.json()["error"]["message"]


def test_queue_full_then_room_and_the_client_waits_for_it() -> None:
    with running(max_batch=1, max_queue=2) as server:
        body = {"prompt": "hello", "max_tokens": 30, "seed": 1}
        statuses: list[int] = []
        retry_after: list[str] = []
        codes: list[str] = []

        def ask() -> None:
            answer = server.post("completions", **body)
            if answer.status_code == 429:
                retry_after.append(answer.headers["Retry-After"])
                codes.append(answer.json()["error"]["code"])
            statuses.append(answer.status_code)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        server.model.go.clear()
        for thread in threads:
            thread.start()
        wait_for(lambda: len(statuses) == 5)
        server.model.go.set()
        for thread in threads:
            thread.join()
        assert sorted(statuses) == [200] * 3 + [429] * 5, "one in its row, two that wait"
        assert all(int(after) >= 1 for after in retry_after) and len(retry_after) == 5
        assert codes == ["queue_full"] * 5
        never = server.post("completions", prompt="hello", n=9)
        assert never.status_code == 400 and "9 choices" in never.json()["error"]["message"]
        requests = [Request(str(i), (7, 8), SamplingParams(max_tokens=3, seed=i)) for i in range(5)]
        assert len(SamplingClient([server.url], concurrency=5).generate(requests)) == 5


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(stream: bool) -> None:
    with running(step_sec=0.2) as server:  # a complete response would take longer than the test waits
        body = {"prompt": "hello", "max_tokens": 380, "n": 3, "stream": stream, "top_k": 2, "stop": "zzzz"}
        server.model.stop_bias = -1e9  # a response never ends by itself
        data = json.dumps(body).encode()
        address = server.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1]))) as connection:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            wait_for(lambda: len(server.generator.scheduler.running) == 3)
        wait_for(lambda: not server.generator.scheduler.running)
        assert server.client.get(f"{server.url}/health").status_code == 200


def test_engine_failure_is_told_to_everyone() -> None:
    with running(step_sec=0.01) as server:
        server.model.fail_at = 20
        server.model.stop_bias = -1e9
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: answers.append(server.post("completions", prompt="hello", max_tokens=300)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [answer.status_code for answer in answers] == [500] * 4
        assert all("the model broke" in answer.json()["error"]["message"] for answer in answers)
        health = server.client.get(f"{server.url}/health")
        assert health.status_code == 503 and "the model broke" in health.json()["reason"]
        with pytest.raises(ServerFailure, match="the model broke"):
            SamplingClient([server.url]).generate([Request("a", (1,), SamplingParams(max_tokens=3))])
        with pytest.raises(UserError, match="503"):
            SamplingClient([server.url]).check()
        server.stop()
        server.thread.join(60)
        assert [str(error) for error in server.ended] == ["RuntimeError: the model broke"]


def test_stopping_lets_running_requests_finish() -> None:
    with running(step_sec=0.01) as server:
        server.model.stop_bias = -1e9
        answers: list[httpx.Response] = []
        thread = threading.Thread(
            target=lambda: answers.append(server.post("completions", prompt="hello", max_tokens=60))
        )
        thread.start()
        wait_for(lambda: bool(server.generator.scheduler.running))
        server.stop()
        thread.join(60)
        assert answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] == 60


def test_signal_ends_serve() -> None:
    generator, config = make_generator()
    before = signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(60.0, lambda: os._exit(3))
    timer.start()
    serve(generator, SCHEMA, config, SamplingConfig(), ready=lambda running: os.kill(os.getpid(), signal.SIGTERM))
    timer.cancel()
    assert signal.getsignal(signal.SIGTERM) is before
    assert generator.error is not None


def test_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"server.port={port}"):
            check_port("127.0.0.1", port)
        generator, config = make_generator(port=port)
        with pytest.raises(UserError, match=f"server.port={port}"):
            serve(generator, SCHEMA, config, SamplingConfig())
    check_port("127.0.0.1", port)


def test_client_settings_are_checked() -> None:
    with pytest.raises(UserError, match=r"server\.urls is empty"):
        SamplingClient([])
    with pytest.raises(UserError, match="http://"):
        SamplingClient(["localhost:8000"])
    with pytest.raises(UserError, match="does not answer"):
        SamplingClient(["http://127.0.0.1:9"]).check()
    with pytest.raises(ServerFailure, match="given up after 1 tries"):
        SamplingClient(["http://127.0.0.1:9"], max_tries=1).generate([Request("a", (1,))])


def test_choices_of_one_seed_are_those_of_single_requests(server: Server) -> None:
    several = server.post("completions", prompt="hello", seed=77, n=3, max_tokens=10).json()["choices"]
    for i, choice in enumerate(several):
        one = server.post("completions", prompt="hello", seed=derive_seed(77, i), max_tokens=10).json()["choices"][0]
        assert choice["text"] == one["text"]


def test_a_thousand_requests_against_a_queue_of_64() -> None:
    """As many requests as rows and queue hold are answered, the others are told to retry, and none is lost."""
    with running(max_batch=64, max_queue=64) as server:
        server.model.go.clear()
        body = {"prompt": "hello", "max_tokens": 4, "seed": 1}

        async def all_of_them() -> list[int]:
            limits = httpx.Limits(max_connections=1000)
            async with httpx.AsyncClient(timeout=120, limits=limits, trust_env=False) as client:

                async def one() -> int:
                    status = (await client.post(f"{server.url}/v1/completions", json=body)).status_code
                    statuses.append(status)
                    if len(statuses) == 1000 - 128:
                        server.model.go.set()
                    return status

                return await asyncio.gather(*(one() for _ in range(1000)))

        statuses: list[int] = []
        asyncio.run(all_of_them())
        assert (statuses.count(200), statuses.count(429)) == (128, 872)
        wait_for(lambda: not server.generator.scheduler.running and not server.generator.jobs)


def test_64_streams_some_of_which_are_left_leave_no_row() -> None:
    with running(step_sec=0.002, max_batch=64, max_cache_tokens=64 * 400) as server:
        server.model.stop_bias = -1e9

        async def one(client: openai.AsyncOpenAI, i: int) -> int:
            stream = await client.completions.create(
                model="steerlm", prompt=f"hello {i}", max_tokens=60, seed=i, stream=True
            )
            chunks = 0
            async for _ in stream:
                chunks += 1
                if i % 2 and chunks > i % 16:
                    await stream.close()
                    break
            return chunks

        async def all_of_them() -> list[int]:
            async with server.openai() as client:
                return await asyncio.gather(*(one(client, i) for i in range(64)))

        chunks = asyncio.run(all_of_them())
        assert all(chunks)
        wait_for(lambda: not server.generator.scheduler.running and not server.generator.jobs)
        assert server.post("completions", prompt="hello", max_tokens=2).status_code == 200


def test_what_a_format_writes_before_a_response_is_none_of_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of chats, whole and streamed, with the bytes of tokens; not of completions, whose prompt is no format's."""
    chat = {"messages": USER, "seed": 3, "max_tokens": 9, "logprobs": True}
    asked = {"prompt": "hello", "seed": 3, "max_tokens": 9, "logprobs": 0}
    with running() as server:
        before = server.client.post(f"{server.url}/v1/chat/completions", json=chat).json()["choices"][0]
        completed = server.client.post(f"{server.url}/v1/completions", json=asked).json()["choices"][0]["text"]
    text = before["message"]["content"]
    assert len(text) > 4 and len(completed) > 4
    monkeypatch.setattr(type(TEMPLATE), "response_prefix", text[:3])
    with running() as server:
        after = server.client.post(f"{server.url}/v1/chat/completions", json=chat).json()["choices"][0]
        assert after["message"]["content"] == text[3:]
        whole, rest = (bytes(sum((t["bytes"] for t in one["logprobs"]["content"]), [])) for one in (before, after))
        # A byte that is no character's is shown as one.
        assert rest == whole[sum(1 if char == "\ufffd" else len(char.encode()) for char in text[:3]) :]
        streamed = server.client.post(f"{server.url}/v1/chat/completions", json={**chat, "stream": True})
        lines = streamed.text.split("\n\n")
        parts = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines if line.startswith("data: {")]
        assert "".join(part["delta"].get("content") or "" for part in parts) == text[3:]
        shown = [token for part in parts if part["logprobs"] for token in part["logprobs"]["content"]]
        assert bytes(sum((token["bytes"] for token in shown), [])) == rest
        assert server.client.post(f"{server.url}/v1/completions", json=asked).json()["choices"][0]["text"] == completed

        # Commands ask servers for completions, and their prompts are of a format.
        ids = tuple(TOKENIZER.encode("hello"))
        params = SamplingParams(max_tokens=9, seed=3)
        (plain,) = SamplingClient([server.url]).generate([Request("a", ids, params)])
        (bare,) = SamplingClient([server.url]).generate([Request("b", ids, params, plain.text[:3])])
        assert len(plain.text) > 3 and bare.text == plain.text[3:] and bare.token_ids == plain.token_ids
