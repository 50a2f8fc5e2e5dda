"""What a profile says of a GPU: how long it was busy, with which kernels, and where it waited."""

from __future__ import annotations

import gzip
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import synchronize

KINDS = (
    ("gemm", r"gemm|cutlass|nvjet|sm90_xmma|cublas|splitK|wgrad|dgrad"),
    ("attention", r"flash|fmha|attention|cudnn_generated|mha_"),
    ("triton (compiled norm, RoPE, SwiGLU)", r"^triton_"),
    ("adam, clipping", r"adam|multi_tensor|foreach|lpnorm"),
    ("copy, fill", r"memcpy|memset|copy|fill|cast"),
    ("index", r"index|gather|scatter|embedding|sort|radix"),
    ("nccl", r"nccl"),
    ("softmax, reduce", r"softmax|reduce|norm"),
    ("elementwise", r"elementwise"),
)  # what a kernel does, by the first pattern that is found in its name
Span = tuple[float, float, str]  # begin and end in µs, name
LARGEST_TRACE = 15 << 20  # bytes, compressed; a larger one is not kept


def profiled(function: Callable[[], object], trace: Path, times: int) -> dict[str, Any]:
    """Return what the device did in ``times`` calls: kernels by kind and by name, how long it idled, largest gaps."""
    cuda = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        start = time.perf_counter()
        for _ in range(times):
            function()
        synchronize()
        wall = time.perf_counter() - start
    profile.export_chrome_trace(str(trace))
    data = trace.read_bytes()
    trace.unlink()
    packed = gzip.compress(data, 6)
    if len(packed) < LARGEST_TRACE:
        trace.with_suffix(".json.gz").write_bytes(packed)
    events = [event for event in json.loads(data)["traceEvents"] if "dur" in event]
    on_device = ("kernel", "gpu_memcpy", "gpu_memset") if cuda else ("cpu_op",)
    spans = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("cat") in on_device)
    # Triton launches through the driver.
    host = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    out = {"wall ms": round(1e3 * wall / times, 2), **device_time(spans, times), **host_time(host, times)}
    print(f"--- {trace.stem}, per call")
    for key, value in out.items():
        print(f"{key}:", *(value if isinstance(value, list) else [value]), sep="\n    ")
    return out


def device_time(spans: Sequence[Span], times: int) -> dict[str, Any]:
    """Return how a device's time was spent, per call; ``spans`` are of ``times`` calls, in the order of their begin."""
    busy, end, last = 0.0, spans[0][0] if spans else 0.0, ""
    gaps: list[tuple[float, str, str]] = []
    for begin, stop, name in spans:
        if begin > end:
            gaps.append((begin - end, last[:50], name[:50]))
        if stop > end:
            busy += stop - max(begin, end)
            end, last = stop, name
    total = end - spans[0][0] if spans else 0.0
    kinds: dict[str, list[float]] = {}
    names: dict[str, list[float]] = {}
    for begin, stop, name in spans:
        kind = next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")
        for table, key in ((kinds, kind), (names, name[:110])):
            table.setdefault(key, []).append(stop - begin)

    def lines(table: dict[str, list[float]], count: int) -> list[str]:
        largest = sorted(((sum(parts), len(parts), key) for key, parts in table.items()), reverse=True)[:count]
        share = 100 / max(busy, 1e-9)
        return [f"{t / 1e3 / times:9.3f} ms {n / times:8.0f}x {share * t:5.1f}%  {key}" for t, n, key in largest]

    return {
        "span ms": round(total / 1e3 / times, 2), "busy ms": round(busy / 1e3 / times, 2),
        "busy share": round(busy / max(total, 1e-9), 4), "kernels": round(len(spans) / times),
        "gaps > 20 us": round(sum(gap[0] > 20 for gap in gaps) / times),
        "gaps ms": round(sum(gap[0] for gap in gaps) / 1e3 / times, 2),
        "largest gaps (us, after, before)": [(round(gap), a, b) for gap, a, b in sorted(gaps, reverse=True)[:8]],
        "by kind": lines(kinds, 12), "by name": lines(names, 28),
    }  # fmt: skip


def host_time(events: Sequence[dict[str, Any]], times: int) -> dict[str, Any]:
    """Return how often the host launched something and waited for the device, per call."""
    waits = [event for event in events if "Synchronize" in event["name"]]
    return {
        "host launches": round(sum("Launch" in event["name"] for event in events) / times),
        "host waits": round(len(waits) / times, 1),
        "host waits ms": round(sum(event["dur"] for event in waits) / 1e3 / times, 2),
    }
