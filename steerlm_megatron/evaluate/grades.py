"""The measure ``grades``: an LLM judge gives every answer a rating from 1 to 10.

Owns: which answers are graded, and the figures of the ratings. Does not own: a rating (``verdicts.py``), asking for it
(``llm_judge.py``). Invariants: models are compared over the questions that both have ratings of; an answer without a
rating is counted, and is in no figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from steerlm_megatron.evaluate.intervals import Floats, Resamples, verdict
from steerlm_megatron.evaluate.judged import ENDPOINT, account_tables, examples_table, judge_section, judged_answers
from steerlm_megatron.evaluate.llm_judge import Decision, LLMJudge
from steerlm_megatron.evaluate.needs import ANSWERS
from steerlm_megatron.evaluate.protocol import Material, Need, Section
from steerlm_megatron.evaluate.questions import Question, question_of
from steerlm_megatron.evaluate.verdicts import read_rating

Slot = tuple[int, int]  # a question and a turn of it


def grade(judge: LLMJudge, material: Material, questions: Sequence[Question]) -> dict[str, list[Decision[float]]]:
    """Return for every model the decision about each turn of each question, in the order of :func:`slots_of`."""
    slots, answers = slots_of(questions), judged_answers(material)
    asks = [
        judge.grade_prompt.messages(questions[q].turns(turn, {"answer": answers[name].turns(q)}))
        for name in answers
        for q, turn in slots
    ]
    decided = judge.decide(asks, read_rating, "judge: grades")
    return {name: decided[i * len(slots) : (i + 1) * len(slots)] for i, name in enumerate(answers)}


def slots_of(questions: Sequence[Question]) -> list[Slot]:
    """Return all turns of all questions."""
    return [(number, turn) for number, question in enumerate(questions) for turn in range(len(question.asked))]


class Grades:
    """See the module."""

    name = "grades"
    version = 1
    needs: tuple[Need, ...] = (ANSWERS, ENDPOINT)

    def run(self, material: Material) -> Section:
        """Return the section: mean ratings by model, category and turn, and the differences between models. Asks the
        judge.
        """
        judge = LLMJudge(material.config, material.folder)
        questions = [question_of(prompt) for prompt in material.prompts]
        slots, decisions = slots_of(questions), grade(judge, material, questions)
        ratings: dict[str, Floats] = {
            name: np.array([np.nan if d.verdict is None else d.verdict for d in found], dtype=np.float64)
            for name, found in decisions.items()
        }
        resamples = Resamples([question for question, _ in slots])
        section: Section = {
            "title": "Grades, by an LLM judge",
            "words": [
                f"{judge.model} rated each answer from 1 to 10, one at a time. A single rating depends on the judge's "
                "scale: compare models with each other, under one judge."
            ],
            "models": {name: resamples.mean(values) for name, values in ratings.items()},
            "differences": differences(ratings, resamples),
            "slices": _slices(ratings, slots, questions, resamples),
            **judge_section(judge, material.config.evaluate.llm_judge.price_per_million),
        }
        section["tables"] = [
            *_tables(section),
            *account_tables(section),
            _examples(decisions, slots, questions, material),
        ]
        return section


def differences(ratings: Mapping[str, Floats], resamples: Resamples) -> list[dict[str, Any]]:
    """Return for each pair of models the mean difference of their ratings of the same answers' questions, the later
    model's less the earlier one's, and what its interval says.
    """
    rows = []
    for first, second in combinations(ratings, 2):
        found = resamples.mean(ratings[second] - ratings[first])
        rows.append({"model": second, "against": first, "difference": found, "verdict": verdict(found)})
    return rows


def _slices(
    ratings: Mapping[str, Floats], slots: Sequence[Slot], questions: Sequence[Question], resamples: Resamples
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return mean ratings by category and by turn, where there are several."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    kinds = {
        "category": np.array([questions[number].category for number, _ in slots]),
        "turn": np.array([turn + 1 for _, turn in slots]),
    }
    for kind, values in kinds.items():
        names = sorted(set(values.tolist()))
        if len(names) > 1:
            found[kind] = {
                str(value): {m: resamples.mean(np.where(values == value, r, np.nan)) for m, r in ratings.items()}
                for value in names
            }
    return found


def _tables(section: Section) -> list[dict[str, Any]]:
    tables: list[dict[str, Any]] = [
        {"title": "Ratings", "columns": ["model", "mean rating"], "rows": [list(r) for r in section["models"].items()]}
    ]
    if section["differences"]:
        rows = [[row[key] for key in ("model", "against", "difference", "verdict")] for row in section["differences"]]
        tables.append(
            {"title": "Differences of ratings", "columns": ["model", "against", "difference", "which is"], "rows": rows}
        )
    for kind, of in section["slices"].items():
        names = list(section["models"])
        rows = [[value, *(found[name] for name in names)] for value, found in of.items()]
        tables.append({"title": f"Ratings by {kind}", "columns": [kind, *names], "rows": rows})
    return tables


def _examples(
    decisions: Mapping[str, Sequence[Decision[float]]],
    slots: Sequence[Slot],
    questions: Sequence[Question],
    material: Material,
) -> dict[str, Any]:
    """Return the table of each model's answers to the first questions."""
    answers, rows = judged_answers(material), list[list[Any]]()
    for number, (question, turn) in enumerate(slots[: material.config.evaluate.examples]):
        for name, found in decisions.items():
            answer = answers[name].turns(question)[turn]
            decision = found[number]
            rated = decision.reason if decision.verdict is None else decision.verdict
            rows.append([questions[question].asked[turn], name, answer, decision.text, rated])
    return examples_table(["question", "model", "answer", "what the judge wrote", "rating"], rows)
