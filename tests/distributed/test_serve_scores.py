"""A server of two ranks scores conversations between the steps of drawing, with the values and tokens of one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from steerlm_megatron.config.schema import ParallelConfig as P
from steerlm_megatron.config.schema import SamplingConfig, ServerConfig
from steerlm_megatron.generate.protocol import Request, SamplingParams
from steerlm_megatron.serve.scoring import TakingTurns
from steerlm_megatron.serve.server import Running, serve
from steerlm_megatron.steer.records import Conversation
from tests.distributed.test_generate import make
from tests.distributed.test_scoring import TOLERANCE, conversations, scorer, writer
from tests.helpers import corpora
from tests.helpers.dist import run_ranks

pytestmark = pytest.mark.distributed
LAYOUTS = {"TP2": P(tensor=2), "PP2": P(pipeline=2)}
PROMPTS = [[(7 * i + j) % 97 for j in range(1 + i)] for i in range(12)]


class Fragile:
    """A scorer that one text breaks, on every rank alike."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.schema = inner, inner.schema

    def score(self, given: Sequence[Conversation], progress: Callable[[int], None] | None = None) -> Any:
        if any("broken" in m.content for c in given for m in c.messages):
            raise ZeroDivisionError("of one conversation")
        return self.inner.score(given, progress)


def given() -> list[Conversation]:
    """Return the conversations that the server takes: all responses have a text."""
    every = [[m for m in one.messages if m.role == "assistant"] for one in conversations()]
    return [
        one for one, replies in zip(conversations(), every, strict=True)
        if replies and all(m.content.strip() for m in replies)
    ]  # fmt: skip


def body(one: Conversation) -> dict[str, Any]:
    return {"messages": [{"role": m.role, "content": m.content} for m in one.messages]}


def asked(url: str) -> dict[str, Any]:
    """Ask for responses, scores of many and of single conversations, and of a broken one, all at the same time."""
    several = given()
    with httpx.Client(timeout=120, trust_env=False) as client, ThreadPoolExecutor(24) as pool:

        def ask(path: str, **more: Any) -> Any:
            response = client.post(f"{url}{path}", json=more)
            return response.status_code, response.json()

        drawn = [pool.submit(ask, "/v1/completions", prompt=p, max_tokens=20, temperature=0) for p in PROMPTS]
        together = pool.submit(ask, "/v1/score", conversations=[body(one) for one in several])
        alone = [pool.submit(ask, "/v1/score", **body(one)) for one in several[:6]]
        broken = pool.submit(ask, "/v1/score", messages=[*body(several[0])["messages"], *BROKEN])
        found = {
            "drawn": [future.result() for future in drawn],
            "together": together.result(),
            "alone": [future.result() for future in alone],
            "broken": broken.result(),
        }
        found["health"] = client.get(f"{url}/health").status_code
    return found


BROKEN = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "broken"}]


def served(name: str, tokenizer: Path, kind: str) -> dict[str, Any]:
    layout = LAYOUTS[name]
    generator = make(layout.tensor, layout.pipeline)
    own = scorer(layout, tokenizer) if kind == "regression" else writer(layout, tokenizer, "expected")
    found: dict[str, Any] = {}

    def ready(running: Running) -> None:
        def work() -> None:
            try:
                found.update(asked(running.url))
            finally:
                running.stop()

        Thread(target=work).start()

    config = ServerConfig(port=0, max_queue=400)
    serve(generator, None, config, SamplingConfig(), ready, scorer=TakingTurns(Fragile(own), generator))
    return found


def by_one_rank(tokenizer: Path) -> dict[str, Any]:
    greedy = SamplingParams(max_tokens=20, temperature=0.0)
    results = make(1, 1).generate([Request(str(i), tuple(p), greedy) for i, p in enumerate(PROMPTS)])
    return {
        "drawn": [[r.prompt_tokens, r.completion_tokens, r.text] for r in results],
        "regression": scorer(P(), tokenizer).score(given()),
        "generative": writer(P(), tokenizer, "expected").score(given()),
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    corpora.tokenizer("trained").save(folder)
    return {**run_ranks(1, by_one_rank, folder)[0], "tokenizer": folder}


def values(answer: Any) -> list[dict[int, dict[str, float]]]:
    status, content = answer
    assert status == 200, content
    return [{one["message"]: one["attributes"] for one in entry["values"]} for entry in content["data"]]


@pytest.mark.parametrize("name, kind", [("TP2", "regression"), ("PP2", "regression"), ("TP2", "generative")])
def test_values_and_responses_are_those_of_one_rank(name: str, kind: str, alone: dict[str, Any]) -> None:
    wanted = alone[kind]
    assert len(wanted) > 8, "several turns of scoring"
    leader, other = run_ranks(2, served, name, alone["tokenizer"], kind)
    assert other == {}
    for (status, content), response in zip(leader["drawn"], alone["drawn"], strict=True):
        assert status == 200, content
        usage = content["usage"]
        assert [usage["prompt_tokens"], usage["completion_tokens"], content["choices"][0]["text"]] == response
    for found, one in zip(values(leader["together"]), wanted, strict=True):
        assert found.keys() == one.keys()
        for turn, attributes in one.items():
            assert found[turn] == pytest.approx(attributes, abs=TOLERANCE)
    for answer, one in zip(leader["alone"], wanted, strict=False):
        (found,) = values(answer)
        assert all(found[turn] == pytest.approx(attributes, abs=TOLERANCE) for turn, attributes in one.items())
    status, content = leader["broken"]
    assert status == 500 and "of one conversation" in content["error"]["message"]
    assert leader["health"] == 200
