"""Routes beside completions: the tokenizer's, and the scoring of conversations beside drawing."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from steerlm_megatron.generate.between_steps import BetweenSteps
from steerlm_megatron.generate.group import LocalGroup
from steerlm_megatron.generate.protocol import EngineDead, QueueFull, RequestFailed, ShuttingDown
from steerlm_megatron.serve.scoring import ScoreQueue, TakingTurns
from steerlm_megatron.steer.records import Conversation, Message
from tests.helpers.server import SCHEMA, TEMPLATE, TOKENIZER, USER, Server, running, wait_for


class Scorer:
    """Gives each assistant message its length and its place, and notes which conversations came together."""

    schema = SCHEMA

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.asked, self.go = threading.Event(), threading.Event()
        self.go.set()

    def score(
        self, conversations: Sequence[Conversation], progress: Callable[[int], None] | None = None
    ) -> list[Mapping[int, Mapping[str, float]]]:
        self.asked.set()
        assert self.go.wait(60)
        if progress is not None:
            progress(1)
        self.batches.append(len(conversations))
        if any("broken" in m.content for c in conversations for m in c.messages):
            raise ZeroDivisionError("of one conversation")
        return [
            {
                i: {"quality": float(len(m.content)), "humor": float(i)}
                for i, m in enumerate(c.messages)
                if m.role == "assistant"
            }
            for c in conversations
        ]


def talk(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(scorer=Scorer()) as one:
        yield one


def ask(server: Server, path: str, **body: Any) -> Any:
    head = {"Content-Type": "application/json"}
    return server.client.post(f"{server.url}{path}", content=json.dumps(body), headers=head)


def test_tokens_of_texts_and_chats(server: Server) -> None:
    text = "hello wörld <extra_id_1>"
    body = ask(server, "/tokenize", prompt=text, add_special_tokens=False, return_token_strs=True).json()
    ids = TOKENIZER.encode(text)
    assert body == {
        "count": len(ids),
        "max_model_len": 400,
        "tokens": ids,
        "token_strs": [TOKENIZER.decode([i]) for i in ids],
    }
    assert ask(server, "/detokenize", tokens=ids).json() == {"prompt": text}
    chat = {"messages": [*talk("hello", "hi"), *USER], "attributes": {"humor": 3}}
    tokens = ask(server, "/tokenize", **chat).json()["tokens"]
    messages = [Message("user", "hello"), Message("assistant", "hi"), Message("user", "hello")]
    assert tokens == TOKENIZER.encode_segments(TEMPLATE.prefix(messages, SCHEMA, SCHEMA.complete({"humor": 3})))[0]
    drawn = ask(server, "/v1/chat/completions", **chat, max_tokens=5, seed=1, return_token_ids=True).json()
    again = ask(server, "/v1/completions", prompt=tokens, max_tokens=5, seed=1, return_token_ids=True).json()
    assert drawn["usage"] == again["usage"] and drawn["choices"][0]["token_ids"] == again["choices"][0]["token_ids"]
    info = server.client.get(f"{server.url}/tokenizer_info").json()
    assert info["vocab_size"] == TOKENIZER.vocab_size and info["hash"] == TOKENIZER.hash
    assert info["stop_token_ids"] == sorted(server.generator.vocabulary.stop_ids) and info["eos_token"] is None


def test_conversations_get_values(server: Server) -> None:
    one = ask(server, "/v1/score", messages=talk("hello", "hi there", "more", "ok")).json()
    assert one["object"] == "list" and [item["index"] for item in one["data"]] == [0]
    assert one["data"][0]["values"] == [
        {"message": 1, "attributes": {"quality": 8.0, "humor": 1.0}},
        {"message": 3, "attributes": {"quality": 2.0, "humor": 3.0}},
    ]
    answer = ask(server, "/v1/chat/completions", messages=USER, max_tokens=12, seed=3).json()["choices"][0]["message"]
    several = [{"messages": [*USER, {**answer, "content": "x" + answer["content"]}]}, {"messages": talk("a", "b")}]
    data = ask(server, "/v1/score", conversations=several).json()["data"]
    assert [item["values"][0]["attributes"]["quality"] for item in data] == [len(answer["content"]) + 1, 1]
    (model,) = server.client.get(f"{server.url}/v1/models").json()["data"]
    assert model["scored_attributes"] == ["quality", "toxicity", "humor"]
    assert 'endpoint="/v1/score",status="200"' in server.client.get(f"{server.url}/metrics").text


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/tokenize", {}, "prompt", "prompt, which is text, or messages"),
        ("/tokenize", {"prompt": "x", "messages": USER}, "prompt", "one of the two"),
        ("/tokenize", {"prompt": "x", "attributes": {"humor": 1}}, "attributes", "belong to messages"),
        ("/tokenize", {"messages": USER, "attributes": {"humour": 1}}, "attributes", "humour"),
        ("/tokenize", {"prompt": "x", "colour": 1}, "colour", "unknown parameter"),
        ("/tokenize", {"prompt": "x", "model": "gpt"}, "model", "not served here"),
        ("/tokenize", {"prompt": "\ud800"}, None, "Unicode"),
        ("/detokenize", {"tokens": [99999]}, "tokens", "99999"),
        ("/detokenize", {"tokens": "x"}, "tokens", "list of token ids"),
        ("/v1/score", {}, "messages", "messages, of one conversation, or conversations"),
        ("/v1/score", {"messages": USER}, "messages", "no assistant message"),
        ("/v1/score", {"messages": talk("a", " ")}, "messages", "without text"),
        ("/v1/score", {"messages": talk("a", "\ud800")}, "messages", "Unicode"),
        ("/v1/score", {"conversations": [{"messages": talk("a", "b")}, {"messages": USER}]}, "conversations", "[1]"),
        ("/v1/score", {"messages": [*talk("a", "b"), {"role": "system", "content": "s"}]}, "messages", "come first"),
        (
            "/v1/score",
            {"messages": [*USER, {"role": "assistant", "content": "b", "attributes": {"humor": 1}}]},
            "messages",
            "leave them out",
        ),
        ("/v1/score", {"conversations": [{"messages": talk("a", "b")}] * 1001}, "conversations", "more than can ever"),
    ],
)
def test_what_is_wrong_is_named(server: Server, path: str, body: dict[str, Any], param: str | None, words: str) -> None:
    response = ask(server, path, **body)
    assert response.status_code == (404 if param == "model" else 400)
    assert response.json()["error"]["param"] == param and words in response.json()["error"]["message"]


def test_one_that_cannot_be_scored_fails_alone(server: Server) -> None:
    failed = ask(server, "/v1/score", messages=talk("hello", "broken"))
    assert failed.status_code == 500 and "of one conversation" in failed.json()["error"]["message"]
    assert ask(server, "/v1/score", messages=talk("hello", "fine")).status_code == 200


def test_without_a_model_for_it_nothing_is_scored() -> None:
    with running() as server:
        response = ask(server, "/v1/score", messages=talk("a", "b"))
        assert response.status_code == 404 and "ap_checkpoint" in response.json()["error"]["message"]


def test_what_waits_goes_in_one_batch_and_drawing_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer()
    made: list[ScoreQueue] = []

    def note(queue: ScoreQueue, *given: Any) -> None:
        made.append(queue)
        begin(queue, *given)

    def waiting() -> int:
        return len(made[0]._waiting)

    begin = ScoreQueue.__init__
    monkeypatch.setattr(ScoreQueue, "__init__", note)
    with running(scorer=scorer, max_queue=20) as server:
        scorer.go.clear()
        with ThreadPoolExecutor(12) as pool:
            texts = [f"text {'x' * i}" for i in range(11)] + ["broken"]
            answers = [pool.submit(ask, server, "/v1/score", messages=talk("q", texts[0]))]
            assert scorer.asked.wait(60)
            answers += [pool.submit(ask, server, "/v1/score", messages=talk("q", text)) for text in texts[1:]]
            assert ask(server, "/v1/completions", prompt="hello", max_tokens=3).status_code == 200
            wait_for(lambda: waiting() == 11)
            full = ask(server, "/v1/score", conversations=[{"messages": talk("a", "b")}] * 10)
            assert full.status_code == 429 and full.headers["Retry-After"] == "1"
            scorer.go.set()
            found = [answer.result() for answer in answers]
        assert [answer.status_code for answer in found] == [200] * 11 + [500]
        for answer, text in zip(found[:11], texts, strict=False):
            assert answer.json()["data"][0]["values"][0]["attributes"]["quality"] == len(text)
        assert max(scorer.batches) >= 10, "those that waited went together"


def test_a_queue_that_ends_answers_what_waits() -> None:
    scorer = Scorer()
    queue = ScoreQueue(scorer, max_waiting=3)
    scorer.go.clear()
    queue.start()
    conversation = Conversation("a", (Message("user", "a"), Message("assistant", "bb")))
    futures = [queue.submit([conversation])]
    assert scorer.asked.wait(60)
    futures += [queue.submit([conversation]), queue.submit([conversation, conversation])]
    with pytest.raises(QueueFull):
        queue.submit([conversation])
    threading.Timer(0.05, scorer.go.set).start()
    queue.stop()
    assert futures[0].result(0)[0][1]["quality"] == 2.0
    for future in futures[1:]:
        with pytest.raises(EngineDead):
            future.result(0)
    with pytest.raises(EngineDead):
        queue.submit([conversation])
    alone = ScoreQueue(Scorer(), 3)
    alone.start()
    with pytest.raises(RequestFailed, match="ZeroDivisionError"):
        alone.submit([Conversation("b", (Message("assistant", "broken"),))]).result(60)
    alone.stop()


def test_what_nobody_waits_for_is_not_computed() -> None:
    """A client that leaves makes room; what is computed for it, or when requests are ended, is given up."""
    conversation = Conversation("a", (Message("user", "a"), Message("assistant", "bb")))
    scorer = Scorer()
    with running(scorer=scorer, max_queue=2) as server:
        scorer.go.clear()
        body = {"conversations": [{"messages": talk("hello", "one")}, {"messages": talk("hello", "two")}]}
        for left in range(1, 4):  # the second would not fit, if the first still waited
            scorer.asked.clear()
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{server.url}/v1/score", json=body, timeout=0.5, trust_env=False)
            noticed = f'endpoint="/v1/score",status="499"}} {left}.0'
            wait_for(lambda noticed=noticed: noticed in server.client.get(f"{server.url}/metrics").text)  # type: ignore[misc]
        scorer.go.set()
        assert ask(server, "/v1/score", **body).status_code == 200
    assert scorer.batches == [2], "only what is waited for was computed"
    queue = ScoreQueue(scorer, max_waiting=3)
    scorer.go.clear()
    scorer.asked.clear()
    queue.start()
    runs = queue.submit([conversation])
    assert scorer.asked.wait(60)
    waits = queue.submit([conversation])
    queue.abort()
    for future in (runs, waits):
        with pytest.raises(ShuttingDown):
            future.result(0)
    scorer.go.set()
    queue.stop()
    assert scorer.batches == [2]


def test_what_is_too_much_to_score_is_refused_before_any_work() -> None:
    with running(scorer=Scorer(), max_queue=4, max_body_bytes=2000) as server:
        answer = ask(server, "/v1/score", messages=talk(*["a"] * 10))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_many_responses")
        assert "5 responses" in answer.json()["error"]["message"]
        assert ask(server, "/v1/score", messages=talk(*["a"] * 8)).status_code == 200
        long = ["a" * 1500, *"bcdefgh"]  # four responses, each of which follows the long text
        assert ask(server, "/v1/score", messages=talk(*long)).status_code == 200
    with running(scorer=Scorer(), max_queue=40, max_body_bytes=2000) as server:
        answer = ask(server, "/v1/score", messages=talk("a" * 1500, *"bcdefghijklm"))
        assert answer.status_code == 400 and "characters together, more than 8000" in answer.json()["error"]["message"]


def between_steps(told: list[Any], failed: list[bool]) -> BetweenSteps:
    """Return what the leader of two ranks has; ``failed`` says of each piece of work whether the other rank fails."""
    group = LocalGroup()
    group.size = 2  # type: ignore[misc]
    asked: list[int] = []

    def least(value: int) -> int:
        asked.append(value)
        other = int(failed[(len(asked) - 1) // 2])
        return min(value, other if len(asked) % 2 else -other)

    group.least = least  # type: ignore[method-assign]
    return BetweenSteps(group, told.append, lambda: None, lambda: None)


def test_work_between_steps_ends_with_a_result_or_a_reason() -> None:
    """On several ranks the leader tells the others first; what fails on all ranks alike is an error of the request."""
    told: list[Any] = []
    scorer = Scorer()
    fine, broken = (Conversation("a", (Message("user", "a"), Message("assistant", text))) for text in ("bb", "broken"))
    between = between_steps(told, [False, True, False, True])
    between.compute = scorer.score
    assert not between.do_one()
    futures = [between.submit([fine]), between.submit([broken]), between.submit([fine]), between.submit([fine])]
    assert futures[2].cancel() and between.waits
    assert all(between.do_one() for _ in range(4)) and not between.waits and told == [[fine], [broken], [fine]]
    assert futures[0].result(0)[0][1]["quality"] == futures[3].result(0)[0][1]["quality"] == 2.0
    with pytest.raises(ZeroDivisionError):
        futures[1].result(0)
    between.follow([broken])  # of another rank, which goes on as well


@pytest.mark.parametrize("leader_fails", [False, True])
def test_work_that_some_ranks_could_not_do_ends_the_engine(leader_fails: bool) -> None:
    """The ranks may have gone different ways, so that their next message could wait for ever."""
    text = "broken" if leader_fails else "bb"
    work = [Conversation("a", (Message("user", "a"), Message("assistant", text)))]
    between = between_steps([], [not leader_fails])
    between.compute = Scorer().score
    lost, waits = between.submit(work), between.submit(work)
    for found in (between.do_one, lambda: lost.result(0)):
        with pytest.raises(EngineDead, match="on this rank alone" if leader_fails else "another rank could not"):
            found()
    between.end(ShuttingDown("the end"))
    for future in (waits, between.submit(work)):
        with pytest.raises(ShuttingDown, match="the end"):
            future.result(0)


def test_work_that_never_ends_has_an_outcome_when_the_engine_is_given_up() -> None:
    scorer = Scorer()
    scorer.go.clear()
    between = between_steps([], [False])
    between.compute = scorer.score
    future = between.submit([Conversation("a", (Message("user", "a"), Message("assistant", "bb")))])
    thread = threading.Thread(target=between.do_one)
    thread.start()
    assert scorer.asked.wait(60) and between.running
    between.end(EngineDead("given up"))
    with pytest.raises(EngineDead, match="given up"):
        future.result(0)
    scorer.go.set()
    thread.join(60)
    assert not between.running


def test_a_turn_is_a_few_conversations_or_one_long_one() -> None:
    def sizes(*lengths: int) -> list[int]:
        scored: list[int] = []
        group = LocalGroup()
        between = BetweenSteps(group, lambda _: None, lambda: None, lambda: None)

        class AnEngine:
            pass

        engine: Any = AnEngine()
        engine.between = between
        scorer = TakingTurns(Scorer(), engine)
        given = [Conversation(str(n), (Message("user", ""), Message("assistant", "x" * n))) for n in lengths]
        thread = threading.Thread(target=lambda: scored.extend(map(len, scorer.score(given, told.append))))
        told: list[int] = []
        thread.start()
        while thread.is_alive():
            between.do_one()
        thread.join()
        assert sum(told) == len(given) == len(scored)
        return told

    assert sizes(*[10] * 20) == [8, 8, 4]
    assert sizes(100_000, 10, 30_000, 5_000, 10) == [1, 2, 2]
