"""The client for bulk sampling: failover, servers that come and go, other models, somebody else's servers."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.protocol import Request, Result, SamplingParams
from steerlm_megatron.generate.vocabulary import stop_ids_of
from steerlm_megatron.serve.client import SamplingClient
from steerlm_megatron.serve.upstream import Expected, ServerFailure, Upstream, message, refused_key, retry_after
from steerlm_megatron.stages.sampling import expected_of, identity
from steerlm_megatron.stages.session import OpenedCheckpoint
from steerlm_megatron.train.meta import CheckpointMeta
from tests.helpers.server import TEMPLATE, TOKENIZER, make_generator, running, wait_for
from tests.helpers.stand_in import OPENAI, VLLM, StandIn, standing_in

IDENTITY = {"step": 200, "tokenizer": TOKENIZER.hash, "training": "a" * 64}
EXPECTED = Expected(
    IDENTITY,
    TOKENIZER,
    frozenset(stop_ids_of(TOKENIZER, TEMPLATE)),
    TEMPLATE.stop_strings,
    TEMPLATE.response_suffix,
)


def requests(count: int, **params: Any) -> list[Request]:
    sampling = {"max_tokens": 8, "top_k": 5, **params}
    return [
        Request(str(i), tuple(TOKENIZER.encode(f"hello world {i}")), SamplingParams(seed=i, **sampling))
        for i in range(count)
    ]


def texts(results: list[Result]) -> list[tuple[str, str, str]]:
    return [(r.id, r.text, r.finish_reason) for r in results]


@pytest.fixture(scope="module")
def local() -> Callable[[list[Request]], list[tuple[str, str, str]]]:
    generator = make_generator()[0]
    return lambda wanted: texts(generator.generate(wanted))


@pytest.fixture(scope="module")
def ours() -> Iterator[str]:
    with running(identity=IDENTITY) as server:
        yield server.url


def client(*urls: str, **changes: Any) -> SamplingClient:
    return SamplingClient(urls, **{"concurrency": 8, "expected": EXPECTED, **changes})


@contextmanager
def dead_port() -> Iterator[tuple[str, list[float]]]:
    """Yield an address at which every connection is closed at once, and when each came."""
    came: list[float] = []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                came.append(time.monotonic())
                connection.close()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", came
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_one_server_that_answers_500_leaves_the_work_to_another(ours: str, local: Any) -> None:
    broken = StandIn()
    with standing_in(broken) as url:
        both = client(url, ours)
        both.check()
        broken.status = 500
        wanted = requests(60)
        assert texts(both.generate(wanted)) == local(wanted)
        assert sum(body["max_tokens"] == 8 for body in broken.asked) <= 12, "it is not asked again and again"
        with pytest.raises(ServerFailure, match=r"HTTP 500: no luck"):  # alone it ends the work, and says why
            client(url, expected=None).generate(wanted[:3])


def test_a_dead_server_is_tried_seldom_and_named(
    ours: str, local: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steerlm_megatron.serve.client.log.propagate", True)
    wanted = requests(100)
    with dead_port() as (url, came):
        some = client(url, ours)
        some.check()
        assert texts(some.generate(wanted)) == local(wanted)
        assert len(came) <= 6
    with pytest.raises(UserError, match=r"server.urls: .*does not answer"):
        client(url).check()


def test_a_server_that_is_killed_and_comes_back_is_used_again(local: Any) -> None:
    """Two servers, of which one breaks off and is started again at its address, give what one gives, and both work
    until the end.
    """
    first, second = StandIn(seconds=0.02), StandIn(seconds=0.02)
    wanted = requests(100)
    with standing_in(first) as stays, ExitStack() as stack:
        comes_and_goes = ExitStack()
        url = comes_and_goes.enter_context(standing_in(second))
        both = client(stays, url)
        both.check()
        ended: list[float] = []
        back: list[StandIn] = []

        def restart() -> None:
            wait_for(lambda: len(second.asked) > 15)
            second.break_after, first.seconds = 0, 1.0
            comes_and_goes.close()
            time.sleep(0.3)
            back.append(StandIn(seconds=0.02))
            stack.enter_context(standing_in(back[0], int(url.rpartition(":")[2])))

        thread = threading.Thread(target=restart)
        thread.start()
        results = both.generate(wanted, lambda _: ended.append(time.monotonic()))
        thread.join()
        assert texts(results) == local(wanted)
        assert len(back[0].asked) > 10, "the new one took its part"
        assert max(b - a for a, b in zip(ended, ended[1:], strict=False)) < 5, "nobody waited for the dead one"


def test_a_server_that_comes_back_with_another_model_gets_nothing(local: Any) -> None:
    good, before, other = StandIn(seconds=0.02), StandIn(seconds=0.02), StandIn(garbles=True)
    with standing_in(good) as stays, ExitStack() as first, ExitStack() as then:
        url = first.enter_context(standing_in(before))
        both = client(stays, url)
        both.check()

        def replace_it() -> None:
            wait_for(lambda: len(before.asked) > 8)
            before.break_after, good.seconds = 0, 1.0
            first.close()
            then.enter_context(standing_in(other, int(url.rpartition(":")[2])))

        thread = threading.Thread(target=replace_it)
        thread.start()
        wanted = requests(60)
        results = both.generate(wanted)
        thread.join()
        assert texts(results) == local(wanted)
        assert other.asked and all(body["max_tokens"] != 8 for body in other.asked), "its probe alone"
        assert "another tokenizer" in str(both.servers[1].excluded)
        with standing_in(other) as url, pytest.raises(UserError, match="another tokenizer"):
            client(stays, url).generate(wanted)


def test_a_server_that_hangs_loses_its_requests_to_the_others(ours: str, local: Any) -> None:
    hung = StandIn()
    with standing_in(hung) as url:
        both = client(url, ours, timeout_sec=300, ping_sec=0.5)
        both.check()
        hung.hangs = True
        begin, wanted = time.monotonic(), requests(30)
        assert texts(both.generate(wanted)) == local(wanted)
        assert time.monotonic() - begin < 30
        assert sum(body["max_tokens"] == 8 for body in hung.asked) <= 8


def test_an_unwell_request_is_tried_on_each_server_and_then_given_up() -> None:
    ways = [StandIn(), StandIn()]
    with standing_in(ways[0]) as one, standing_in(ways[1]) as other:
        both = client(one, other)
        both.check()
        for way in ways:
            way.status = 500
        with pytest.raises(ServerFailure, match="request 0: .*HTTP 500"):
            both.generate(requests(1))
        assert [sum(b["max_tokens"] == 8 for b in way.asked) for way in ways] == [1, 1]


@pytest.mark.parametrize(
    ("served", "words"),
    [
        ({**IDENTITY, "step": 100}, "step 100 instead of 200"),
        ({**IDENTITY, "tokenizer": "b" * 64}, "tokenizer bbbbbbbbbbbb instead of"),
        (None, "does not say which checkpoint"),
    ],
)
def test_another_model_of_our_own_server_is_noticed(served: Any, words: str) -> None:
    with running(identity=served) as server, pytest.raises(UserError, match=words):
        client(server.url).check()


@pytest.mark.parametrize("fields", [VLLM, VLLM - {"return_token_ids"}])
def test_another_tokenizer_of_a_foreign_server_is_noticed(fields: frozenset[str]) -> None:
    with standing_in(StandIn(fields=fields, garbles=True)) as url, pytest.raises(UserError, match="another tokenizer"):
        client(url).check()


def test_foreign_servers_with_different_models_are_noticed() -> None:
    other = StandIn()
    other.generator.runner.model.out.data.neg_()  # type: ignore[operator, union-attr]
    with standing_in(StandIn()) as one, standing_in(other) as two, pytest.raises(UserError, match="first token"):
        client(one, two).check()


@pytest.mark.parametrize("fields", [VLLM, VLLM - {"return_token_ids"}, VLLM - {"stop_token_ids"}, OPENAI])
def test_a_strict_foreign_server_gives_what_ours_gives(fields: frozenset[str], local: Any) -> None:
    way = StandIn(fields=fields)
    with standing_in(way) as url:
        foreign = client(f"{url}/v1")
        foreign.check()
        wanted = [*requests(5, temperature=0.0), *requests(5, top_k=0 if "top_k" not in fields else 5)]
        wanted = [replace(request, id=str(i)) for i, request in enumerate(wanted)]
        refused = len(way.refused)
        results = foreign.generate(wanted)
        assert texts(results) == local(wanted) and len(way.refused) == refused
        assert all(bool(r.token_ids) == ("return_token_ids" in fields) for r in results)
        assert all(r.completion_tokens and r.prompt_tokens for r in results)
        assert {body["model"] for body in way.asked} == {"exported/model"}
        if "top_k" not in fields:
            with pytest.raises(UserError, match=r"takes no top_k.*sampling.top_k=0"):
                foreign.generate(requests(1))
        with pytest.raises(UserError, match=r"max_model_len.*lower sampling.max_tokens"):
            foreign.generate(requests(1, max_tokens=399, top_k=0))


def test_what_a_server_is_told_and_says() -> None:
    with pytest.raises(UserError, match="serves exported/model and not mine"), standing_in(StandIn()) as url:
        client(url, model="mine").check()
    server = Upstream("http://x", None, EXPECTED)
    answer = httpx.Response(429, headers={"Retry-After": "3"}, json={"error": {"message": "full"}})
    assert (retry_after(answer), message(answer)) == (3.0, "full")
    assert retry_after(httpx.Response(503)) is None and message(httpx.Response(500, text="plain")) == "plain"
    assert "server.api_key_file" in str(refused_key("http://x", answer))
    assert server.body(requests(1)[0])["return_token_ids"] is True
    server.down("away")
    server.down("away")
    assert not server.has_room(time.monotonic()) and server.failures == 2
    server.up()
    assert server.is_up and not server.proven and server.has_room(time.monotonic() + 60)


def test_the_identity_of_a_checkpoint_is_that_of_its_export_and_of_no_other() -> None:
    config = {"num_layers": 2, "hidden_size": 8, "num_heads": 2, "ffn_hidden_size": 16}
    meta = CheckpointMeta(
        step=200, task="sft", model=config, vocab_size=400, schema=None, template=TEMPLATE.to_dict(),
        tokenizer_hash=TOKENIZER.hash, metric=2.5, config={"seed": 1}, data={"order": 1},
    )  # fmt: skip

    def opened(**changes: Any) -> OpenedCheckpoint:
        return OpenedCheckpoint(Path("x"), replace(meta, **changes), TOKENIZER, None, TEMPLATE)

    one = identity(opened())
    assert one["step"] == 200 and one["tokenizer"] == TOKENIZER.hash
    assert identity(opened(training_state=False, config={}, data={}, files={})) == one
    for changes in ({"step": 100}, {"metric": 2.4}, {"task": "acsft"}, {"label_counts": {"humor": 3}}):
        assert identity(opened(**changes)) != one
    expected = expected_of(opened())
    assert expected.identity == one and expected.stop_ids == EXPECTED.stop_ids
    assert (expected.stop_strings, expected.suffix) == (EXPECTED.stop_strings, EXPECTED.suffix)


def test_keys_are_sent_and_a_refused_one_is_named() -> None:
    with running(identity=IDENTITY, api_keys=["right", "other"]) as server:
        wanted = requests(2)
        assert len(client(server.url, api_key="right").generate(wanted)) == 2
        for key in (None, "wrong"):
            with pytest.raises(UserError, match=r"refuses the API key \(401.*server.api_key_file"):
                client(server.url, api_key=key).check()
