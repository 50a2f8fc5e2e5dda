"""What an LLM judge wrote, read as a verdict; two verdicts on a pair of answers, combined into one outcome.

Owns: the forms of a verdict (docs/judges.md) and the rule for two orders. Does not own: asking (``llm_judge.py``).
Invariant: a verdict is what the judge wrote in the agreed form, once and without contradiction, or it is None. Nothing
is guessed from other words of the judge.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

LOWEST, HIGHEST = 1.0, 10.0  # the scale of scores and ratings in both protocols
_NUMBER = r"\d{1,2}(?:\.\d+)?"
_TWO_SCORES = re.compile(rf"\s*({_NUMBER})(?:\s*,\s*|\s+)({_NUMBER})\s*")
_CHOICE = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_RATING = re.compile(rf"\[\[\s*({_NUMBER})\s*\]\]")


@dataclass(frozen=True)
class PairVerdict:
    """What a judge says of two answers, as it saw them. ``first`` and ``second`` are points: scores of 1 to 10, or 1
    and 0 for a choice, 0.5 each for a tie.
    """

    first: float
    second: float

    @property
    def prefers(self) -> int:
        """1: the first answer; -1: the second; 0: neither."""
        return (self.first > self.second) - (self.first < self.second)


def read_scores(text: str) -> PairVerdict | None:
    """Return the two scores in the first line of ``text`` that is not blank, such as ``8 7`` or ``8.5, 7``.

    This is the form of Vicuna's evaluation: the scores of the first and of the second answer stand alone in a line
    before the explanation. None if the line holds anything else, or a number outside of 1 to 10.
    """
    line = next((line for line in text.splitlines() if line.strip()), "")
    found = _TWO_SCORES.fullmatch(line)
    if found is None:
        return None
    first, second = float(found[1]), float(found[2])
    return PairVerdict(first, second) if _on_scale(first) and _on_scale(second) else None


def read_choice(text: str) -> PairVerdict | None:
    """Return the choice in ``text``: ``[[A]]`` for the first answer, ``[[B]]`` for the second, ``[[C]]`` for a tie
    (MT-bench, arXiv 2306.05685). None if there is no such mark, or if there are different ones.
    """
    marks = set(_CHOICE.findall(text))
    if len(marks) != 1:
        return None
    return {"A": PairVerdict(1.0, 0.0), "B": PairVerdict(0.0, 1.0), "C": PairVerdict(0.5, 0.5)}[marks.pop()]


def read_rating(text: str) -> float | None:
    """Return the rating of one answer in ``text``, such as ``[[7]]`` (MT-bench's grading of single answers). None if
    there is none, if there are different ones, or if it is outside of 1 to 10.
    """
    marks = {float(mark) for mark in _RATING.findall(text)}
    if len(marks) != 1:
        return None
    rating = marks.pop()
    return rating if _on_scale(rating) else None


def _on_scale(value: float) -> bool:
    return LOWEST <= value <= HIGHEST


READERS: dict[str, Callable[[str], PairVerdict | None]] = {"vicuna": read_scores, "mt_bench": read_choice}


@dataclass(frozen=True)
class PairOutcome:
    """The judgement of two models' answers to one question, each order judged once.

    ``forward`` is the verdict with the answer of the first model in the first place, ``backward`` with that of the
    second. None is a verdict that could not be read.
    """

    forward: PairVerdict | None
    backward: PairVerdict | None

    @property
    def result(self) -> float | None:
        """1: the first model wins; 0: the second; 0.5: a tie; None: a verdict is missing.

        A model wins if both orders prefer its answer. Two verdicts that do not agree are a tie: what they say depends
        on the place of an answer, and not on the answer alone.
        """
        if self.forward is None or self.backward is None:
            return None
        forward, backward = self.forward.prefers, -self.backward.prefers
        return 0.5 if forward != backward else (1 + forward) / 2

    @property
    def points(self) -> tuple[float, float]:
        """The mean points of the first and of the second model over both orders; NaN where a verdict is missing."""
        if self.forward is None or self.backward is None:
            return math.nan, math.nan
        return (self.forward.first + self.backward.second) / 2, (self.forward.second + self.backward.first) / 2

    @property
    def agrees(self) -> bool | None:
        """Whether both orders say the same of the two models; None if a verdict is missing."""
        if self.forward is None or self.backward is None:
            return None
        return self.forward.prefers == -self.backward.prefers

    @property
    def first_places(self) -> tuple[int, int]:
        """How many of the verdicts prefer the answer in the first place, and how many prefer one at all."""
        found = [verdict.prefers for verdict in (self.forward, self.backward) if verdict is not None]
        return found.count(1), len(found) - found.count(0)
