"""The parts of ``gpu_session.sh`` that measure, and the summary of all of them.

    python -P benchmarks/gpu_parts.py env|train|annotate|step|decode|kernels|summary --json FILE [--until TIME] [--tiny]

It runs with the repository's root on PYTHONPATH. Invariant: a finding is in the file as soon as it is made, so a part
that is stopped leaves what it has measured, and an error is a finding like any other. Modules of the project are
imported by the functions that measure them: where one cannot be imported, the other parts still say what they find.
Owns: what the machine is, the command line and the summary. ``gpu_train.py``, ``gpu_decode.py`` and ``gpu_kernels.py``
have the other parts.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_common import Findings, copy_rate, product_rate
from benchmarks.gpu_decode import part_decode
from benchmarks.gpu_kernels import part_kernels, varlen_attention
from benchmarks.gpu_train import part_benchmark, part_step

# ---- env: the machine


def part_env(findings: Findings) -> None:
    """Note versions, and what the memory and the matrix units of this very card reach."""
    findings.note("python", sys.version.split()[0])
    findings.note("torch", f"{torch.__version__} cuda {torch.version.cuda} cudnn {torch.backends.cudnn.version()}")
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        memory, kind = f"{card.total_memory / 2**30:.1f} GiB", f"sm_{card.major}{card.minor}"
        findings.note("gpu", f"{card.name}, {memory}, {kind}, {card.multi_processor_count} SMs")
        findings.note("nccl", str(torch.cuda.nccl.version()))
    names = "megatron-core deepspeed triton numpy transformers pydantic fastapi msgspec hydra-core pytest".split()
    findings.note("versions", {name: version(name) for name in names})
    findings.measure("import steerlm_megatron.cli", lambda: importlib.import_module("steerlm_megatron.cli").__name__)
    findings.measure("varlen_attn parameters", lambda: list(varlen_attention()[1]))
    findings.measure("copy GB/s (read + written)", partial(copy_rate, findings.tiny))
    findings.measure("gemm TFLOP/s bf16", lambda: round(product_rate(findings.tiny) / 1e12, 2))


def version(name: str) -> str:
    """Return the version of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "MISSING"


# ---- summary

ENDINGS = {0: "ok", 99: "skipped, no time", 124: "stopped at its limit", 137: "killed at its limit"}


def part_summary(file: Path, work: Path) -> None:
    """Put the findings of all parts into one file, and print what is asked first."""
    everything: dict[str, Any] = {"parts": {}}
    endings = work / "parts.tsv"
    for line in endings.read_text().splitlines() if endings.exists() else []:
        name, code, seconds = line.split("\t")
        everything["parts"][name] = {"rc": int(code), "seconds": int(seconds)}
    for path in sorted(work.glob("*.json")):
        try:
            everything[path.stem] = json.loads(path.read_text())
        except ValueError:
            everything[path.stem] = {"ERROR": "its file is not JSON"}
    if (work / "junit.xml").exists():
        everything["gpu tests"] = gpu_tests(work / "junit.xml")
    file.write_text(json.dumps(everything, indent=1, default=str))
    bar = "=" * 100
    print(bar, *summary_lines(everything), bar, sep="\n")


def gpu_tests(junit: Path) -> dict[str, Any]:
    """Return state, seconds and message of each test."""
    cases = {}
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        state, message = ("passed", "") if bad is None else (bad.tag, bad.get("message", ""))
        seconds = float(case.get("time", 0))
        cases[case.get("name", "")] = {"state": state, "seconds": seconds, "message": message[:600]}
    return cases


def summary_lines(everything: dict[str, Any]) -> Iterable[str]:
    """Yield the lines of the table that ends the output."""
    for name, part in everything["parts"].items():
        yield f"{name:20} {part['seconds']:4d} s  {ENDINGS.get(part['rc'], 'rc ' + str(part['rc']))}"
    env, tests = everything.get("env", {}), everything.get("gpu tests", {})
    rates = f"copy {env.get('copy GB/s (read + written)')} GB/s | gemm {env.get('gemm TFLOP/s bf16')} TFLOP/s"
    yield f"{env.get('gpu', 'no GPU')} | torch {env.get('torch')} | {rates}"
    for name, case in tests.items():
        if case["state"] != "passed":
            yield f"TEST {case['state']:7} {name}: {case['message'][:200]}"
    states = [case["state"] for case in tests.values()]
    if states:
        yield f"gpu tests: {', '.join(f'{states.count(state)} {state}' for state in sorted(set(states)))}"
    for name in ("train_1b", "train_1b_small", "train_1b_ap", "annotate"):
        part = everything.get(name)
        if part is not None:
            keys = ("tokens/s", "x faster than", "MFU of 989 TFLOP/s", "memory GiB", "ERROR")
            yield f"{name}: " + "; ".join(f"{key} {str(part[key])[:300]}" for key in keys if key in part)
    for name in ("step", "decode", "kernels"):
        for key, value in everything.get(name, {}).items():
            if isinstance(value, dict):
                yield from measurement_lines(f"{name} | {key}", value)
            elif "ERROR" in str(value) or "skipped" in str(value):
                yield f"{name} | {key}: {str(value)[:200]}"


def measurement_lines(title: str, found: dict[str, Any]) -> Iterable[str]:
    """Yield a measurement on one line, and the main figures of its profile below."""
    left_out = ("profile", "build s", "useful", "micro_batches")
    yield f"{title}: " + ", ".join(f"{key} {value}" for key, value in found.items() if key not in left_out)
    profile = found.get("profile")
    if profile:
        kernels, waits = profile["kernels"], profile["host waits"]
        yield f"    busy {profile['busy share']:.0%} of {profile['span ms']} ms, {kernels} kernels, waits {waits}"
        yield from ("    " + line for line in profile["by kind"][:6])


PARTS: dict[str, Callable[[Findings, list[str]], None]] = {
    "env": lambda findings, _: part_env(findings),
    "train": partial(part_benchmark, "train_packed"),
    "annotate": partial(part_benchmark, "annotate"),
    "step": lambda findings, _: part_step(findings),
    "decode": lambda findings, _: part_decode(findings),
    "kernels": lambda findings, _: part_kernels(findings),
}


def main() -> None:
    usage = "%(prog)s PART --json FILE [--until TIME] [--tiny] [-- arguments of the benchmark (train, annotate)]"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=usage)
    parser.add_argument("part", choices=[*PARTS, "summary"])
    parser.add_argument("--json", type=Path, required=True, help="the file of the findings")
    parser.add_argument("--until", type=float, default=float("inf"), help="when to end, in seconds since 1970")
    parser.add_argument("--traces", type=Path, default=os.environ.get("OUT", tempfile.gettempdir()), help="folder")
    parser.add_argument("--work", type=Path, help="summary: the folder of the parts' files")
    parser.add_argument("--tiny", action="store_true", help="small models, which a CPU runs in seconds")
    own, rest = sys.argv[1:], []
    if "--" in own:
        cut = own.index("--")
        own, rest = own[:cut], own[cut + 1 :]
    args = parser.parse_args(own)
    if args.part == "summary":
        part_summary(args.json, args.work or args.json.parent)
    else:
        PARTS[args.part](Findings(args.json, args.until, args.traces, args.tiny), rest)


if __name__ == "__main__":
    main()
