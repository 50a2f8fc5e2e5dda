"""Serve a trained model and ask it the same question at several levels of one attribute.

    python examples/serve_and_ask.py runs/sft2 --attribute humor --levels 0 4 9 --question "Tell me about rivers."

It shows the two sides of serving: ``steerlm serve`` as a separate process on a free port of this machine, and the
official ``openai`` client, which sends what OpenAI's API lacks (``attributes``) as ``extra_body``. An attribute that is
not named takes its best level. It needs the package ``openai``.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from openai import OpenAI


@contextmanager
def served(checkpoint: str) -> Iterator[str]:
    """Run a server over ``checkpoint`` inside the ``with``, and yield its address."""
    command = [sys.executable, "-m", "steerlm_megatron", "serve", f"checkpoint={checkpoint}", "server.port=0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    try:
        # With port 0 the system chooses a free port, and the server prints it once it answers there.
        said = []
        for line in server.stdout:
            said.append(line)
            if address := re.search(r"http://[\d.]+:\d+", line):
                break
        else:
            raise SystemExit(f"the server ended with exit code {server.wait()}:\n{''.join(said)}")
        threading.Thread(
            target=server.stdout.read, daemon=True
        ).start()  # drained, since a full pipe would block the server
        yield address.group(0)
    finally:
        server.terminate()
        server.wait()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("checkpoint", help="a run folder of train_sft, a checkpoint or an export")
    parser.add_argument("--question", default="Tell me something about rivers.")
    parser.add_argument("--attribute", default="humor")
    parser.add_argument("--levels", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--max-tokens", type=int, default=128)
    options = parser.parse_args(arguments)
    with served(options.checkpoint) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        for level in options.levels:
            answer = client.chat.completions.create(
                model="steerlm",
                messages=[{"role": "user", "content": options.question}],
                max_tokens=options.max_tokens,
                seed=0,
                extra_body={"attributes": {options.attribute: level}},
            )
            print(f"{options.attribute}={level}: {answer.choices[0].message.content}")


if __name__ == "__main__":
    main()
