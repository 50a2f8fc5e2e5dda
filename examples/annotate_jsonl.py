"""Score the responses of a JSONL file that has a prompt and a response per line.

    python examples/annotate_jsonl.py runs/ap pairs.jsonl scored.jsonl --prompt question --response answer

It shows how data of any form becomes conversation records (``steer.records``), how ``steerlm annotate`` scores them,
and how the values are joined to the lines that they belong to: the output has the lines of the input, in the same
order, each with ``attributes`` added. A line without a prompt or a response is an error that names the line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from steerlm_megatron.steer.messages import Message
from steerlm_megatron.steer.records import Conversation, read_records, write_records


def conversations(rows: Sequence[dict[str, Any]], prompt: str, response: str) -> Iterator[Conversation]:
    """Yield each row as a conversation of one turn, whose id is the line number."""
    for number, row in enumerate(rows, start=1):
        if not row.get(prompt) or not row.get(response):
            raise SystemExit(f"line {number}: {prompt} or {response} is missing or empty")
        yield Conversation(str(number), (Message("user", row[prompt]), Message("assistant", row[response])))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("checkpoint", help="a run folder of train_ap, a checkpoint or an export")
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--prompt", default="prompt", help="the key of the prompt")
    parser.add_argument("--response", default="response", help="the key of the response")
    options = parser.parse_args(arguments)
    lines = options.input.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_records(folder / "records.jsonl", conversations(rows, options.prompt, options.response))
        files = [f"input={folder / 'records.jsonl'}", f"output={folder / 'scored.jsonl'}", f"run_dir={folder / 'run'}"]
        command = [sys.executable, "-m", "steerlm_megatron", "annotate", f"checkpoint={options.checkpoint}", *files]
        if code := subprocess.run(command, check=False).returncode:
            raise SystemExit(code)  # the command has printed the reason
        scored = read_records(folder / "scored.jsonl")
        values = [record.messages[-1].attributes for record in scored]
    with options.output.open("w", encoding="utf-8") as out:
        for row, attributes in zip(rows, values, strict=True):
            out.write(json.dumps({**row, "attributes": attributes}, ensure_ascii=False) + "\n")
    print(f"{len(rows)} responses scored: {options.output}")


if __name__ == "__main__":
    main()
