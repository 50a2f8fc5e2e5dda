"""An exported model in llama.cpp: ``python -m benchmarks.llama_cpp_peer FOLDER RECORDS --source DIR --server FILE``.

It needs llama.cpp's sources (``convert_hf_to_gguf.py`` and ``gguf-py``) and its ``llama-server``. ``FOLDER`` is a
Hugging Face folder that ``steerlm export`` wrote; ``RECORDS`` a file of conversations. The folder is converted to GGUF
in float32 and served. For each conversation, and for the default attributes as well as the lowest levels, it compares

* the tokens that llama.cpp makes with the folder's chat template (its own Jinja) and tokenizer with ours,
* greedy responses of llama.cpp's chat endpoint (``chat_template_kwargs``) with those of ``steerlm generate``.

Responses may differ where two tokens are equally likely but for rounding: a different response is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.peer_servers import free_port, server, steerlm
from steerlm_megatron.stages.prompt_tokens import first_difference, levels_to_try, prompt_ids
from steerlm_megatron.stages.session import OpenedCheckpoint, open_checkpoint
from steerlm_megatron.steer.chat_template import variable
from steerlm_megatron.steer.records import Message, read_records, write_records


def convert(folder: Path, source: Path, target: Path) -> None:
    """Convert ``folder`` by llama.cpp's own script."""
    path = os.pathsep.join([str(source / "gguf-py"), os.environ.get("PYTHONPATH", "")])
    script = [sys.executable, "convert_hf_to_gguf.py", str(folder.resolve()), "--outfile", str(target)]
    subprocess.run([*script, "--outtype", "f32"], check=True, cwd=source, env={**os.environ, "PYTHONPATH": path})


def post(url: str, **body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


def compare_tokens(url: str, opened: OpenedCheckpoint, prompts: list[tuple[Message, ...]]) -> int:
    """Return how many prompts have other tokens in llama.cpp, and print the first difference."""
    wrong = tried = 0
    for messages in prompts:
        for levels in levels_to_try(opened.conditioned_on):
            plain = [{"role": message.role, "content": message.content} for message in messages]
            named = {variable(name): level for name, level in levels.items()}
            text = post(f"{url}/apply-template", messages=plain, chat_template_kwargs=named)["prompt"]
            found = post(f"{url}/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
            ours = prompt_ids(opened.tokenizer, opened.template, messages, opened.conditioned_on, levels)
            tried += 1
            if said := first_difference(found, ours, opened.tokenizer):
                wrong += 1
                if wrong == 1:
                    print(f"  {text!r}: {said}")
    print(f"tokens of prompts: {tried - wrong} of {tried} are equal", flush=True)
    return wrong


def compare_responses(url: str, folder: Path, records: Path, work: Path, levels: dict[str, int], tokens: int) -> int:
    """Return how many greedy responses differ, and print the first that does."""
    asked = [f"attributes.best.{name}={level}" for name, level in levels.items()]
    out = work / f"{len(list(work.iterdir()))}.jsonl"
    steerlm(
        "generate", f"checkpoint={folder}", f"input={records}", f"output={out}", "sampling=greedy", *asked,
        f"sampling.max_tokens={tokens}", "engine.precision=fp32", f"run_dir={out.with_suffix('')}",
    )  # fmt: skip
    different, total = 0, 0
    for record in read_records(out):
        *messages, ours = record.messages
        answer = post(
            f"{url}/v1/chat/completions",
            messages=[{"role": message.role, "content": message.content} for message in messages],
            chat_template_kwargs={variable(name): level for name, level in levels.items()},
            temperature=0, max_tokens=tokens, cache_prompt=False,
        )  # fmt: skip
        theirs = answer["choices"][0]["message"]["content"]
        total += 1
        if theirs.strip() != ours.content.strip():
            different += 1
            print(f"  ours {ours.content!r}, llama.cpp {theirs!r}")
    print(f"responses at {levels or 'the default levels'}: {total - different} of {total} are equal", flush=True)
    return different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("records", type=Path)
    parser.add_argument("--source", type=Path, required=True, help="llama.cpp's sources")
    parser.add_argument("--server", type=Path, required=True, help="its llama-server")
    parser.add_argument("--max-tokens", type=int, default=24)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="llama_cpp_peer_"))
    print(f"outputs and logs: {work}")
    opened = open_checkpoint(str(options.folder), "checkpoint", head="lm")
    convert(options.folder, options.source, work / "model.gguf")
    # llama.cpp's chat endpoint drops what it does not know of a message, such as the attributes of earlier responses.
    records = [
        replace(record, messages=tuple(replace(message, attributes=None) for message in record.messages))
        for record in read_records(options.records)
    ]
    plain = work / "records.jsonl"
    write_records(plain, records)
    prompts = []
    for record in records:
        last = max(i for i, message in enumerate(record.messages) if message.role == "user")
        prompts.append(record.messages[: last + 1])
    port = free_port()
    command = [str(options.server), "-m", str(work / "model.gguf"), "--host", "127.0.0.1", "--port", str(port)]
    # Keys and values in float32, as ours are: with halves, nearly equal tokens change places.
    exact = ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    with server([*command, "--jinja", "-c", "4096", "-np", "1", *exact], port, work / "llama_server.log") as url:
        wrong = compare_tokens(url, opened, prompts)
        for levels in ({}, *levels_to_try(opened.conditioned_on)[1:]):
            wrong += compare_responses(url, options.folder, plain, work, levels, options.max_tokens)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
