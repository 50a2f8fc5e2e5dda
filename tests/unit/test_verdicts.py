"""Verdicts of an LLM judge: what is read, what is not, and what two orders say together."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerlm_megatron.evaluate.verdicts import (
    HIGHEST,
    LOWEST,
    PairOutcome,
    PairVerdict,
    read_choice,
    read_rating,
    read_scores,
)

A, B, TIE = PairVerdict(1.0, 0.0), PairVerdict(0.0, 1.0), PairVerdict(0.5, 0.5)
TEXT = st.text(st.characters(exclude_characters="[]", exclude_categories=["Cs"]), max_size=60)
SCORE = st.integers(10, 100).map(lambda tenths: tenths / 10)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8 7\nThe first is better.", (8, 7)),
        ("\n  8.5, 7 \nWhy", (8.5, 7)),
        ("10,1", (10, 1)),
        ("8\t7", (8, 7)),
        ("8 7 9", None),
        ("87", None),
        ("11 7", None),
        ("0 7", None),
        ("Scores: 8 7", None),
        ("8/10 7/10", None),
        ("The first is better.\n8 7", None),
        ("-8 7", None),
        ("", None),
    ],
)
def test_scores_stand_alone_in_the_first_line(text: str, expected: tuple[float, float] | None) -> None:
    assert read_scores(text) == (None if expected is None else PairVerdict(*expected))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Better is [[A]].", A),
        ("[[B]]", B),
        ("... [[ C ]]", TIE),
        ("[[A]], as said: [[A]]", A),
        ("[[A]] or [[B]]", None),
        ("[A]", None),
        ("[[D]]", None),
        ("[[a]]", None),
        ("A is better", None),
        ("", None),
    ],
)
def test_a_choice_is_one_mark(text: str, expected: PairVerdict | None) -> None:
    assert read_choice(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Rating: [[7]]", 7.0),
        ("[[7.5]]", 7.5),
        ("[[10]]", 10.0),
        ("[[7]] … [[7.0]]", 7.0),
        ("[[7]] or [[8]]", None),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[7/10]]", None),
        ("[7]", None),
        ("[[rating]]", None),
        ("", None),
    ],
)
def test_a_rating_is_one_mark(text: str, expected: float | None) -> None:
    assert read_rating(text) == expected


@given(TEXT, TEXT, SCORE, SCORE, st.sampled_from("ABC"))
def test_what_is_written_is_read_in_any_company(before: str, after: str, one: float, other: float, mark: str) -> None:
    assert read_rating(f"{before}[[{one:g}]]{after}") == one
    assert read_choice(f"{before}[[{mark}]]{after}") == {"A": A, "B": B, "C": TIE}[mark]
    assert read_scores(f"{one:g} {other:g}\n{after}") == PairVerdict(one, other)


@given(st.text(max_size=200))
def test_any_text_is_a_verdict_on_the_scale_or_none(text: str) -> None:
    rating, scores = read_rating(text), read_scores(text)
    assert rating is None or LOWEST <= rating <= HIGHEST
    assert scores is None or (min(scores.first, scores.second) >= LOWEST and scores.first <= HIGHEST)
    if not re.search(r"\[\[\s*[ABC]\s*\]\]", text):
        assert read_choice(text) is None


VERDICTS = st.one_of(st.none(), st.builds(PairVerdict, SCORE, SCORE), st.sampled_from([A, B, TIE]))


@given(VERDICTS, VERDICTS)
def test_an_outcome_turns_around_with_its_models(forward: PairVerdict | None, backward: PairVerdict | None) -> None:
    here, there = PairOutcome(forward, backward), PairOutcome(backward, forward)
    if forward is None or backward is None:
        assert here.result is None and here.agrees is None and all(map(math.isnan, here.points))
        return
    assert here.result is not None and there.result == 1 - here.result
    assert there.points == here.points[::-1] and here.agrees == there.agrees
    assert (here.result == 0.5) or here.agrees, "one that wins is preferred in both orders"


def test_two_orders_that_disagree_are_a_tie() -> None:
    assert PairOutcome(A, B).result == 1 and PairOutcome(A, B).agrees
    assert PairOutcome(B, A).result == 0
    assert PairOutcome(A, A).result == 0.5 and not PairOutcome(A, A).agrees, "always the first place"
    assert PairOutcome(A, TIE).result == 0.5 and not PairOutcome(A, TIE).agrees
    assert PairOutcome(TIE, TIE).result == 0.5 and PairOutcome(TIE, TIE).agrees
    assert PairOutcome(A, A).first_places == (2, 2) and PairOutcome(B, B).first_places == (0, 2)
    assert PairOutcome(A, TIE).first_places == (1, 1) and PairOutcome(None, B).first_places == (0, 1)
    scores = PairOutcome(PairVerdict(8, 7), PairVerdict(6, 9))
    assert scores.points == (8.5, 6.5) and scores.result == 1
