"""What each step of a run cost, as a report shows it.

Owns: the section ``cost`` of ``report.json``, its table and its sentences. Does not own: the figures
(``observe/cost.py``). Invariant: what a step did not do, such as drawing responses, is a dash and not a zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steerlm_megatron.observe.cost import combined
from steerlm_megatron.observe.progress import format_seconds

HEADER = (
    "step", "devices", "time", "device-seconds", "of it work", "tokens", "drawn", "FLOP", "FLOP/s a device",
    "memory, GiB", "latency: mean, p50, p95",
)  # fmt: skip
WORDS = (
    "A device is a GPU or, without one, a process on CPUs. Device-seconds: from a step's start to its end, over all "
    "devices and all attempts. Work: training and validation, scoring, drawing; the rest is starting, reading, loading "
    "and writing.",
    "Tokens: those that a model computed, without padding. FLOP: by formula (docs/cost.md), and FLOP/s over the "
    "seconds of work alone. Memory: the highest peak of any device, allocated on a GPU or resident in a process. "
    "Latency: seconds of a response from when it was begun, while others were drawn beside it.",
)
_NONE = "–"
_SCALES = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def cost_data(steps: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the section ``cost`` of ``report.json``: the costs of the ``steps``, and their ``total``."""
    return {"steps": {name: dict(cost) for name, cost in steps.items()}, "total": combined(list(steps.values()))}


def cost_table(cost: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page shows: a header, a row per step and one of them all, and what is counted in words."""
    rows = [_row(name, one) for name, one in cost["steps"].items()]
    return {"header": HEADER, "rows": [*rows, _row("all steps", cost["total"])], "words": WORDS}


def compared_costs(by_run: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return the section of a comparison about costs; ``by_run`` has the costs of each run's steps."""
    steps = list(dict.fromkeys(step for run in by_run.values() for step in run))
    each = [[step, *_row(run, found[step])] for step in steps for run, found in by_run.items() if step in found]
    return {
        "title": "What the runs cost",
        "words": list(WORDS),
        "plots": [],
        "tables": [
            {
                "title": "All steps",
                "columns": ["run", *HEADER[1:]],
                "rows": [_row(run, combined(list(found.values()))) for run, found in by_run.items()],
            },
            {"title": "Step by step", "columns": ["step", "run", *HEADER[1:]], "rows": each, "folded": True},
        ],
    }


def cost_line(cost: Mapping[str, Any]) -> str:
    """Return the cost of a run in one line for a terminal."""
    total = cost["total"]
    devices = f"{total['devices']} device{'s' if total['devices'] != 1 else ''} ({total['device']})"
    rate = total["flops_per_device_sec"]
    said = [f"{total['device_sec']:,.0f} device-seconds on {devices}, {total['work_device_sec']:,.0f} of them work"]
    if total["flops"]:
        said.append(f"{scaled(total['flops'])}FLOP by formula" + (f", {scaled(rate)}FLOP/s a device" if rate else ""))
    said.append(f"peak memory {total['peak_memory_gib']:.2f} GiB")
    return f"Cost: {'; '.join(said)}"


def scaled(value: float) -> str:
    """Return a number with three digits and the prefix of a unit: ``1.23 T``."""
    for size, prefix in _SCALES:
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def _row(name: str, cost: Mapping[str, Any]) -> list[str]:
    tokens, rate, latency = cost["tokens"], cost["flops_per_device_sec"], cost["latency_sec"]
    return [
        name,
        str(cost["devices"]),
        format_seconds(cost["wall_sec"]),
        f"{cost['device_sec']:,.1f}",
        f"{cost['work_device_sec']:,.1f}",
        f"{cost['useful_tokens']:,}" if cost["useful_tokens"] else _NONE,
        f"{tokens['drawn']:,}" if tokens.get("drawn") else _NONE,
        scaled(cost["flops"]).rstrip() if cost["flops"] else _NONE,
        scaled(rate).rstrip() if rate else _NONE,
        f"{cost['peak_memory_gib']:.2f}",
        _latency(latency) if latency else _NONE,
    ]


def _latency(latency: Mapping[str, Any]) -> str:
    shown = [latency["mean"], latency["p50"], latency["p95"]]
    return ", ".join(_NONE if seconds is None else f"{seconds:.3g} s" for seconds in shown)
