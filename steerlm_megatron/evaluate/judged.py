"""What both measures by an LLM judge share: the need for an endpoint, the account of its verdicts, its cost.

Owns: the keys and tables of these in a section. Does not own: the account itself (``llm_judge.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerlm_megatron.config.schema import Config
from steerlm_megatron.evaluate.intervals import Resamples
from steerlm_megatron.evaluate.llm_judge import LLMJudge, problems
from steerlm_megatron.evaluate.needs import ANSWERS, models_of
from steerlm_megatron.evaluate.protocol import Answers, Inputs, Material, Need, Section


def _no_endpoint(config: Config, inputs: Inputs | None) -> str | None:
    return "; ".join(problems(config)) or None


def _compared(config: Config, inputs: Inputs | None) -> str | None:
    if said := ANSWERS.lacking(config, inputs):
        return said
    several = len(models_of(config)) + len(config.evaluate.llm_judge.answers) > 1
    return None if several else "set two of evaluate.models or more, or evaluate.llm_judge.answers"


ENDPOINT = Need("an LLM judge", _no_endpoint)
COMPARED = Need("answers of several models to the same prompts", _compared)


def judged_answers(material: Material) -> dict[str, Answers]:
    """Return the answers that are judged, by model: those that were drawn, then those from files."""
    return {**material.answers, **material.outside}


def share(found: dict[str, Any], resamples: Resamples, counted: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the figure ``found`` of a share, with an interval also where all are alike.

    A share of 0 or 1 is the same in every draw, as if it were certain. Its interval is Wilson's (Journal of the
    American Statistical Association 22, 1927) of so many questions: up to z² / (n + z²) from the end, with z = 1.96.

    Args:
        counted: of each item of ``resamples`` whether it counts.
    """
    questions = len(np.unique(resamples.owner[counted]))
    if found["low"] == found["high"] == found["value"] and found["value"] in (0.0, 1.0):
        reach = 1.96**2 / (questions + 1.96**2)
        return found | ({"high": reach} if found["value"] == 0.0 else {"low": 1.0 - reach})
    return found


def judge_section(judge: LLMJudge, price_per_million: Sequence[float]) -> dict[str, Any]:
    """Return the keys of a section about the judge: its model, the verdicts that are missing, and the cost."""
    account = judge.account
    return {
        "judge_model": judge.model,
        "verdicts": {
            "malformed": account.malformed,
            "refused": account.refused,
            "asked_again": account.reasked,
            "identical": account.identical,
            "refusals": dict(account.refusals),
        },
        "cost": {
            "requests": account.requests,
            "cached": account.cached,
            "prompt_tokens": account.prompt_tokens,
            "completion_tokens": account.completion_tokens,
            "unmetered": account.unmetered,
            "seconds": round(account.seconds, 3),
            "price_per_million": list(price_per_million),
            "money": account.money(price_per_million),
        },
    }


def account_tables(section: Section) -> list[dict[str, Any]]:
    """Return the tables of what :func:`judge_section` returned."""
    said, cost = section["verdicts"], section["cost"]
    tables: list[dict[str, Any]] = [
        {
            "title": "Verdicts",
            "columns": ["malformed", "refused by the endpoint", "asked again", "equal answers, not asked"],
            "rows": [[said[key] for key in ("malformed", "refused", "asked_again", "identical")]],
            "words": ["Malformed and refused verdicts are in no figure."],
        },
        {
            "title": "What the judge took",
            "columns": ["requests", "answers of earlier runs", "prompt tokens", "completion tokens",
                        "seconds of the endpoint", "money"],
            "rows": [
                [cost[key] for key in
                 ("requests", "cached", "prompt_tokens", "completion_tokens", "seconds", "money")]
            ],
        },
    ]  # fmt: skip
    if said["refusals"]:
        rows = sorted(said["refusals"].items(), key=lambda row: -row[1])
        tables.append({"title": "Why it refused", "columns": ["reason", "verdicts"], "rows": [list(r) for r in rows]})
    return tables


def examples_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Return the table of a few answers with what the judge wrote about them, folded away."""
    return {"title": "What the judge wrote", "columns": list(columns), "rows": list(rows), "folded": True}
