"""Generation by two ranks (tensor and pipeline parallel, gloo) equals generation by one, also through the server."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

VOCAB, TURN, LABEL = 100, 98, 99


class Tokenizer:
    """A tokenizer that writes ids as hexadecimal numbers."""

    vocab_size = VOCAB

    def encode(self, text: str) -> list[int]:
        return [int(part, 16) for part in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(f"{i:x}" for i in ids)

    @property
    def controls(self) -> dict[str, int]:
        return {"<extra_id_0>": 97, "<extra_id_1>": TURN, "<extra_id_2>": LABEL}

    def control_id(self, text: str) -> int:
        return self.controls[text]


def make(tensor: int, pipeline: int) -> Any:
    from steerlm_megatron.config.schema import EngineConfig, ModelConfig, ParallelConfig
    from steerlm_megatron.generate.generator import Generator
    from steerlm_megatron.generate.group import model_group
    from steerlm_megatron.model.gpt import build_model
    from steerlm_megatron.model.weights import initialize
    from steerlm_megatron.runtime import parallel
    from steerlm_megatron.steer.templates import SteerLMTemplate

    layout = ParallelConfig(tensor=tensor, pipeline=pipeline)
    parallel.initialize(layout, seed=1)
    config = ModelConfig(
        num_layers=2, hidden_size=64, num_heads=4, num_query_groups=2, ffn_hidden_size=96, init_std=0.2,
        sliding_window=11, full_attention_layers=[0], logit_softcap=5.0,
    )  # fmt: skip
    model = initialize(build_model(config, layout, EngineConfig(), VOCAB, gather_logits=True), config, VOCAB, seed=3)
    model.double()  # float64 gives the same float32 logits in every batch and layout
    from steerlm_megatron.generate.protocol import Limits

    # Few blocks and short chunks: prompts are cut, and sequences preempted.
    limits = Limits(6, max_sequence_tokens=96, max_cache_tokens=200, block_tokens=8, chunk_tokens=11)
    return Generator(model, Tokenizer(), SteerLMTemplate(), limits, model_group())


def more(i: int) -> dict[str, Any]:
    """Return parameters for which ranks must agree on more than one token a row."""
    if i % 5 == 1:
        return {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "logit_bias": ((7, 2.0),), "min_p": 0.01}
    if i % 5 == 3:
        return {"top_logprobs": 4, "prompt_logprobs": i % 4}
    return {}


def requests() -> list[Any]:
    from steerlm_megatron.generate.protocol import Request, SamplingParams

    rng = random.Random(0)
    return [
        Request(
            str(i),
            tuple(rng.randrange(97) for _ in range(rng.randint(1, 30))),
            SamplingParams(temperature=i % 2, max_tokens=rng.randint(1, 30), seed=i, logprobs=i % 3 == 0, **more(i)),
        )
        for i in range(20)
    ]


def through_server(generator: Any) -> Any:
    """Send one request to a server of this replica after some idle time; None on ranks other than the leader."""
    from steerlm_megatron.config.schema import SamplingConfig, ServerConfig
    from steerlm_megatron.serve.client import SamplingClient
    from steerlm_megatron.serve.server import Running, serve

    generator.group.heartbeat_sec = 0.1  # short, so that several come in the idle time
    answers: list[Any] = []

    def ask(running: Running) -> None:
        time.sleep(1.5)
        answers.extend(SamplingClient([running.url]).generate(requests()))
        running.stop()

    def ready(running: Running) -> None:
        threading.Thread(target=ask, args=(running,)).start()

    serve(generator, None, ServerConfig(port=0), SamplingConfig(), ready=ready)
    return answers


NUMBERS = ("logprobs", "top_logprobs", "prompt_logprobs", "prompt_top_logprobs")


def rounded(values: Any) -> Any:
    if isinstance(values, tuple):
        return [rounded(value) for value in values]
    return round(values, 3) if isinstance(values, float) else values


def plain(results: Sequence[Any]) -> list[Any]:
    return [
        [r.id, list(r.token_ids), r.text, r.finish_reason, *(rounded(getattr(r, name)) for name in NUMBERS)]
        for r in results
    ]


def main(out: str) -> None:
    from steerlm_megatron.errors import UserError
    from steerlm_megatron.generate.protocol import Request
    from steerlm_megatron.runtime import parallel

    rank, found = int(os.environ["RANK"]), {}
    for name, tensor, pipeline in (("tensor", 2, 1), ("pipeline", 1, 2)):
        generator = make(tensor, pipeline)
        found[name] = plain(generator.generate(requests()))
        try:
            generator.generate([Request("long", (1,) * 90)])
        except UserError as e:
            found[f"{name}_error"] = [str(e)]
    found["server"] = plain(through_server(generator))
    Path(f"{out}.{rank}").write_text(json.dumps(found))
    parallel.shutdown()


def run_ranks(out: Path) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[2]
    processes = []
    for rank in range(2):
        world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        env = {**os.environ, **world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = str(root)
        processes.append(
            subprocess.Popen(
                [sys.executable, __file__, str(out)],
                env=env,
                stderr=subprocess.STDOUT,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    try:
        logs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(logs)[-6000:]
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(2)]


@pytest.mark.distributed
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    by_rank = run_ranks(tmp_path / "found")
    expected = json.loads(json.dumps(plain(make(1, 1).generate(requests()))))
    assert len({json.dumps(item[1]) for item in expected}) > 10
    for found in by_rank:  # every rank gets the results
        assert found["tensor"] == expected
        assert found["pipeline"] == expected
        assert "max_sequence_tokens=96" in found["tensor_error"][0]
        assert found["pipeline_error"] == found["tensor_error"]
    assert by_rank[0]["server"] == expected
    assert by_rank[1]["server"] == []


if __name__ == "__main__":
    main(sys.argv[1])
