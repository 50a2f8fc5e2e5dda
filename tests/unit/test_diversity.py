"""The measures of repetition and variety, against values worked by hand."""

from __future__ import annotations

import builtins
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlm_megatron.observe import diversity


def test_words_are_found_in_any_script() -> None:
    assert diversity.words("Don't STOP: 3.5 apples!") == ["don", "'", "t", "stop", ":", "3", ".", "5", "apples", "!"]
    assert diversity.words("水と water_2 ほ") == ["水", "と", "water_2", "ほ"]
    assert diversity.words("ÄPFEL\n\täpfel") == ["äpfel", "äpfel"]
    assert diversity.words(" \n") == []


def test_what_counts_as_the_same_text() -> None:
    assert diversity.normalised("  The ﬁsh\n\nSWIMS ") == diversity.normalised("the fish swims")
    assert diversity.normalised("the fish swims.") != diversity.normalised("the fish swims")


def test_repetition_worked_by_hand() -> None:
    # a b a b a b: five bigrams, of which two are different; four trigrams, of which two are.
    assert diversity.repetition("a b a b a b", 2) == pytest.approx(3 / 5)
    assert diversity.repetition("a b a b a b", 3) == pytest.approx(2 / 4)
    assert diversity.repetition("no no no no", 4) == 0.0, "one 4-gram occurs once"
    assert diversity.repetition("one two", 4) == 0.0


@settings(max_examples=30)
@given(st.text("ab .", max_size=30), st.integers(1, 5))
def test_a_text_repeats_more_when_it_is_said_twice(text: str, n: int) -> None:
    once, twice = diversity.repetition(text, n), diversity.repetition(f"{text} {text}", n)
    assert 0 <= once < 1 and 0 <= twice < 1
    if len(diversity.words(text)) >= n:
        assert twice > once - 1e-9


def test_distinct_and_vocabulary_worked_by_hand() -> None:
    texts = ["the cat sat", "The cat ran", "the"]
    assert diversity.distinct(texts, 1) == pytest.approx(4 / 7) and diversity.vocabulary(texts) == 4
    assert diversity.distinct(texts, 2) == pytest.approx(3 / 4), "n-grams do not cross from one text to the next"
    assert math.isnan(diversity.distinct(["a", "b"], 2))


def test_a_sample_is_a_function_of_its_seed() -> None:
    one = diversity.sample(1000, 20, 7)
    assert one == diversity.sample(1000, 20, 7) == sorted(set(one)) and len(one) == 20
    assert one != diversity.sample(1000, 20, 8)
    assert diversity.sample(3, 20, 7) == [0, 1, 2]


def test_self_bleu_is_high_where_texts_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    same = diversity.self_bleu(["the cat sat on the mat today"] * 3)
    other = diversity.self_bleu(["the cat sat on the mat", "nine dogs ran over old hills", "who asked you then"])
    mixed = diversity.self_bleu(["the cat sat on the mat", "the cat sat on a chair", "who asked you then"])
    assert same is not None and other is not None and mixed is not None
    assert same == pytest.approx(100) and other < mixed < same and other < 20
    assert diversity.self_bleu(["alone"]) is None
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("sacrebleu"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert diversity.self_bleu(["a b c d", "a b c d"]) is None
