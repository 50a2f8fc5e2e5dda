"""The table of an ablation: what each row's evaluations say, over prompts and seeds.

Owns: the section ``ablation`` of ``report.json``. Does not own: the steps (``ablation_steps.py``), intervals
(``evaluate/intervals.py``), how a report shows it (``steerlm_megatron/report``). Invariants: rows are compared on the
prompts that all of them answered; no verdict rests on a difference whose interval includes zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steerlm_megatron.evaluate.comparison import curves_of, slope
from steerlm_megatron.evaluate.intervals import Floats, mean_over_seeds, verdict
from steerlm_megatron.report.paper import TABLE_3
from steerlm_megatron.runtime.collectives import on_main
from steerlm_megatron.stages import step_work as work
from steerlm_megatron.stages.evaluation_files import EVALUATION_FILE, RESPONSES_FILE
from steerlm_megatron.stages.pipeline_run import Run
from steerlm_megatron.stages.session import Session

Response = Mapping[str, Any]  # a line of an evaluation's responses
Responses = Mapping[tuple[str, int], Sequence[Response]]  # (row, seed) → responses

# What an interval above or below zero means; another one tells nothing apart.
_GAINS = {"above": "higher", "below": "lower"}
_STEERING = {"above": "steers", "below": "the wrong way"}

# What a row is compared with: the first of these rows that the ablation has.
COMPARED = {
    "human": ("sft",),
    "predicted": ("human", "sft"),
    "bootstrapped": ("predicted", "human", "sft"),
    "generative": ("predicted", "human", "sft"),
    "shuffled": ("predicted", "human"),
    "partial": ("predicted", "human"),
}


def write(run: Run, here: Session, rows: Sequence[str], seeds: Sequence[int]) -> None:
    """Write the report of an ablation. Collective over the world."""

    def table() -> None:
        evaluated = {
            (row, seed): run.folder(f"evaluate_{row}_seed{seed}") for row in rows for seed in seeds
        }  # fmt: skip
        first = read_evaluation(next(iter(evaluated.values())))
        responses = {key: read_responses(folder) for key, folder in evaluated.items()}
        found = ablation(responses, rows, seeds, here.config.attributes.quality or "quality")
        found["ap"] = _prediction(run, seeds)
        work.write_results(run, here, {"judge": first.get("judge"), "ablation": found})

    on_main(table)


def read_evaluation(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's ``evaluation.json``."""
    found: dict[str, Any] = json.loads((folder / EVALUATION_FILE).read_text(encoding="utf-8"))
    return found


def read_responses(folder: Path) -> list[dict[str, Any]]:
    """Return the measured responses of an evaluation."""
    with (folder / RESPONSES_FILE).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _prediction(run: Run, seeds: Sequence[int]) -> dict[str, Any]:
    """Return per kind of model and attribute the squared errors of all seeds, and that of the constant predictor."""
    out: dict[str, Any] = {}
    for kind, variant in (("regression", "evaluate_ap"), ("generative", "evaluate_ap_generative")):
        if f"{variant}_seed{seeds[0]}" not in run.steps:
            continue
        found = [read_evaluation(run.folder(f"{variant}_seed{seed}"))["ap"] for seed in seeds]
        out[kind] = {
            name: {
                "mse_by_seed": [one[name]["mse"] for one in found],
                "mse": float(np.mean([one[name]["mse"] for one in found])),
                "constant_mse": row["constant_mse"],
                "n": row["n"],
            }
            for name, row in found[0].items()
        }
    return out


