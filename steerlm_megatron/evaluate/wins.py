"""The measure ``wins``: an LLM judge compares the models' answers in pairs.

Owns: which answers are compared, and the figures of the outcomes. Does not own: a verdict (``verdicts.py``), asking for
it (``llm_judge.py``), the formulas of ratings (``elo.py``). Invariants: every pair of answers is judged in both orders;
what is not decided is counted, and is in no figure; questions are drawn as a whole for every interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from steerlm_megatron.config.schema import Config
from steerlm_megatron.evaluate.elo import (
    Games,
    bradley_terry,
    elo_ratings,
    expected_score,
    resampled_ratings,
    win_matrix,
)
from steerlm_megatron.evaluate.intervals import Floats, Resamples, figure, verdict
from steerlm_megatron.evaluate.judged import (
    COMPARED,
    ENDPOINT,
    account_tables,
    examples_table,
    judge_section,
    judged_answers,
    share,
)
from steerlm_megatron.evaluate.llm_judge import LLMJudge
from steerlm_megatron.evaluate.protocol import Material, Need, Section
from steerlm_megatron.evaluate.questions import Question, question_of
from steerlm_megatron.evaluate.verdicts import READERS, PairOutcome, PairVerdict

_TIE = PairVerdict(0.5, 0.5)


@dataclass(frozen=True)
class Game:
    """Two models' answers to one turn of one question, and what became of them. ``said`` is what the judge wrote of
    each order; None for equal answers, about which it was not asked.
    """

    first: str
    second: str
    question: int
    turn: int
    outcome: PairOutcome
    said: tuple[str, str] | None = None


def pairs_of(models: Sequence[str], baseline: str | None) -> list[tuple[str, str]]:
    """Return the pairs that are judged: all, or those of every model with the baseline."""
    if baseline is None:
        return list(combinations(models, 2))
    return [(name, baseline) for name in models if name != baseline]


def play(judge: LLMJudge, material: Material, questions: Sequence[Question], config: Config) -> list[Game]:
    """Return the games of all pairs; equal answers are a tie about which the judge is not asked."""
    settings = config.evaluate.llm_judge
    read = READERS[settings.protocol]
    slots: list[tuple[str, str, int, int]] = []
    asks: list[list[dict[str, str]]] = []
    same: set[int] = set()
    answers = judged_answers(material)
    for first, second in pairs_of(list(answers), settings.baseline):
        for number, question in enumerate(questions):
            one, other = (answers[name].turns(number) for name in (first, second))
            for turn in range(len(question.asked)):
                slots.append((first, second, number, turn))
                if one[: turn + 1] == other[: turn + 1]:
                    same.add(len(slots) - 1)
                    continue
                for a, b in ((one, other), (other, one)):
                    asks.append(judge.pair_prompt.messages(question.turns(turn, {"answer_a": a, "answer_b": b})))
    decided = iter(judge.decide(asks, read, "judge: pairs"))
    judge.account.identical = len(same)
    games = []
    for number, slot in enumerate(slots):
        if number in same:
            games.append(Game(*slot, PairOutcome(_TIE, _TIE)))
            continue
        forward, backward = next(decided), next(decided)
        outcome = PairOutcome(forward.verdict, backward.verdict)
        games.append(Game(*slot, outcome, (forward.text, backward.text)))
    return games


class Table:
    """Games as arrays, with the draws of questions that all intervals are made of."""

    def __init__(self, games: Sequence[Game], models: Sequence[str], questions: Sequence[Question]) -> None:
        self.models = list(models)
        place = {name: number for number, name in enumerate(models)}
        self.first = np.array([place[game.first] for game in games])
        self.second = np.array([place[game.second] for game in games])
        self.turn = np.array([game.turn for game in games])
        self.result: Floats = np.array(
            [np.nan if (r := game.outcome.result) is None else r for game in games], dtype=np.float64
        )
        self.points: Floats = np.array([game.outcome.points for game in games], dtype=np.float64).reshape(-1, 2)
        self.category = np.array([questions[game.question].category for game in games])
        self.resamples = Resamples([game.question for game in games])

    def of_model(self, model: int) -> Floats:
        """Return a model's result of each game, NaN in the games of others and where nothing is decided."""
        return np.where(self.first == model, self.result, np.where(self.second == model, 1.0 - self.result, np.nan))

    def rate(self, results: Floats) -> dict[str, Any]:
        """Return the mean of results with its interval."""
        return share(self.resamples.mean(results), self.resamples, ~np.isnan(results))


