"""The responses in a report's page: how they are grouped, which are chosen, and that no JSON leaves its element."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from steerlm_megatron.report.samples import (
    MOST_OF_A_TEXT,
    asked_in_words,
    disagreement,
    embedded_json,
    first_page,
    samples,
)


def response(number: int, humor: int | None = None, **more: Any) -> dict[str, Any]:
    """Return a line of ``responses.jsonl``: at the best levels, or off them in humor."""
    asked = {"quality": 4, "humor": humor or 0}
    measured = {"quality": 3.0, "humor": 1.0}
    return {
        "model": "acsft", "prompt": f"p{number}", "asked": asked, "best": humor is None, "text": f"text {number}",
        "measured": measured, "judges": {"demo": measured, "ap": {"quality": 3.5, "length": 7.0}}, **more,
    }  # fmt: skip


def test_responses_stand_by_prompt_and_levels_those_of_all_models_together() -> None:
    plain = response(0, model="sft", asked=None, text="plain")
    found = samples([plain, response(1), response(0), response(0, 3)], {"p0": "Hello?", "p1": "Bye?"})
    assert found is not None
    assert found["models"] == ["plain SFT", "ACSFT"] and found["attributes"] == ["humor"]
    assert found["prompts"] == ["Hello?", "Bye?"] and (found["shown"], found["of"], found["cut"]) == (4, 4, 0)
    assert [(group["p"], group["b"], group["x"], len(group["r"])) for group in found["groups"]] == [
        (0, True, [], 2), (0, False, ["humor"], 1), (1, True, [], 1)
    ]  # fmt: skip
    assert found["judges"] == [
        {"name": "demo", "measured": ["quality", "humor"]},
        {"name": "ap", "measured": ["quality", "length"]},
    ]
    assert found["groups"][0]["r"][0] == {"m": 0, "a": None, "t": "plain", "v": [[3.0, 1.0], [3.5, 7.0]]}
    assert [asked_in_words(group, found) for group in found["groups"]] == ["at the best levels", "humor 3"] + [
        "at the best levels"
    ]
    page = first_page(found, 2)
    assert page[1]["title"] == "Prompt 1, humor 3" and page[0]["responses"][0]["asked"] == {}
    assert page[1]["responses"][0]["judges"] == [
        ("demo", {"quality": 3.0, "humor": 1.0}), ("ap", {"quality": 3.5, "length": 7.0})
    ]  # fmt: skip
    assert samples([], {}) is None


def test_runs_that_answer_the_same_prompt_stand_together() -> None:
    lines = [response(0, run="a"), response(7, run="b"), response(0, run="b")]
    found = samples(lines, {("a", "p0"): "Same?", ("b", "p7"): "Same?", ("b", "p0"): "Other?"})
    assert found is not None and found["models"] == ["a: ACSFT", "b: ACSFT"]
    assert [len(group["r"]) for group in found["groups"]] == [2, 1]


def test_prompts_of_one_run_with_the_same_text_stay_apart() -> None:
    lines = [response(number) for number in range(4)]
    found = samples(lines, {f"p{number}": "Same?" for number in range(4)}, most=3)
    assert found is not None and found["prompts"] == ["Same?"] * 3 and (found["shown"], found["of"]) == (3, 4)
    together = samples([response(0, model=f"m{i}") for i in range(9)], {}, most=5)
    assert together is not None and len(together["groups"][0]["r"]) == 5, "one group may be more than what fits"


@pytest.mark.parametrize(
    ("asked", "judges", "expected"),
    [
        ({"humor": 4}, {"a": {"humor": 1.0, "quality": 9.0}}, (3.0, -1.0)),
        (None, {"a": {"humor": 1.0}, "b": {"humor": 3.5}}, (-1.0, 2.5)),
        ({"humor": 2}, {"a": {"humor": 1.0}, "b": {"humor": math.nan, "other": 4.0}}, (1.0, -1.0)),
        ({"humor": 2}, {}, (-1.0, -1.0)),
    ],
)
def test_disagreement_is_the_largest_distance(
    asked: dict[str, float] | None, judges: dict[str, dict[str, float]], expected: tuple[float, float]
) -> None:
    assert disagreement(asked, judges) == pytest.approx(expected)


def test_of_too_many_the_strongest_disagreements_and_a_sample_are_kept() -> None:
    lines = [response(i, 2) for i in range(500)]
    lines[321]["measured"] = lines[321]["judges"]["demo"] = {"quality": 4.0, "humor": 40.0}
    lines[123]["judges"]["ap"] = {"quality": 90.0}
    lines[123]["judges"]["demo"] = {"quality": 90.0 - 3.0, "humor": 2.0}
    found = samples(lines, {}, most=60)
    assert found is not None and found["of"] == 500 and 55 <= found["shown"] <= 60
    assert {"[p321]", "[p123]"} <= set(found["prompts"]), "a prompt without a text is shown by its id"
    numbers = [int(text[2:-1]) for text in found["prompts"]]
    assert numbers == sorted(numbers) and max(numbers) > 400, "a sample of all, in their order"
    assert samples(lines, {}, most=60) == found and samples(lines, {}, most=60, seed=1) != found
    small = samples(lines, {}, characters=20_000)
    assert small is not None and 10 < small["shown"] < 500 and len(embedded_json(small)) < 25_000


def test_long_texts_are_cut_and_say_so() -> None:
    found = samples([response(0, text="x" * (MOST_OF_A_TEXT + 5))], {"p0": "y" * (MOST_OF_A_TEXT + 7)})
    assert found is not None and found["cut"] == 2
    assert found["groups"][0]["r"][0]["t"].endswith("… [5 more characters]")
    assert found["prompts"][0].endswith("… [7 more characters]")


@pytest.mark.parametrize("text", ["</script><script>alert(1)</script>", "<!--<script>", "]]>", "&lt;", "\ud800 \u2028"])
def test_the_json_cannot_end_its_element(text: str) -> None:
    written = embedded_json({"t": text, "v": math.nan})
    assert not set("<>&") & set(written) and written.encode("utf-8")
    assert json.loads(written) == {"t": text, "v": None}
