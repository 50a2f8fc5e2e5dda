"""A server of two ranks, of which one is stopped (SIGSTOP): the server says so, names the rank, and ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

TIMEOUT_SEC = 16.0


def main(address: str) -> None:
    from steerlm_megatron.config.schema import SamplingConfig, ServerConfig
    from steerlm_megatron.generate.protocol import EngineDead
    from steerlm_megatron.observe.log import setup_logging
    from steerlm_megatron.serve.server import Running, serve
    from tests.distributed.test_generate import make

    setup_logging(rank=int(os.environ["RANK"]))
    generator = make(tensor=2, pipeline=1)
    generator.group.heartbeat_sec = 0.5  # type: ignore[misc]

    def ready(running: Running) -> None:
        Path(f"{address}.new").write_text(running.url)
        os.replace(f"{address}.new", address)

    try:
        serve(generator, None, ServerConfig(port=0), SamplingConfig(), ready, timeout_sec=TIMEOUT_SEC)
    except EngineDead as error:
        print(f"ended: {error}", flush=True)
        os._exit(1)  # as stages/serve.py does: a thread waits below Python for the other rank


@pytest.mark.distributed
def test_a_stopped_rank_is_named_and_ends_the_server(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root, address = Path(__file__).parents[2], tmp_path / "url"
    ranks = []
    for rank in range(2):
        world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        env = {**os.environ, **world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = str(root)
        out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        ranks.append(
            subprocess.Popen([sys.executable, __file__, str(address)], env=env, stdout=out, stderr=subprocess.STDOUT)
        )
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(line.decode() for line in ranks[0].stdout or ()))
    reader.start()
    try:
        end = time.monotonic() + 120
        while not address.exists():
            assert time.monotonic() < end and ranks[0].poll() is None, "".join(said)
            time.sleep(0.1)
        url = address.read_text()
        body = {"prompt": [1, 2, 3], "max_tokens": 4}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60, trust_env=False).status_code == 200
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
        ranks[1].send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        while httpx.get(f"{url}/health", trust_env=False).status_code == 200:
            assert time.monotonic() - begin < TIMEOUT_SEC / 2
            time.sleep(0.1)
        assert ranks[0].wait(2 * TIMEOUT_SEC) == 1
        assert time.monotonic() - begin < TIMEOUT_SEC + 2, "the last line of answers is given some time"
        reader.join(10)
        (reason,) = [line for line in said if line.startswith("ended: ")]
        assert "have exchanged no message" in reason and "no answer from rank 1 (host" in reason
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait(30)
        reader.join(10)


if __name__ == "__main__":
    main(sys.argv[1])