def counts_of(results: Floats) -> dict[str, int]:
    """Return how many of the results that are there are won, tied and lost."""
    return {name: int((results == value).sum()) for name, value in (("won", 1.0), ("tied", 0.5), ("lost", 0.0))}


def ratings(table: Table, k: float, orders: int, reference: int) -> dict[str, dict[str, Any]]:
    """Return per model its ratings: ``elo`` (the median over orders of the games, with the 2.5th and 97.5th
    percentiles), ``bradley_terry`` with its interval over questions, and ``expected``, the win rate against the model
    ``reference`` that follows from the Elo ratings.
    """
    decided = ~np.isnan(table.result)
    games = Games(len(table.models), table.first[decided], table.second[decided], table.result[decided])
    elo = elo_ratings(games, k, orders)
    low, median, high = np.percentile(elo, (2.5, 50.0, 97.5), axis=0)
    strengths = bradley_terry(win_matrix(games))
    draws = resampled_ratings(Games(len(table.models), table.first, table.second, table.result), table.resamples)
    found = {}
    for number, name in enumerate(table.models):
        played = int(((games.first_G == number) | (games.second_G == number)).sum())
        found[name] = {
            "elo": figure(median[number], low[number], high[number], played),
            "bradley_terry": table.resamples.figure(strengths[number], draws[:, number], played),
            "expected": float(expected_score(median[number], median[reference])),
        }
    return found


def pair_rows(table: Table, pairs: Sequence[tuple[str, str]], scored: bool) -> list[dict[str, Any]]:
    """Return per pair the counts, the win rate of its first model (ties half) with what it says, and how far the orders
    agree; with scores (``scored``) also their sums, and the first's in percent of the second's, as Vicuna's evaluation
    has them.
    """
    rows = []
    for first, second in pairs:
        mine = (table.first == table.models.index(first)) & (table.second == table.models.index(second))
        results = np.where(mine, table.result, np.nan)
        rate = table.rate(results)
        over = verdict({name: None if rate[name] is None else rate[name] - 0.5 for name in ("low", "high")})
        row = {
            "first": first, "second": second, **counts_of(results),
            "undecided": int((mine & np.isnan(table.result)).sum()), "win_rate": rate, "verdict": over,
        }  # fmt: skip
        if scored:
            points = np.where((mine & ~np.isnan(table.result))[:, None], table.points, 0.0)
            sums, draws = points.sum(axis=0), table.resamples.sums(points)
            with np.errstate(invalid="ignore", divide="ignore"):
                percent, percents = 100.0 * sums[0] / sums[1], 100.0 * draws[:, 0] / draws[:, 1]
            row |= {"points": sums.tolist(), "percent": table.resamples.figure(float(percent), percents, rate["n"])}
        rows.append(row)
    return rows


def position_bias(games: Sequence[Game], resamples: Resamples) -> dict[str, Any]:
    """Return how the place of an answer moved the judge.

    ``first_place`` is the share of verdicts for the answer in the first place, among those that prefer one. Since every
    pair is judged in both orders, it is 0.5 for a judge that does not look at the place. ``agreement`` is the share of
    pairs about which both orders say the same.
    """
    counts, agrees = np.zeros((len(games), 2)), np.full(len(games), np.nan)
    for number, game in enumerate(games):
        if game.said is not None:
            counts[number] = game.outcome.first_places
            agrees[number] = np.nan if (same := game.outcome.agrees) is None else same
    sums, draws = counts.sum(axis=0), resamples.sums(counts)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = resamples.figure(
            float(sums[0] / sums[1]) if sums[1] else np.nan, draws[:, 0] / draws[:, 1], int(sums[1])
        )
    first = share(found, resamples, counts[:, 1] > 0)
    over = verdict({name: first[name] - 0.5 for name in ("low", "high")})
    said = {"above": "prefers the first place", "below": "prefers the second place"}.get(over, over)
    agreement = share(resamples.mean(agrees), resamples, ~np.isnan(agrees))
    return {"first_place": first, "verdict": said, "agreement": agreement}


