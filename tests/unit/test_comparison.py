"""Runs side by side: which responses are pairs, what is subtracted from what, and what the intervals say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from steerlm_megatron.evaluate.comparison import (
    Side,
    compare,
    curves_of,
    difference,
    labels,
    mean,
    same_prompts,
    slope,
    unpaired,
)
from steerlm_megatron.evaluate.intervals import figure

PROMPTS = [f"p{i}" for i in range(24)]
HARD = np.random.default_rng(5).normal(0.0, 2.0, len(PROMPTS))  # how hard each prompt is, for every model
JUDGE = "a judge"


def line(model: str, prompt: str, asked: dict[str, int] | None, best: bool, **values: float) -> dict[str, Any]:
    judges = {"one": values, "two": {name: value + 1.0 for name, value in values.items()}}
    return {
        "model": model, "prompt": prompt, "asked": asked, "best": best, "text": "", "measured": values, "judges": judges
    }  # fmt: skip


def side(name: str, gain: float, steepness: float = 1.0, **more: Any) -> Side:
    """Return a run whose model is better by ``gain`` at every prompt, and follows ``steepness`` per level asked."""
    rng = np.random.default_rng(len(name))
    lines = []
    for prompt, hard in zip(PROMPTS, HARD, strict=True):
        noise = float(rng.normal(0, 0.1))
        lines.append(line("acsft", prompt, {"quality": 4, "humor": 0}, True, quality=hard + gain + noise, humor=0.0))
        lines += [
            line("acsft", prompt, {"quality": 4, "humor": level}, False, quality=hard, humor=steepness * level + noise)
            for level in (2, 4)
        ]
    error = {"metrics": {"mse": figure(1 - gain, 0.9 - gain, 1.1 - gain, 9)}}
    evaluation = {
        "judge": JUDGE, "judges": {"one": JUDGE, "two": "another judge"}, "quality_attribute": "quality",
        "steering": {"humor": {"requested": [0, 2, 4], "measured": [0, 2, 4]}}, "steered_model": "acsft",
        "ap": {"quality": {"mse": 1.0, "n": 9}},
        "measures": {"prediction": {"attributes": {"quality": error}}},
    }  # fmt: skip
    return Side(name, **({"evaluation": evaluation, "responses": lines} | more))


def test_differences_are_paired_over_the_same_prompts() -> None:
    found = compare([side("a", 0.0), side("bb", 0.3)])
    rows = {(row["judge"], row["measured"]): row for row in found["quality"]}
    row = rows["one", "quality"]
    assert row["paired"] and row["verdict"] == "above" and row["difference"]["n"] == 24
    assert row["difference"]["value"] == pytest.approx(0.3, abs=0.1)
    assert row["difference"]["high"] - row["difference"]["low"] < 0.3, "what makes a prompt hard cancels out"
    other = rows["two", "quality"]["difference"]
    assert other == pytest.approx(row["difference"]), "the other judge says one level more of both"
    assert rows["one", "humor"]["verdict"] == "not told apart" and not rows["one", "humor"]["headline"]
    assert found["prediction"][0]["difference"]["value"] == pytest.approx(-0.3)
    title, quality = found["sections"][0]["title"], found["sections"][0]
    assert title == "Quality of the models, by run"
    assert "the same 24 prompts (by their ids" in " ".join(found["words"])
    assert [table["title"] for table in quality["tables"]] == [
        "Mean at the best levels", "Other means", "Differences", "Other differences"
    ]  # fmt: skip
    assert quality["tables"][0]["columns"] == ["judge", "model", "measured", "a", "bb"]
    assert any("bb − a, acsft quality: above" in words for words, _ in quality["summary"])
    assert set(found["curves"]["humor"]) == {"a", "bb"} and found["runs"] == ["a", "bb"]


def test_other_prompts_under_the_same_ids_are_no_pairs() -> None:
    texts = {prompt: f"text of {prompt}" for prompt in PROMPTS}
    first = side("a", 0.0, prompts=texts)
    second = side("bb", 0.3, prompts={prompt: text.upper() for prompt, text in texts.items()})
    assert same_prompts(first, side("bb", 0.3, prompts=texts)) == set(PROMPTS)
    assert same_prompts(first, second) == set()
    found = compare([first, second])
    row = found["quality"][0]
    assert not row["paired"] and row["verdict"] == "not told apart" and row["difference"]["n"] is None
    assert "answered other prompts (24 and 24, 0 in common)" in " ".join(found["words"])
    cells = found["sections"][0]["tables"][2]["rows"][0]
    assert cells[:2] == ["bb", "a"] and "not paired" in cells


def test_a_curve_that_follows_less_is_told_apart_per_prompt() -> None:
    (row,) = [row for row in compare([side("a", 0.0), side("bb", 0.0, 0.5)])["steering"] if row["judge"] == "one"]
    assert row["attribute"] == "humor" and row["verdict"] == "below" and row["paired"]
    assert row["difference"]["value"] == pytest.approx(-0.5, abs=0.1)
    slopes = side("bb", 0.0, 0.5).slopes(JUDGE)
    assert set(slopes) == {"humor"} and np.mean(list(slopes["humor"].values())) == pytest.approx(0.5, abs=0.1)


def test_values_of_other_judges_scales_and_levels_are_told_of() -> None:
    first = side("a", 0.0, max_level=4)
    other = side("bb", 0.3, evaluation={**side("bb", 0.3).evaluation, "judge": "x", "judges": {"x": "x"}})
    found = compare([first, other])
    assert not found["quality"] and "values of different judges are not subtracted" in str(found["words"])
    scaled = compare([first, side("bb", 0.3, max_level=9)])
    assert not scaled["quality"] and not scaled["prediction"] and "bb are 0 to 9" in str(scaled["words"])
    assert "another attribute-prediction model in bb" in str(
        compare([side("a", 0, own_judge="1"), side("bb", 0, own_judge="2")])["words"]
    )
    asked = [{**one, "asked": {"quality": 3, "humor": 0}} if one["best"] else one for one in first.responses]
    said = str(compare([first, side("bb", 0.3, responses=asked)])["words"])
    assert "At its best, acsft was asked for quality 3 in bb, quality 4 in a." in said


def test_runs_without_responses_or_with_other_attributes_are_compared_as_far_as_they_go() -> None:
    figures = {"acsft": {"mean": 2.0, "low": 1.9, "high": 2.1}}
    old = [Side(name, {"judge": JUDGE, "quality_detail": figures}) for name in "ab"]
    found = compare(old)
    assert found["quality"][0]["verdict"] == "not told apart" and not found["quality"][0]["paired"]
    assert "no responses were kept" in str(found["words"])
    nothing = compare([side("a", 0.0), Side("b")])
    assert not nothing["quality"] and not nothing["steering"] and not nothing["prediction"]
    assert nothing["sections"][0]["tables"][0]["rows"][0][-1] is None, "the run's cell is empty"
    assert compare([Side("a"), Side("b")])["sections"][1]["words"] == ["No run has measured this."]
    renamed = [{**one, "model": "bootstrapped"} for one in side("bb", 0.5).responses]
    rows = compare([side("a", 0.0), side("bb", 0.5, responses=renamed)])["quality"]
    assert {row["model"] for row in rows} == {"bootstrapped − acsft"}


def test_unpaired_differences_are_those_of_independent_samples() -> None:
    found = unpaired(figure(1.0, 0.7, 1.4), figure(2.0, 1.6, 2.3))
    assert found["value"] == 1.0
    assert found["low"] == pytest.approx(1 - math.hypot(0.4, 0.4)) and found["high"] == pytest.approx(
        1 + math.hypot(0.3, 0.3)
    )
    assert math.isnan(unpaired(figure(1.0), figure(2.0))["low"])
    assert math.isnan(unpaired({"value": None}, figure(2.0))["value"])


def test_few_prompts_in_common_are_no_pairs() -> None:
    first = {prompt: float(i) for i, prompt in enumerate(PROMPTS)}
    assert difference(first, {**first, "new": 1.0}, set(first))["paired"]
    assert not difference(first, first, set(PROMPTS[:11]))["paired"]
    assert mean(first)["value"] == pytest.approx(11.5) and mean(first)["n"] == 24


def test_which_curve_a_request_is_on() -> None:
    best = {"quality": 4, "humor": 0}
    assert list(curves_of({"quality": 4, "humor": 2}, best)) == ["humor"]
    assert list(curves_of(best, best)) == ["quality", "humor"]
    assert not curves_of({"quality": 1, "humor": 2}, best)
    assert slope([(0, 1.0), (2, 2.0), (4, 3.0)]) == pytest.approx(0.5)
    assert labels([side("a", 0.0)]) == {JUDGE: "one", "another judge": "two"}
