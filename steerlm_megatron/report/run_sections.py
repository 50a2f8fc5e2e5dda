"""What a report says of runs beside their evaluation: what was trained on what, the levels before and after annotation
and bootstrapping, training curves and throughput, and how several runs compare.

Owns: the tables and their words. Does not own: the numbers (``stages/report_runs.py``, ``evaluate/comparison.py``), the
drawing (``plots.py``). Invariant: a section has the form of a measure's (``evaluate/protocol.py``), with ``plots``:
functions that draw, so that a report without pictures draws none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from steerlm_megatron.observe.progress import format_seconds
from steerlm_megatron.report.cost import compared_costs
from steerlm_megatron.report.words import number

Section = dict[str, Any]
Plot = tuple[str, Callable[[], str], bool]  # what it shows in words, what draws it, whether it is a wide one


def _plots() -> Any:
    """Return the module that draws, which takes half a second to import."""
    from steerlm_megatron.report import plots

    return plots


def run_sections(data: Mapping[str, Any]) -> list[Section]:
    """Return the sections of a single run that ``data``, the content of ``report.json``, has numbers for."""
    sections = []
    if data.get("distributions"):
        sections.append(distributions_section(data["distributions"]))
    if data.get("training"):
        sections.append(training_section({"": data["training"]}))
    if data.get("lineage"):
        sections.append(lineage_section({"": data["lineage"]}))
    return sections


def comparison_sections(found: Mapping[str, Any]) -> list[Section]:
    """Return the sections of a comparison: the runs, what differs in their configurations, and their figures."""
    sections = [_about(found), _configuration(found)]
    for section in found["sections"]:
        plots: list[Plot] = []
        if section["title"].startswith("Steering"):
            plots = [
                (
                    f"measured over requested {name}, by run",
                    partial(_drawn, "compared_steering_plot", name, runs),
                    False,
                )
                for name, runs in found["curves"].items()
            ]
        sections.append({**section, "plots": plots})
    if found["training"]:
        sections.append(training_section(found["training"]))
    if found["distributions"]:
        sections.append(_means_of_levels(found["distributions"]))
    if found.get("cost"):
        sections.append(compared_costs(found["cost"]))
    if found["lineage"]:
        sections.append(lineage_section(found["lineage"]))
    return sections


def _drawn(name: str, *arguments: Any) -> str:
    drawn: str = getattr(_plots(), name)(*arguments)
    return drawn


def _about(found: Mapping[str, Any]) -> Section:
    rows = [
        [one["name"], one["command"] or "–", one["status"] or "unknown", _moment(one["ended"]), one["judge"] or "none"]
        for one in found["about"]
    ]
    lacking = [f"{one['name']}: {line}" for one in found["about"] for line in one["lacking"]]
    return {
        "title": "The runs",
        "words": [*lacking, *found["words"]],
        "plots": [],
        "tables": [{"title": "", "columns": ["run", "command", "status", "ended", "measured by"], "rows": rows}],
    }


def _moment(ended: str | None) -> str:
    """Return when a run ended, to the minute."""
    return "–" if ended is None else ended[:16].replace("T", " ")


def _configuration(found: Mapping[str, Any]) -> Section:
    runs = found["runs"]
    rows = [
        [one["key"], *("not there" if one["values"][run] is None else one["values"][run] for run in runs)]
        for one in found["config"]
    ]
    keys = [row for row in rows if not row[0].startswith("version of ")]
    versions = [[row[0].removeprefix("version of "), *row[1:]] for row in rows if row[0].startswith("version of ")]
    tables: list[dict[str, Any]] = []
    if keys:
        tables.append({"title": "", "columns": ["key", *runs], "rows": keys})
    if versions:
        tables.append({"title": "Versions", "columns": ["library", *runs], "rows": versions, "folded": True})
    return {
        "title": "Configuration: what differs",
        "words": [] if keys else ["The configurations of the runs have the same values."],
        "plots": [],
        "tables": tables,
    }


def lineage_section(by_run: Mapping[str, Mapping[str, Any]]) -> Section:
    """Return what was trained on what; ``by_run`` has the lineage of each run, under an empty name if it is one."""
    tables = []
    for run, found in by_run.items():
        steps = [
            [
                step["name"], _command(step), ", ".join(step["from"]), _records(step), step["steps"],
                step["conversations"], step["tokens"], step["labels"], _time(step["seconds"]),
            ]
            for step in found["steps"]
        ]  # fmt: skip
        tables.append(
            {
                "title": run,
                "columns": ["step", "command", "made from", "records", "training steps", "conversations", "tokens",
                            "labels", "time"],
                "rows": steps,
                "folded": bool(run),
            }
        )  # fmt: skip
        if found["sources"]:
            tables.append(
                {
                    "title": f"{run}: sources and licences" if run else "Sources and licences",
                    "columns": ["source", "kind", "licence", "used by"],
                    "rows": [
                        [one["name"], one["kind"], one["licence"] or "not known here", one["used_by"]]
                        for one in found["sources"]
                    ],
                    "folded": bool(run),
                }
            )
    return {
        "title": "What was trained on what",
        "words": [
            "Records are those that a step read and those that it wrote. Conversations and tokens are those that "
            "training consumed, each as often as it was seen; labels are those of the training data. The licence of a "
            "model or corpus is the one that its publishers name."
        ],
        "plots": [],
        "tables": tables,
    }


def _command(step: Mapping[str, Any]) -> str:
    """Return a step's command, and its status where the step is not complete."""
    return step["command"] if step["status"] == "complete" else f"{step['command']} ({step['status']})"