class Wins:
    """See the module."""

    name = "wins"
    version = 1
    needs: tuple[Need, ...] = (COMPARED, ENDPOINT)

    def run(self, material: Material) -> Section:
        """Return the section: counts, ratings and win rates by model, by pair and by category, and what the judge is
        worth. Asks the judge.
        """
        config, models = material.config, list(judged_answers(material))
        settings = config.evaluate.llm_judge
        judge = LLMJudge(config, material.folder)
        questions = [question_of(prompt) for prompt in material.prompts]
        games = play(judge, material, questions, config)
        table = Table(games, models, questions)
        pairs = pairs_of(models, settings.baseline)
        reference = models.index(settings.baseline or models[0])
        found = {
            name: {**counts_of(results), "win_rate": table.rate(results)}
            for name, results in ((name, table.of_model(number)) for number, name in enumerate(models))
        }
        for name, rated in ratings(table, settings.elo_k, settings.elo_orders, reference).items():
            found[name] |= rated
        slices = _slices(table)
        section: Section = {
            "title": "Wins, by an LLM judge",
            "words": [
                f"{judge.model} compared the answers of {len(models)} models to {len(questions)} questions in pairs "
                f"(protocol {settings.protocol}), each pair in both orders. A model wins if both orders prefer its "
                "answer; two verdicts that disagree are a tie. In win rates a tie is half a win. Elo is the median "
                f"over {settings.elo_orders} orders of the games, and its interval is that of the orders alone; the "
                "interval of Bradley–Terry ratings is that of the questions.",
            ],
            "protocol": settings.protocol,
            "models": found,
            "reference": models[reference],
            "pairs": pair_rows(table, pairs, settings.protocol == "vicuna"),
            "slices": slices,
            "position_bias": position_bias(games, table.resamples),
            **judge_section(judge, settings.price_per_million),
        }
        section["tables"] = [*_tables(section), *account_tables(section), _examples(games, questions, material)]
        return section


def _slices(table: Table) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the models' win rates by category and by turn, where there are several."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for kind, values in (("category", table.category), ("turn", table.turn + 1)):
        names = sorted(set(values.tolist()))
        if len(names) > 1:
            found[kind] = {
                str(name): {
                    model: table.rate(np.where(values == name, table.of_model(number), np.nan))
                    for number, model in enumerate(table.models)
                }
                for name in names
            }
    return found


def _tables(section: Section) -> list[dict[str, Any]]:
    """Return the tables of models, pairs, and slices."""
    reference, scored = section["reference"], section["protocol"] == "vicuna"
    tables: list[dict[str, Any]] = [
        {
            "title": "Models",
            "columns": ["model", "won", "tied", "lost", "win rate", "Elo", "Bradley–Terry",
                        f"win rate against {reference} by Elo"],
            "rows": [
                [name, *(row[key] for key in ("won", "tied", "lost", "win_rate", "elo", "bradley_terry", "expected"))]
                for name, row in section["models"].items()
            ],
        },
        {
            "title": "Pairs",
            "columns": ["model", "against", "won", "tied", "lost", "undecided", "win rate", "against a half"]
            + (["its scores in % of the other's"] if scored else []),
            "rows": [
                [row[key] for key in ("first", "second", "won", "tied", "lost", "undecided", "win_rate", "verdict")]
                + ([row["percent"]] if scored else [])
                for row in section["pairs"]
            ],
        },
    ]  # fmt: skip
    for kind, rows in section["slices"].items():
        names = list(section["models"])
        tables.append(
            {
                "title": f"Win rate by {kind}",
                "columns": [kind, *names],
                "rows": [[value, *(of[name] for name in names)] for value, of in rows.items()],
            }
        )
    bias = section["position_bias"]
    tables.append(
        {
            "title": "The place of an answer",
            "columns": ["share of verdicts for the first place", "preference", "pairs on which both orders agree"],
            "rows": [[bias["first_place"], bias["verdict"], bias["agreement"]]],
        }
    )
    return tables


def _examples(games: Sequence[Game], questions: Sequence[Question], material: Material) -> dict[str, Any]:
    answers, rows = judged_answers(material), list[list[Any]]()
    for game in games:
        if game.said is not None and len(rows) < material.config.evaluate.examples:
            one, other = (answers[name].turns(game.question)[game.turn] for name in (game.first, game.second))
            result = {1.0: game.first, 0.0: game.second, 0.5: "tie", None: "undecided"}[game.outcome.result]
            asked = questions[game.question].asked[game.turn]
            rows.append([asked, f"{game.first}: {one}", f"{game.second}: {other}", *game.said, result])
    columns = ["question", "an answer", "the other", "judged in this order", "in the other order", "better"]
    return examples_table(columns, rows)
