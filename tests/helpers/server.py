"""A server with a small model in a thread of this process, and what tests of the server ask of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai

from steerlm_megatron.config.schema import SamplingConfig, ServerConfig
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.generate.generator import Generator
from steerlm_megatron.generate.protocol import EngineDead, Limits, Request, SamplingParams
from steerlm_megatron.serve.scoring import ScorerLike
from steerlm_megatron.serve.server import Running, serve
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Message
from steerlm_megatron.steer.templates import SteerLMTemplate
from tests.helpers.fake_model import FakeModel, limits

SCHEMA = AttributeSchema.from_dict(
    {
        "name": "test",
        "names": ["quality", "toxicity", "humor"],
        "max_level": 9,
        "quality": "quality",
        "best": {"quality": 9, "toxicity": 0},
    }
)
TEMPLATE = SteerLMTemplate(system="A chat.")
TOKENIZER = Tokenizer.train(
    [f"hello world, how are you today {i}? quality:{i % 10},toxicity:0" for i in range(100)],
    400,
    TEMPLATE.control_strings,
)
USER = [{"role": "user", "content": "hello"}]


@dataclass
class Server:
    url: str
    generator: Generator
    model: FakeModel
    client: httpx.Client
    stop: Callable[[], None]
    thread: threading.Thread
    ended: list[EngineDead]  # exceptions that serve() raised

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(f"{self.url}/v1/{path}", json=body)

    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)


def make_generator(model: FakeModel | None = None, **changes: Any) -> tuple[Generator, ServerConfig]:
    of_engine = {name: changes.pop(name) for name in tuple(changes) if name in Limits.__dataclass_fields__}
    bounds = limits(**{"max_sequence_tokens": 400, "max_cache_tokens": 8192, "max_batch": 16, **of_engine})
    config = ServerConfig(**{"port": 0, "max_queue": bounds.max_queue, "drain_sec": 60.0, **changes})
    model = model or FakeModel(TOKENIZER.vocab_size, TOKENIZER.control_id("<extra_id_1>"))
    return Generator(model, TOKENIZER, TEMPLATE, bounds), config


@contextmanager
def running(
    schema: AttributeSchema | None = SCHEMA,
    step_sec: float = 0.0,
    identity: dict[str, Any] | None = None,
    timeout_sec: float = 600.0,
    scorer: ScorerLike | None = None,
    **changes: Any,
) -> Iterator[Server]:
    generator, config = make_generator(**changes)
    model = generator.runner.model
    assert isinstance(model, FakeModel)
    model.step_sec = step_sec
    listening = threading.Event()
    found: list[Running] = []
    ended: list[EngineDead] = []

    def ready(server: Running) -> None:
        found.append(server)
        listening.set()

    def run() -> None:
        try:
            serve(
                generator, schema, config, SamplingConfig(max_tokens=12), ready=ready, linger_sec=60,
                timeout_sec=timeout_sec, identity=identity, scorer=scorer,
            )  # fmt: skip
        except EngineDead as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert listening.wait(60)
    with httpx.Client(timeout=120, trust_env=False) as client:
        try:
            yield Server(found[0].url, generator, model, client, found[0].stop, thread, ended)
        finally:
            found[0].stop()
            thread.join(90)
            assert not thread.is_alive()


def expected(messages: list[Message], levels: dict[str, int], seed: int, max_tokens: int, **params: Any) -> Any:
    """Return the result of an in-process generator."""
    prefix = TEMPLATE.prefix(messages, SCHEMA, SCHEMA.complete(levels))
    ids = tuple(TOKENIZER.encode_segments(prefix)[0])
    sampling = SamplingParams(top_k=50, max_tokens=max_tokens, seed=seed, **params)
    return make_generator()[0].generate([Request("x", ids, sampling)])[0]


def wait_for(condition: Callable[[], bool], timeout_sec: float = 60.0) -> None:
    end = time.monotonic() + timeout_sec
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)
