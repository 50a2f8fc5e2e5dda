"""Bootstrapping without models: the combinations, their draw, the filters, the statistics."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlm_megatron.config.load import finalize, from_container, with_overrides
from steerlm_megatron.config.schema import BootstrapConfig, Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import to_strict_json
from steerlm_megatron.stages.bootstrap import (
    Combination,
    choose_prompts,
    combinations,
    cumulative,
    draw_combination,
    pair_prompts,
)
from steerlm_megatron.stages.bootstrap_stats import statistics
from steerlm_megatron.stages.record_reader import Record
from steerlm_megatron.stages.response_filters import ResponseFilters, prompt_key
from steerlm_megatron.stages.sampling import Drawn, Prompt
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Conversation, Message

SCHEMA = AttributeSchema("own", ("quality", "humor", "toxicity"), 4, unseen=("toxicity",))


def labelled(text: str, prompt: str = "Hi", weight: int = 1, **values: float) -> Conversation:
    return Conversation(prompt, (Message("user", prompt), Message("assistant", text, values or None, weight)))


def test_the_best_combinations_are_those_of_the_highest_quality_found() -> None:
    records = [
        labelled("a", quality=3.2, humor=1.0), labelled("b", quality=2.6, humor=4.0, toxicity=1.0),
        labelled("c", quality=3.4, humor=0.6), labelled("d", quality=1.0, humor=2.0),
        labelled("e", quality=3.9),  # has no value of humor
        labelled("f", quality=4.0, humor=3.0, weight=0),  # context
        labelled("g"),
    ]  # fmt: skip
    assert combinations(records, SCHEMA) == [
        Combination({"quality": 3, "humor": 1}, 2),
        Combination({"quality": 3, "humor": 4}, 1),
    ]
    with pytest.raises(UserError, match="no response with a value of quality"):
        combinations([labelled("a", humor=2.0)], SCHEMA)


FOUND = [Combination({"quality": 4, "humor": level}, count) for level, count in ((0, 90), (1, 9), (2, 1))]


@pytest.mark.parametrize(("how", "expected"), [("uniform", (1 / 3, 1 / 3, 1 / 3)), ("frequency", (0.9, 0.09, 0.01))])
def test_a_combination_is_drawn_with_its_probability(how: str, expected: Sequence[float]) -> None:
    upto = cumulative(FOUND, how)
    drawn = Counter(draw_combination(upto, 7, f"prompt {i}", n) for i in range(2000) for n in range(2))
    for level, share in enumerate(expected):
        assert drawn[level] / 4000 == pytest.approx(share, abs=0.03)
    assert drawn[2] > 0
    assert upto == ([1, 2, 3] if how == "uniform" else [90, 99, 100])
    first = [draw_combination(upto, 7, "p", n) for n in range(50)]
    assert first != [draw_combination(upto, 8, "p", n) for n in range(50)]


@settings(max_examples=20)
@given(st.permutations(range(8)), st.integers(0, 8), st.sampled_from(["uniform", "frequency"]))
def test_what_a_prompt_is_asked_for_does_not_depend_on_the_others(order: list[int], size: int, how: str) -> None:
    def asked(which: Sequence[int]) -> dict[str, Mapping[str, int] | None]:
        records = [Record(f"f:{i}", Conversation(f"r{i}", (Message("user", f"Question {i}?"),))) for i in which]
        return {p.id: p.levels for p in pair_prompts(records, FOUND, 3, how, 5)}

    whole, some = asked(range(8)), asked(order[:size])
    assert len(whole) == 24 and len({str(levels) for levels in whole.values()}) > 1
    assert some == {key: whole[key] for key in some} and len(some) == 3 * size


def test_each_distinct_prompt_counts_once() -> None:
    records = [Record(f"f:{i}", labelled(f"answer {i}", prompt=f"p{i % 3}")) for i in range(5)]
    chosen, left_out = choose_prompts(records, 2, random.Random(1))
    assert left_out == {"repeated_prompt": 2, "not_drawn": 1} and len({r.conversation.id for r in chosen}) == 2
    assert all(m.role == "user" for r in chosen for m in r.conversation.messages)


# ---- filters


def prompts_of(*asked: str, humor: int = 2) -> list[Prompt]:
    return [
        Prompt(f"{text}/{i}", (Message("user", text),), {"quality": 4, "humor": humor}, f"f:{i}")
        for i, text in enumerate(asked)
    ]


def ended(*texts: str) -> list[Drawn]:
    return [Drawn(text, "stop", len(text)) for text in texts]


def filters(**keys: Any) -> ResponseFilters:
    return ResponseFilters.from_config(BootstrapConfig(**keys), SCHEMA)


def test_the_default_leaves_out_what_did_not_end_and_what_is_empty_alone() -> None:
    prompts = prompts_of("a", "a", "a", "a", "a")
    drawn = [Drawn("x x x x x x x x", "stop", 3), Drawn("cut", "length", 3), Drawn(" \n", "stop", 3),
             Drawn("x x x x x x x x", "stop", 3), Drawn("broken", "error", 3)]  # fmt: skip
    usual = filters()
    assert usual.by_text(prompts, drawn, [labelled("X x x x x x x x", prompt="a")]) == [
        None, "unfinished", "empty", None, "unfinished"
    ]  # fmt: skip
    values = [{"quality": 0.0, "humor": 4.0}] * 5
    assert usual.by_values(prompts, values) == [None] * 5
    cut = filters(drop_truncated=False).by_text(prompts, drawn)
    assert cut == [None, None, "empty", None, "unfinished"], "what broke off for another reason is no response"


def test_repetition_has_a_threshold() -> None:
    drawn = ended("a b a b a b", "a b c a b d", "a b c d e f")
    prompts = prompts_of("p", "p", "p")
    assert filters(max_repetition=0.3, repetition_ngram=2).by_text(prompts, drawn) == ["repetitive", None, None]
    assert filters(max_repetition=0.0, repetition_ngram=2).by_text(prompts, drawn) == ["repetitive"] * 2 + [None]
    assert filters(max_repetition=0.3).by_text(prompts, drawn) == ["repetitive", None, None], "a b a b comes back"
    assert filters(max_repetition=0.34).by_text(prompts, drawn) == [None, None, None], "it is one 4-gram of three"


def test_duplicates_are_of_a_prompt_or_of_all() -> None:
    prompts = prompts_of("p", "p", "q", "q", "p")
    drawn = ended("Yes.", " yes. ", "yes.", "No, never.", "Perhaps.")
    human = [
        Conversation("h", (Message("user", "p"), Message("assistant", "PERHAPS."), Message("user", "q"),
                           Message("assistant", "no,  never."))),
        labelled("No, never.", prompt="other"),
    ]  # fmt: skip
    assert filters().by_text(prompts, drawn, human) == [None] * 5
    of_prompt = filters(drop_duplicates="prompt").by_text(prompts, drawn, human)
    assert of_prompt == [None, "duplicate", None, None, "in_input"]
    assert filters(drop_duplicates="all").by_text(prompts, drawn, human) == [
        None, "duplicate", "duplicate", "in_input", "in_input"
    ]  # fmt: skip
    cut = [Drawn("Yes.", "length", 1), *ended("yes.")]
    assert filters(drop_duplicates="all").by_text(prompts[:2], cut) == ["unfinished", None], "what is left out is none"


VALUES = [{"quality": q, "humor": h} for q, h in ((3.9, 2.0), (2.9, 2.0), (3.5, 3.2), (3.0, 1.0), (3.5, 2.0))]


def test_measured_values_have_bounds_and_a_distance_to_what_was_asked() -> None:
    prompts = prompts_of("p", "p", "p", "q", "q")
    found = filters(labels=["quality>=3", "humor <= 3"]).by_values(prompts, VALUES)
    assert found == [None, "not quality>=3", "not humor <= 3", None, None]
    assert filters(max_distance={"humor": 0.5}).by_values(prompts, VALUES) == [
        None, None, "off_target", "off_target", None
    ]  # fmt: skip
    both = filters(labels=["humor<3"], max_distance={"humor": 0.5})
    assert both.by_values(prompts, VALUES)[2] == "not humor<3", "the first filter that fails is the reason"
    assert both.reasons.index("not humor<3") < both.reasons.index("off_target")


def test_the_best_of_a_prompt_are_kept() -> None:
    prompts = prompts_of("p", "p", "p", "q", "q")
    best = filters(keep_best=1).by_values(prompts, VALUES)
    assert best == [None, "not_best", "not_best", "not_best", None]
    humorous = filters(keep_best=2, best_by={"humor": 1.0, "quality": 0.1}).by_values(prompts, VALUES)
    assert humorous == [None, "not_best", None, None, None]
    passed = filters(keep_best=1, labels=["quality<3.9"]).by_values(prompts, VALUES)
    assert passed == ["not quality<3.9", "not_best", None, "not_best", None], "the best of those that pass the others"
    equal = [{"quality": 3.0, "humor": 0.0}] * 5
    assert filters(keep_best=1).by_values(prompts, equal) == [None, "not_best", "not_best", None, "not_best"]


def test_a_prompt_is_the_same_in_any_record() -> None:
    plain, other = (Message("user", "a"),), (Message("user", "a", extra={"lang": "en"}),)
    assert prompt_key(plain) == prompt_key(other) != prompt_key((Message("user", "b"),))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"labels": ["humour>=2"]}, "bootstrap.labels: the models have no values of humour; they have: quality humor"),
        ({"labels": ["toxicity>=2"]}, "no values of toxicity"),
        ({"labels": ["quality=2"]}, "bootstrap.labels: 'quality=2' is not of the form name>=number"),
        ({"max_distance": {"charm": 1.0}}, "bootstrap.max_distance: the models have no values of charm"),
        ({"keep_best": 1, "best_by": {"charm": 1.0}}, "bootstrap.best_by: the models have no values of charm"),
    ],
)
def test_a_filter_of_what_is_not_measured_is_an_error(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        filters(**keys)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"keep_best": 2, "responses_per_prompt": 2}, "bootstrap.keep_best=2 of bootstrap.responses_per_prompt=2"),
        ({"best_by": {"quality": 1.0}}, "does nothing without bootstrap.keep_best"),
        ({"repetition_ngram": 3}, "does nothing without bootstrap.max_repetition"),
        ({"max_distance": {"quality": -1.0}}, "bootstrap.max_distance.quality=-1.0 must be a finite number"),
        ({"best_by": {"quality": float("nan")}, "keep_best": 1, "responses_per_prompt": 2}, "best_by.quality=nan"),
        ({"mix": 1.0}, "bootstrap.mix=1 trains on nothing that was sampled"),
        ({"combinations": "often"}, "bootstrap.combinations=often is not one of: uniform frequency"),
    ],
)
def test_keys_that_contradict_each_other_are_errors(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        finalize(from_container({"bootstrap": keys}))


def test_a_steps_override_replaces_a_mapping_as_a_whole() -> None:
    config = Config(bootstrap=BootstrapConfig(max_distance={"quality": 1.0}))
    assert with_overrides(config, {"bootstrap": {"max_distance": {"humor": 2.0}}}).bootstrap.max_distance == {
        "humor": 2.0
    }


# ---- statistics


def test_statistics_worked_by_hand() -> None:
    before = [("one two three", {"quality": 1.0, "humor": 0.4}), ("one two", {"quality": 2.0}),
              ("four", {"quality": 3.0, "humor": 4.0})]  # fmt: skip
    kept = [("one one one one", {"quality": 4.0, "humor": 2.0}), ("one", {"quality": 3.6, "humor": 1.0})]
    asked = [({"quality": 4, "humor": 0}, kept[0][1]), ({"quality": 4, "humor": 2}, kept[1][1]),
             ({"quality": 4, "humor": 4}, {"quality": 2.0, "humor": 3.0})]  # fmt: skip
    found = statistics(before, kept, asked, SCHEMA, 3)
    assert found["sample"] == {"texts": 2, "texts_for_self_bleu": 2, "seed": 3}, "as many texts on both sides"
    after = found["text"]["after"]
    assert (after["vocabulary"], after["distinct_1"], after["words_mean"]) == (1, pytest.approx(1 / 5), 2.5)
    assert found["text"]["before"]["distinct_1"] > after["distinct_1"]
    assert sum(found["lengths"]["before"]) == sum(found["lengths"]["after"]) == 2
    assert set(found["attributes"]) == {"quality", "humor"}, "nothing is said of what the model has not seen"
    quality, humor = found["attributes"]["quality"], found["attributes"]["humor"]
    assert quality["before"] == {"mean": 2.0, "levels": [0, 1, 1, 1, 0]}
    assert quality["after"] == {"mean": pytest.approx(3.8), "levels": [0, 0, 0, 0, 2]}
    assert humor["before"] == {"mean": pytest.approx(2.2), "levels": [1, 0, 0, 0, 1]}
    assert humor["asked"] == {
        "mean": 2.0, "measured_mean": 2.0, "mae": pytest.approx(4 / 3), "pearson": pytest.approx(0.5), "n": 3
    }  # fmt: skip
    strict = to_strict_json(found)
    assert strict["attributes"]["quality"]["asked"]["pearson"] is None, "only one level was asked for"
    assert statistics(before, kept, asked, SCHEMA, 3)["text"] == found["text"]