def ablation(responses: Responses, rows: Sequence[str], seeds: Sequence[int], quality: str) -> dict[str, Any]:
    """Return the table.

    Args:
        responses: per row and seed what its model answered: lines with ``prompt`` (an id), ``asked`` (levels, null for
            a model without attributes), ``best`` (whether the levels are the best ones, by which rows are compared),
            ``measured`` (values by attribute).
        rows: the rows in the order of the table.
        seeds: the seeds.
        quality: the attribute by which rows are compared.

    Returns:
        ``rows``: per row ``name``; ``quality``: mean, low and high of the 95 % interval, by_seed; ``gain``: the same of
        the difference from the row ``over``, with a verdict; ``steering``: per attribute the slope of the measured
        value per level asked, and their mean with a verdict; ``paper``: the paper's row. ``seeds``, ``prompts``,
        ``quality``.
    """
    at_best = {row: _by_prompt(responses, row, seeds, quality) for row in rows}
    prompts = sorted(set.intersection(*(set(by_prompt) for by_prompt in at_best.values())))
    tables = {row: np.array([by_prompt[prompt] for prompt in prompts]).T for row, by_prompt in at_best.items()}
    out = []
    for row in rows:
        entry: dict[str, Any] = {"name": row, "quality": _described(tables[row]), "paper": TABLE_3.get(row)}
        if (over := _compared(row, rows)) is not None:
            gain = _described(tables[row] - tables[over])
            entry |= {"over": over, "gain": gain | {"verdict": _GAINS.get(verdict(gain), "not told apart")}}
        if slopes := _slopes(responses, row, seeds):
            entry["steering"] = _steering(slopes)
        out.append(entry)
    return {"rows": out, "seeds": list(seeds), "prompts": len(prompts), "quality": quality}


def _compared(row: str, rows: Sequence[str]) -> str | None:
    kind, _, number = row.partition("_")
    if number:  # a later round of bootstrapping goes on from the one before
        return kind if number == "2" else f"{kind}_{int(number) - 1}"
    return next((other for other in COMPARED.get(row, ()) if other in rows), None)


def _described(values_SP: Floats) -> dict[str, Any]:
    """Return mean and interval of values [seeds, prompts], and the mean of each seed."""
    low, high = mean_over_seeds(values_SP)
    return {
        "mean": float(values_SP.mean()),
        "low": low,
        "high": high,
        "by_seed": [float(value) for value in values_SP.mean(axis=1)],
    }


def _by_prompt(responses: Responses, row: str, seeds: Sequence[int], name: str) -> dict[str, list[float]]:
    """Return per prompt the values of ``name`` at the best levels, one per seed. Prompts that lack a seed are left
    out.
    """
    found: dict[str, list[float]] = {}
    for seed in seeds:
        for one in responses[row, seed]:
            if one["best"]:
                found.setdefault(one["prompt"], []).append(float(one["measured"][name]))
    return {prompt: values for prompt, values in found.items() if len(values) == len(seeds)}


def _slopes(responses: Responses, row: str, seeds: Sequence[int]) -> dict[str, Floats]:
    """Return per attribute with a curve, [seeds, prompts] slopes: of the line by least squares through the measured
    values of a prompt's responses, over the levels asked. Prompts that lack a level or a seed are left out.
    """
    points: dict[str, dict[str, dict[int, list[tuple[int, float]]]]] = {}
    for seed in seeds:
        lines = responses[row, seed]
        best = next((one["asked"] for one in lines if one["best"]), None) or {}
        for one in lines:
            for name in curves_of(one["asked"] or {}, best):
                of_prompt = points.setdefault(name, {}).setdefault(one["prompt"], {})
                of_prompt.setdefault(seed, []).append((one["asked"][name], float(one["measured"][name])))
    whole = {name: _whole(prompts, len(seeds)) for name, prompts in points.items()}
    curves = {name: prompts for name, prompts in whole.items() if prompts}  # others were asked for at one level alone
    common = sorted(set.intersection(*curves.values())) if curves else []
    return {
        name: np.array([[slope(points[name][prompt][seed]) for prompt in common] for seed in seeds])
        for name in curves
        if common
    }


def _whole(prompts: Mapping[str, Mapping[int, Sequence[tuple[int, float]]]], seeds: int) -> set[str]:
    """Return the prompts that were asked at several levels with each seed."""
    return {
        prompt
        for prompt, by_seed in prompts.items()
        if len(by_seed) == seeds and all(len({level for level, _ in pairs}) > 1 for pairs in by_seed.values())
    }


def _steering(slopes: Mapping[str, Floats]) -> dict[str, Any]:
    def described(table: Floats) -> dict[str, Any]:
        found = _described(table)
        return found | {"verdict": _STEERING.get(verdict(found), "flat")}

    overall = described(np.mean(list(slopes.values()), axis=0))
    return {**overall, "attributes": {name: described(table) for name, table in slopes.items()}}