def _records(step: Mapping[str, Any]) -> str:
    return "–" if step["in"] is None else f"{number(step['in'], 0)} → {number(step['out'], 0)}"


def _time(seconds: Any) -> str:
    return "–" if seconds is None else format_seconds(float(seconds))


def training_section(by_run: Mapping[str, Mapping[str, Any]]) -> Section:
    """Return training curves and throughput; ``by_run`` has the curves of each run by step, under an empty name if it
    is one run.
    """
    steps = list(dict.fromkeys(step for run in by_run.values() for step in run))
    plots: list[Plot] = [
        (
            f"loss over training steps of {step}",
            partial(
                _drawn, "training_plot", step, {run: found[step] for run, found in by_run.items() if step in found}
            ),
            False,
        )
        for step in steps
    ]
    several = len(by_run) > 1
    rows = [
        [
            step, *([run] if several else []), one["step"], _last(one["loss"]), _last(one["valid"]),
            one["tokens_per_sec"], one["step_sec"], one["peak_memory_gib"], _time(one["seconds"]),
        ]
        for step in steps
        for run, found in by_run.items()
        if (one := found.get(step)) is not None
    ]  # fmt: skip
    columns = ["step", *(["run"] if several else []), "training steps", "last loss", "last validation loss"]
    return {
        "title": "Training",
        "words": [
            "Losses are what each training minimises: per token for a language model, squared errors for a regression "
            "head. Tokens and seconds per step are medians over what was logged; memory is the most that one device "
            "held."
        ],
        "plots": plots,
        "tables": [
            {
                "title": "Throughput",
                "columns": [*columns, "tokens a second", "seconds per step", "memory, GiB", "time"],
                "rows": rows,
            }
        ],
    }


def _last(points: Sequence[Sequence[float]]) -> float | None:
    return float(points[-1][1]) if points else None


def distributions_section(found: Mapping[str, Mapping[str, Any]]) -> Section:
    """Return how often each level occurs in the training data of each step."""
    plots: list[Plot] = [
        (f"levels of {name} in the data of each step", partial(_drawn, "distributions_plot", name, steps), False)
        for name, steps in found.items()
    ]
    rows = [
        [name, step, one["mean"], sum(one["levels"]), *one["levels"]]
        for name, steps in found.items()
        for step, one in steps.items()
    ]
    top = max(len(one["levels"]) for steps in found.values() for one in steps.values())
    width = 4 + top
    return {
        "title": "Levels before and after annotation and bootstrapping",
        "words": [
            "The values of the training responses of each step, as levels: people's labels, then what the "
            "attribute-prediction model says of all responses, then of those that bootstrapping kept."
        ],
        "plots": plots,
        "tables": [
            {
                "title": "Responses by level",
                "columns": ["attribute", "step", "mean", "responses", *(f"level {level}" for level in range(top))],
                "rows": [[*row, *([None] * (width - len(row)))] for row in rows],
                "folded": True,
            }
        ],
    }


def _means_of_levels(by_run: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Section:
    keys = dict.fromkeys((name, step) for run in by_run.values() for name, steps in run.items() for step in steps)
    rows = []
    for name, step in keys:
        cells = [run.get(name, {}).get(step, {}) for run in by_run.values()]
        rows.append([name, step, *(one.get("mean") for one in cells)])
    names = dict.fromkeys(name for name, _ in keys)
    plots: list[Plot] = [
        (
            f"levels of {name} in the data of each run's last step that trained on it",
            partial(_drawn, "distributions_plot", name, _last_of_each(name, by_run)),
            False,
        )
        for name in names
    ]
    return {
        "title": "Levels in the training data",
        "words": ["The mean value of the training responses of each step. Plots are of the first four runs."],
        "plots": plots,
        "tables": [{"title": "Mean by step", "columns": ["attribute", "step", *by_run], "rows": rows, "folded": True}],
    }


def _last_of_each(name: str, by_run: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Mapping[str, Any]]:
    """Return the levels of an attribute in the last step of each run that has some, by ``run: step``."""
    found: dict[str, Mapping[str, Any]] = {}
    for run, attributes in by_run.items():
        if steps := attributes.get(name):
            step = list(steps)[-1]
            found[f"{run}: {step}"] = steps[step]
    return found
