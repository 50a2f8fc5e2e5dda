"""Commands of ours, and servers of peers, as processes that comparisons start.

Owns: running a command, a free port, a server's start until it is healthy and its end. Does not own: what is compared.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def steerlm(*arguments: str) -> float:
    """Run a command and return its seconds."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "steerlm_megatron", *arguments], check=True)
    return time.perf_counter() - began


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def server(command: Sequence[str], port: int, log: Path) -> Iterator[str]:
    """Start a server, wait until it is healthy, and yield its address."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        for _ in range(1200):
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: see {log}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            raise SystemExit(f"{' '.join(command)} is not healthy after 10 minutes: see {log}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(120)
