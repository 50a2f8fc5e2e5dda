"""What the server costs beside the engine: ``python benchmarks/serve.py [--rounds N] [--requests N]``.

One model of 10.6 million parameters (Llama's shape, fp32, random weights) answers the same requests in this process
(A), through HTTP as whole responses (B) and through HTTP as streams (C). They take turns A B C, B C A, …; a figure is
tokens per second, a ratio is taken within a round. The client is another process, so that its work is not the server's.
It counts chunks as well. With ``--json`` the figures are a line of JSON, by which two versions can be compared: run the
script alternately with ``PYTHONPATH`` at one and the other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

VOCAB, MAX_TOKENS = 1000, 96


def make() -> Any:
    """Return a generator over the model."""
    from steerlm_megatron.config.schema import EngineConfig, ModelConfig, ParallelConfig
    from steerlm_megatron.data.text.tokenizer import Tokenizer
    from steerlm_megatron.generate.generator import Generator
    from steerlm_megatron.generate.protocol import Limits
    from steerlm_megatron.model.gpt import build_model
    from steerlm_megatron.model.weights import initialize
    from steerlm_megatron.runtime import parallel
    from steerlm_megatron.steer.templates import SteerLMTemplate

    template = SteerLMTemplate(system="A chat.")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(3000)]
    texts = [" ".join(rng.choices(words, k=12)) for _ in range(500)]
    tokenizer = Tokenizer.train(texts, VOCAB, template.control_strings)
    layout = ParallelConfig()
    parallel.initialize(layout, seed=1)
    config = ModelConfig(num_layers=6, hidden_size=384, num_heads=6, num_query_groups=6, ffn_hidden_size=1024)
    model = build_model(config, layout, EngineConfig(), tokenizer.vocab_size, gather_logits=True)
    initialize(model, config, tokenizer.vocab_size, seed=3)
    limits = Limits(max_batch=32, max_sequence_tokens=256, max_cache_tokens=32 * 256, max_queue=4096)
    return Generator(model, tokenizer, template, limits)


def requests(count: int, vocab: int) -> list[dict[str, Any]]:
    """Return bodies with ragged prompts."""
    rng = random.Random(1)
    return [
        {
            "prompt": [rng.randrange(300, vocab - 8) for _ in range(rng.randint(8, 100))],
            "max_tokens": MAX_TOKENS, "temperature": 1.0, "top_k": 50, "seed": i,
        }
        for i in range(count)
    ]  # fmt: skip


def in_process(generator: Any, bodies: list[dict[str, Any]], number: int) -> None:
    """Answer all requests in this process."""
    from steerlm_megatron.generate.protocol import Request, SamplingParams

    generator.generate(
        [
            Request(f"{number}-{i}", tuple(b["prompt"]), SamplingParams(1.0, 50, 1.0, MAX_TOKENS, b["seed"]))
            for i, b in enumerate(bodies)
        ]
    )


async def client(host: str, port: int, bodies: list[dict[str, Any]], stream: bool) -> int:
    """Send all requests at once over one connection each, and return the number of chunks."""

    async def one(body: dict[str, Any]) -> int:
        reader, writer = await asyncio.open_connection(host, port, limit=2**22)
        data = json.dumps({**body, "stream": stream}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
        answer = await reader.read(-1)
        writer.close()
        assert answer.startswith(b"HTTP/1.1 200"), answer[:500]
        assert not stream or b"data: [DONE]" in answer
        return answer.count(b"data: ") if stream else 1

    return sum(await asyncio.gather(*(one(body) for body in bodies)))


def ask(url: str, path: Path, stream: bool) -> dict[str, float]:
    """Run the client in another process and return its seconds and chunks."""
    command = [sys.executable, __file__, "--client", url, "--bodies", str(path), *(["--stream"] if stream else [])]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def measure(rounds: int, count: int) -> dict[str, list[float]]:
    """Return tokens per second of each round, by contestant, and chunks per token of streams."""
    from steerlm_megatron.config.schema import SamplingConfig, ServerConfig
    from steerlm_megatron.serve.server import Running, serve

    generator = make()
    bodies = requests(count, generator.tokenizer.vocab_size)
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "bodies.json"
    path.write_text(json.dumps(bodies))
    found: dict[str, list[float]] = {"process": [], "whole": [], "stream": [], "chunks": []}

    def run(name: str, number: int) -> None:
        before = generator.sampled_tokens
        if name == "process":
            begin = time.perf_counter()
            in_process(generator, bodies, number)
            seconds = time.perf_counter() - begin
        else:
            listening, running = threading.Event(), list[Running]()

            def ready(one: Running) -> None:
                running.append(one)
                listening.set()

            # A server ends its generator, whose next server is one of the same model.
            generator.error = None
            server = threading.Thread(
                target=serve, args=(generator, None, ServerConfig(port=0), SamplingConfig(), ready)
            )
            server.start()
            listening.wait(60)
            told = ask(running[0].url, path, name == "stream")
            running[0].stop()
            server.join()
            generator.error = None
            seconds = told["seconds"]
            if name == "stream" and number >= 0:
                found["chunks"].append(told["chunks"] / (generator.sampled_tokens - before))
        if number >= 0:
            found[name].append((generator.sampled_tokens - before) / seconds)

    names = ["process", "whole", "stream"]
    try:
        for number in range(-1, rounds):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                run(name, number)
    finally:
        folder.cleanup()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--client")
    parser.add_argument("--bodies")
    parser.add_argument("--stream", action="store_true")
    given = parser.parse_args()
    if given.client:
        host, _, port = given.client.removeprefix("http://").rpartition(":")
        bodies = json.loads(Path(given.bodies).read_text())
        begin = time.perf_counter()
        chunks = asyncio.run(client(host, int(port), bodies, given.stream))
        print(json.dumps({"seconds": time.perf_counter() - begin, "chunks": chunks}))
        return
    torch.set_num_threads(1)
    found = measure(given.rounds, given.requests)
    if given.json:
        print(json.dumps(found))
        return
    for name in ("process", "whole", "stream"):
        ratios = [a / b for a, b in zip(found[name], found["process"], strict=True)]
        print(f"{name:8} {statistics.median(found[name]):7.0f} tokens/s, {statistics.median(ratios):.2f} of in process")
    print(f"chunks per token of streams: {statistics.median(found['chunks']):.2f}")


if __name__ == "__main__":
    main()
