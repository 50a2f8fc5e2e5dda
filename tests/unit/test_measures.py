"""The measures of ``steerlm evaluate``: their sections, from material that is made here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steerlm_megatron.config.inference import JUDGES as JUDGE_NAMES
from steerlm_megatron.config.inference import MEASURES as MEASURE_NAMES
from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.evaluate import headlines, judges, measures
from steerlm_megatron.evaluate.best_of import best, sizes
from steerlm_megatron.evaluate.diversity import without_each
from steerlm_megatron.evaluate.needs import model_before, models_of, shifts_of
from steerlm_megatron.evaluate.preferences import half_of
from steerlm_megatron.evaluate.protocol import (
    Answers,
    Inputs,
    JudgeContext,
    Labelled,
    Material,
    Preferences,
    Samples,
    Shift,
    Steered,
)
from steerlm_megatron.files import to_strict_json
from steerlm_megatron.observe import diversity
from steerlm_megatron.stages.evaluate import check
from steerlm_megatron.steer.annotations import annotations_of
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.messages import Message
from steerlm_megatron.steer.preferences import read_pairs
from steerlm_megatron.steer.records import Conversation, read_records

NAN = float("nan")
SCHEMA = AttributeSchema("own", ("quality", "humor"), 4)
PROMPTS = [Conversation(f"p{i}", (Message("user", f"Question {i}?"),)) for i in range(24)]


class Fixed:
    """A judge whose values are made elsewhere."""

    def __init__(self, name: str, measured: tuple[str, ...]) -> None:
        self.name, self.words, self.measured = name, f"the judge {name}", measured

    def measure(self, prompts: Any, responses: Any) -> list[dict[str, float]]:
        raise AssertionError("measures measure nothing by themselves")


def labelled(size: int = 400) -> Labelled:
    """Return labels of which a model knows quality, and of humor the length alone, to two responses of each prompt."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 2000, size).astype(float)
    quality = np.clip(rng.normal(2, 1, size), 0, 4)
    humor = np.clip(np.log1p(lengths) / 2 + rng.normal(0, 0.7, size), 0, 4)
    humor[::5] = NAN
    predicted = np.stack((np.clip(quality + rng.normal(0, 0.3, size), 0, 4), rng.uniform(0, 4, size)), axis=1)
    languages = ["en"] * (size - 30) + ["de"] * 25 + ["fr"] * 3 + [""] * 2
    annotations = [[{"quality": float(np.clip(v + rng.normal(0, 0.8), 0, 4))} for _ in range(3)] for v in quality]
    annotations[0] = [{"quality": 1.0}]
    return Labelled(
        SCHEMA, SCHEMA.names, predicted, np.stack((quality, humor), axis=1), np.array([2.0, 2.0]), lengths,
        [f"{i // 2}" for i in range(size)], {"language": languages, "source": ["a"] * size}, annotations,
    )  # fmt: skip


def preferences(size: int = 300) -> Preferences:
    """Return pairs in which quality helps, humor harms, and length says nothing."""
    rng = np.random.default_rng(1)
    chosen, rejected = rng.uniform(0, 4, (size, 2)), rng.uniform(0, 4, (size, 2))
    wrong = (chosen - rejected) @ np.array([2.0, -1.0]) + rng.logistic(size=size) < 0
    chosen[wrong], rejected[wrong] = rejected[wrong], chosen[wrong].copy()
    lengths = rng.integers(10, 100, (size, 2)).astype(float)
    return Preferences(SCHEMA, SCHEMA.names, chosen, rejected, lengths, [f"prompt {i // 2}" for i in range(size)])


def answers(shift: float, seed: int) -> Answers:
    rng = np.random.default_rng(seed)
    hard = np.random.default_rng(9).normal(2, 1, len(PROMPTS))
    values = [{"quality": float(v + shift + 0.1 * rng.normal()), "humor": 1.0} for v in hard]
    texts = [f"the answer is {i} and {'really ' * (seed + 1)}it" for i in range(len(PROMPTS))]
    other = [{"words": float(len(text.split()))} for text in texts]
    other[3] = {}
    return Answers({"quality": 4}, texts, [9] * len(PROMPTS), [i == 0 for i in range(len(PROMPTS))],
                   {"ap": values, "words": other})  # fmt: skip


def steered() -> Steered:
    """Return curves of a model that follows quality, ignores humor, and loses quality where humor is asked for."""
    rng = np.random.default_rng(2)
    best = {"quality": 4, "humor": 0}
    asks: list[dict[str, int]] = [best] + [{**best, "quality": level} for level in (0, 2)]
    asks += [{**best, "humor": level} for level in (2, 4)] + [{"quality": 1, "humor": 1}]
    measured = [
        [
            {"quality": ask["quality"] - 0.5 * ask["humor"] + 0.1 * rng.normal(), "humor": 1 + 0.1 * rng.normal()}
            for _ in PROMPTS
        ]
        for ask in asks
    ]
    texts = [[f"{ask} to {p.id}" for p in PROMPTS] for ask in asks]
    curves = {"quality": (1, 2, 0), "humor": (0, 3, 4)}
    return Steered("acsft", SCHEMA, best, asks, curves, (5,), texts, {"ap": measured})


def moved() -> Shift:
    """Return three samples to each prompt that a model finds 2 nats likelier than the one before; one was cut."""
    rng = np.random.default_rng(4)
    before = rng.normal(-30, 5, (3, len(PROMPTS)))
    own = before + 2 + rng.normal(0, 0.2, before.shape)
    own[1, 5] = NAN
    return Shift("acsft", own, before, np.full(before.shape, 10.0))


@pytest.fixture(scope="module")
def material() -> Material:
    config = Config()
    config.evaluate.examples = 2
    shown = {"sft": answers(0.0, 0), "acsft": answers(0.5, 1), "bootstrapped": answers(0.5, 2)}
    rng = np.random.default_rng(3)
    values = rng.normal(2, 1, (5, len(PROMPTS)))
    samples = Samples(
        [["text"] * len(PROMPTS)] * 5, [[7] * len(PROMPTS)] * 5, values + rng.normal(0, 0.5, values.shape),
        {"ap": [[{"quality": float(v)} for v in row] for row in values], "words": [[{"words": 1.0}] * 24] * 5},
    )  # fmt: skip
    return Material(
        config, Path("."), "quality", labelled=labelled(), preferences=preferences(),
        judges={"ap": Fixed("ap", ("quality", "humor")), "words": Fixed("words", ("words",))},
        prompts=PROMPTS, answers=shown, samples={"acsft": samples}, shifts={"bootstrapped": moved()},
    )  # fmt: skip


@pytest.fixture(scope="module")
def sections(material: Material) -> dict[str, Any]:
    names = ("prediction", "preferences", "annotators", "quality", "diversity", "best_of", "shift")
    return measures.run(names, material)


@pytest.fixture(scope="module")
def steering() -> tuple[Material, dict[str, Any]]:
    config = Config()
    config.evaluate.examples = 2
    found = Material(config, Path("."), "quality", judges={"ap": Fixed("ap", ("quality", "humor"))}, prompts=PROMPTS,
                     steered=steered())  # fmt: skip
    return found, measures.run(["steering"], found)["steering"]


def test_the_registries_are_those_of_the_configuration() -> None:
    assert tuple(measures.MEASURES) == MEASURE_NAMES and tuple(judges.JUDGES) == JUDGE_NAMES


def test_every_section_is_plain_data_with_a_version_and_tables(
    sections: dict[str, Any], steering: tuple[Material, dict[str, Any]]
) -> None:
    for name, section in {**sections, "steering": steering[1]}.items():
        assert json.loads(json.dumps(to_strict_json(section))) and section["version"] >= 1 and section["title"], name
        for table in section["tables"]:
            assert table["rows"] and all(len(row) == len(table["columns"]) for row in table["rows"]), (name, table)


def test_prediction_beats_baselines_where_it_knows_something(sections: dict[str, Any]) -> None:
    found = sections["prediction"]["attributes"]
    quality, humor = found["quality"], found["humor"]
    assert (quality["n"], humor["n"]) == (400, 320)
    for name in ("constant", "length", "majority"):
        assert quality["baselines"][name]["is"] == "below" and quality["baselines"][name]["gain"]["low"] > 0
        assert humor["baselines"][name]["is"] == "above", "a model that guesses is worse than all who do not"
    assert humor["baselines"]["length"]["spearman"]["low"] > 0.3
    assert abs(quality["baselines"]["length"]["spearman"]["value"]) < 0.15
    assert quality["baselines"]["majority"]["level"] == 2
    assert (
        quality["metrics"]["kappa"]["low"] < quality["metrics"]["kappa"]["value"] < quality["metrics"]["kappa"]["high"]
    )
    assert np.array(quality["confusion"]).shape == (5, 5) and np.sum(quality["confusion"]) == 400
    assert np.trace(quality["confusion"]) / 400 == pytest.approx(quality["metrics"]["accuracy"]["value"])


def test_calibration_lies_on_the_diagonal_only_for_a_calibrated_model(sections: dict[str, Any]) -> None:
    quality, humor = (sections["prediction"]["attributes"][name]["calibration"] for name in ("quality", "humor"))
    assert len(quality["bins"]) == 10 and sum(one["label"]["n"] for one in quality["bins"]) == 400
    assert all(abs(one["label"]["value"] - one["predicted"]) < 0.3 for one in quality["bins"])
    assert quality["error"]["high"] < humor["error"]["low"]
    predicted = [one["predicted"] for one in quality["bins"]]
    assert predicted == sorted(predicted)
    assert all(one["label"]["low"] <= one["label"]["value"] <= one["label"]["high"] for one in quality["bins"])


def test_points_of_a_scatter_plot_are_responses_evenly_spaced(sections: dict[str, Any]) -> None:
    points = sections["prediction"]["attributes"]["quality"]["points"]
    assert len(points) == 400
    squares = [(prediction - label) ** 2 for prediction, label in points]
    mse = sections["prediction"]["attributes"]["quality"]["metrics"]["mse"]["value"]
    assert np.mean(squares) == pytest.approx(mse, rel=1e-2), "all 400 responses are shown, each with its own label"
    assert len(sections["prediction"]["attributes"]["humor"]["points"]) == 320


def test_slices_fold_what_is_rare(sections: dict[str, Any]) -> None:
    rows = sections["prediction"]["slices"]
    by_language = {
        row["value"]: row["mse"]["n"] for row in rows if (row["by"], row["attribute"]) == ("language", "quality")
    }
    assert by_language == {"de": 25, "en": 370, "other": 5}
    assert {row["by"] for row in rows} == {"language", "length"}, "a source that all share slices nothing"
    lengths = [row["mse"]["n"] for row in rows if (row["by"], row["attribute"]) == ("length", "quality")]
    assert len(lengths) == 4 and sum(lengths) == 400 and min(lengths) > 90
    assert all(row["gain"]["n"] == row["mse"]["n"] for row in rows)


def test_preferences_are_told_by_weights_of_other_prompts(sections: dict[str, Any]) -> None:
    found = sections["preferences"]
    rows = found["accuracy"]
    assert rows["weighted sum"]["is"] == "above" and rows["weighted sum"]["accuracy"]["low"] > 0.7
    assert rows["quality alone"]["accuracy"]["value"] < rows["weighted sum"]["accuracy"]["value"]
    assert rows["humor alone"]["accuracy"]["low"] > 0.5, "less humor is better, which the other half shows"
    assert rows["longer response"]["is"] == "–" and rows["longer response"]["gain"]["value"] == 0.0
    assert found["weights"]["quality"]["all"] == pytest.approx(2.0, abs=0.5)
    assert found["weights"]["humor"]["half_1"] < 0 > found["weights"]["humor"]["half_2"]
    halves = [half_of(f"prompt {i}") for i in range(200)]
    assert 60 < sum(halves) < 140


def test_annotators_bound_what_a_model_can_reach(sections: dict[str, Any]) -> None:
    found = sections["annotators"]["attributes"]
    assert set(found) == {"quality"} and found["quality"]["responses"] == 399
    row = found["quality"]
    # The model is 0.3 off the truth, an annotator 0.8, and the mean of two others 0.8 / √2.
    assert row["model"]["mse"]["value"] < row["others"]["mse"]["value"] < row["annotator"]["mse"]["value"]
    assert row["gain_annotator"]["low"] > row["gain_others"]["low"] > 0
    assert row["annotator"]["pearson"]["value"] < row["model"]["pearson"]["value"]


def test_models_are_compared_on_the_same_prompts(material: Material, sections: dict[str, Any]) -> None:
    pairs = {(p["judge"], p["attribute"], p["low"], p["high"]): p for p in sections["quality"]["pairs"]}
    assert pairs["ap", "quality", "sft", "acsft"]["verdict"] == "above"
    assert pairs["ap", "quality", "acsft", "bootstrapped"]["verdict"] == "not told apart"
    assert pairs["ap", "humor", "sft", "acsft"]["difference"]["value"] == 0.0
    assert pairs["words", "words", "sft", "acsft"]["difference"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 23}
    head = headlines.quality(material)
    assert head["quality"]["acsft"] == pytest.approx(sections["quality"]["models"]["ap"]["acsft"]["quality"]["value"])
    assert [(p["low"], p["high"], p["verdict"]) for p in head["quality_pairs"]] == [
        ("sft", "acsft", "above"), ("sft", "bootstrapped", "above"), ("acsft", "bootstrapped", "not told apart")
    ]  # fmt: skip


def test_diversity_has_intervals_and_compares_models(material: Material, sections: dict[str, Any]) -> None:
    models = sections["diversity"]["models"]
    texts = material.answers["sft"].texts
    for n in (1, 2, 3):
        one = models["sft"][f"distinct_{n}"]
        assert one["value"] == pytest.approx(diversity.distinct(texts, n)) and one["low"] <= one["value"] <= one["high"]
        _, (different, total) = without_each(texts, n)
        for place in (0, 5):
            left = [text for i, text in enumerate(texts) if i != place]
            assert different[place] / total[place] == pytest.approx(diversity.distinct(left, n))
    assert models["sft"]["vocabulary"]["value"] == diversity.vocabulary(texts)
    assert models["sft"]["cut"]["value"] == pytest.approx(1 / 24)
    rows = {(r["low"], r["high"], r["measured"]): r for r in sections["diversity"]["differences"]}
    assert rows["sft", "acsft", "words"]["difference"]["value"] == 1.0
    assert rows["sft", "acsft", "distinct_1"]["difference"]["value"] < 0
    assert models["sft"]["self_bleu"]["n"] == 24 and math.isnan(models["sft"]["self_bleu"]["low"])


def test_the_best_of_n_is_what_the_scores_choose(sections: dict[str, Any]) -> None:
    assert sizes(1) == [1] and sizes(5) == [1, 2, 4, 5] and sizes(8) == [1, 2, 4, 8]
    assert best(np.array([[1.0, 5], [2, 5]]), np.array([[10.0, 20], [30, 40]])).tolist() == [30, 20]
    rows = sections["best_of"]["rows"]
    assert [(row["n"], row["tokens"]["value"]) for row in rows] == [(1, 7), (2, 14), (4, 28), (5, 35)]
    assert rows[0]["gain"]["value"] == 0.0 and rows[-1]["gain"]["low"] > 0 and rows[-1]["verdict"] == "above"
    assert {row["judge"] for row in rows} == {"ap"}, "words has no value of quality"


def test_the_divergence_is_the_mean_of_what_two_models_give(sections: dict[str, Any]) -> None:
    (row,) = sections["shift"]["rows"]
    assert (row["model"], row["before"], row["n"], row["cut"]) == ("bootstrapped", "acsft", 71, 1)
    shift = moved()
    expected = float(np.nanmean(shift.logprob_SP - shift.before_SP))
    assert row["response"]["value"] == pytest.approx(expected) and row["token"]["value"] == pytest.approx(expected / 10)
    for found, scale in ((row["response"], 1), (row["token"], 10)):
        assert 1.8 < found["low"] * scale < expected < found["high"] * scale < 2.2


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("sft", None), ("acsft", None), ("bootstrapped", "acsft"), ("bootstrapped_2", "bootstrapped"),
        ("bootstrapped_3", "bootstrapped_2"), ("steerlm2", "acsft"), ("steerlm2_2", "steerlm2"),
        ("steerlm2_11", "steerlm2_10"),
    ],
)  # fmt: skip
def test_a_model_is_compared_with_the_one_that_it_went_on_from(name: str, before: str | None) -> None:
    assert model_before(name) == before


def test_a_divergence_is_measured_where_it_is_asked_for() -> None:
    config = configured(evaluate__prompts="p", evaluate__models__acsft="a", evaluate__models__steerlm2=["b", "c"])
    assert "shift" not in measures.choose(config)
    config.evaluate.shift_samples = 4
    assert "shift" in measures.choose(config) and shifts_of(config) == {"steerlm2": "acsft", "steerlm2_2": "steerlm2"}
    config.evaluate.models.acsft, config.evaluate.models.steerlm2 = "a", []
    assert "shift" not in measures.choose(config), "there is no model that was trained from another"


def test_cross_talk_says_what_asking_moves(steering: tuple[Material, dict[str, Any]]) -> None:
    section = steering[1]
    found = section["judges"]["ap"]
    slopes = found["cross_talk"]
    assert slopes["quality"]["quality"]["value"] == pytest.approx(1.0, abs=0.05)
    assert (
        slopes["humor"]["quality"]["value"] == pytest.approx(-0.5, abs=0.05) and slopes["humor"]["quality"]["high"] < 0
    )
    assert slopes["humor"]["humor"]["low"] < 0 < slopes["humor"]["humor"]["high"]
    curve = found["curves"]["quality"]
    assert (curve["requested"], curve["spearman"]["value"], curve["in_order"]["low"]) == ([0, 2, 4], 1.0, 1.0)
    assert curve["range"]["value"] == pytest.approx(4, abs=0.2) and curve["range"]["low"] > 3.8
    assert found["curves"]["humor"]["spearman"]["low"] < 0 < found["curves"]["humor"]["spearman"]["high"]
    change = found["quality"]["humor"]
    assert [round(one["value"], 1) for one in change["change"]] == [0.0, -1.0, -2.0] and "quality" not in found[
        "quality"
    ]
    (combined,) = section["combinations"]["ap"]
    assert combined["asked"] == {"quality": 1, "humor": 1}
    assert combined["measured"]["quality"]["value"] == pytest.approx(0.5, abs=0.1)


def test_short_figures_of_steering(steering: tuple[Material, dict[str, Any]]) -> None:
    material, section = steering
    head = headlines.steering(material)
    curve = head["steering"]["quality"]
    assert curve["requested"] == [0, 2, 4] and curve["spearman"] == pytest.approx(1.0)
    assert curve["slope"] == section["judges"]["ap"]["cross_talk"]["quality"]["quality"]
    measured = section["judges"]["ap"]["curves"]["quality"]["measured"]
    assert curve["low"] == pytest.approx([one["low"] for one in measured])
    assert head["steered_model"] == "acsft" and head["max_level"] == 4
    assert len(head["examples"]) == 2 and [r["attributes"] for r in head["examples"][0]["responses"]] == [
        {"quality": 4, "humor": 0}, {"quality": 0, "humor": 0}, {"quality": 4, "humor": 4}
    ]  # fmt: skip


def test_short_figures_of_prediction(sections: dict[str, Any]) -> None:
    head = headlines.prediction(labelled())
    for name, row in head.items():
        for kind in ("constant", "length"):
            gain = sections["prediction"]["attributes"][name]["baselines"][kind]["gain"]
            assert (row[f"{kind}_gain_low"], row[f"{kind}_gain_high"]) == pytest.approx((gain["low"], gain["high"]))
    assert head["quality"]["constant_gain_low"] > 0 > head["humor"]["constant_gain_high"]
    assert head["humor"]["n"] == 320 and {"mse", "length_mse", "length_gain_low"} <= head["quality"].keys()


def configured(**keys: Any) -> Config:
    config = Config(command="evaluate")
    for name, value in keys.items():
        section, _, key = name.rpartition("__")
        target: Any = config
        for part in section.split("__") if section else ():
            target = getattr(target, part)
        setattr(target, key, value)
    return config


def test_measures_run_where_there_is_what_they_need() -> None:
    config = configured(ap_checkpoint="ap", input="labels")
    assert measures.choose(config) == ["prediction", "annotators"]
    assert measures.choose(config, Inputs(annotated=0)) == ["prediction"]
    assert measures.choose(configured(ap_checkpoint="ap", evaluate__preferences="pairs")) == ["preferences"]
    config = configured(evaluate__prompts="p", evaluate__judge="demo", evaluate__models__sft="sft")
    assert measures.choose(config) == ["quality", "diversity"]
    config.evaluate.models.rounds = ["b2"]
    assert measures.choose(config) == ["steering", "quality", "diversity"]
    assert models_of(config) == {"sft": "sft", "bootstrapped_2": "b2"}
    config.evaluate.best_of, config.ap_checkpoint = 4, "ap"
    assert measures.choose(config)[-1] == "best_of"
    config.evaluate.measures = ["diversity"]
    assert measures.choose(config) == ["diversity"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"evaluate__measures": ["prediction", "best_of"]},
            r"prediction needs .*set input.*; .*best_of needs .*best_of to 2",
        ),
        ({"evaluate__measures": ["preferences"]}, "evaluate.preferences"),
        ({"evaluate__models__acsft": None, "evaluate__measures": ["steering"]}, "takes attributes"),
        ({"evaluate__judges": ["ap"], "ap_checkpoint": None}, "judge ap measures with"),
        ({"evaluate__best_of": 3, "ap_checkpoint": None}, "evaluate.best_of=3 needs ap_checkpoint"),
        ({"evaluate__combinations": ["quality:1"], "evaluate__models__acsft": None}, "evaluate.combinations are asked"),
        (
            {
                "evaluate__judges": ["demo"],
                "evaluate__models__sft": None,
                "evaluate__models__acsft": None,
                "input": "x",
            },
            "evaluate.judges=demo measure responses",
        ),
        ({"evaluate__judge": "ap", "ap_checkpoint": None}, "ap_checkpoint is not set"),
        ({"evaluate__steer": "bootstrapped"}, "evaluate.steer=bootstrapped"),
        ({"evaluate__prompts": None}, "evaluate.prompts is not set"),
    ],
)
def test_what_is_lacking_is_said_before_any_work(keys: dict[str, Any], message: str) -> None:
    base = {
        "evaluate__prompts": "p", "evaluate__judge": "demo", "ap_checkpoint": "ap", "evaluate__models__sft": "sft",
        "evaluate__models__acsft": "acsft",
    }  # fmt: skip
    with pytest.raises(UserError, match=message):
        check(configured(**base | keys))


def test_annotations_are_asked_of_the_records() -> None:
    config = configured(ap_checkpoint="ap", input="labels.jsonl", evaluate__measures=["annotators"])
    check(config)
    with pytest.raises(UserError, match=r"no response of input=labels\.jsonl has 'annotations' of two"):
        measures.choose(config, Inputs(annotated=0))


def test_judges_open_in_their_order_and_measure_what_models_are_compared_by() -> None:
    config = configured(evaluate__judge="demo", evaluate__judges=["ap", "demo"])
    score = lambda conversations: [{len(c.messages) - 1: {"quality": 2.0}} for c in conversations]  # noqa: E731
    schema = AttributeSchema("own", ("quality", "charm"), 4, unseen=("charm",))
    opened = judges.open_judges(JudgeContext(config, Path("."), schema, score), "quality")
    assert list(opened) == ["demo", "ap"] and opened["ap"].measured == ("quality",)
    assert opened["ap"].measure(PROMPTS[:2], ["a", "b"]) == [{"quality": 2.0}] * 2
    measured = opened["demo"].measure(
        [Conversation("x", (Message("user", "The fox color?"),))], ["The fox color is red."]
    )
    assert measured[0]["helpfulness"] == 4.0 and set(measured[0]) == set(opened["demo"].measured)
    with pytest.raises(UserError, match="evaluate.judge=demo cannot measure politeness"):
        judges.open_judges(JudgeContext(config, Path("."), schema, score), "politeness")


def test_pairs_of_preferences_are_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    good = {"messages": [{"role": "user", "content": "Hi"}], "chosen": "Hello!", "rejected": "What?"}
    path.write_text(json.dumps(good) + "\n")
    ((where, pair),) = read_pairs(str(path))
    assert where == f"{path}:1" and (pair.messages[0].content, pair.chosen, pair.rejected) == ("Hi", "Hello!", "What?")
    broken = [
        ({**good, "chosen": " "}, "chosen=' ' must be a response's text"),
        ({**good, "rejected": None}, "rejected=None"),
        ({"chosen": "a", "rejected": "b"}, "no list 'messages'"),
        ({**good, "messages": [*good["messages"], {"role": "assistant", "content": "x"}]}, "must end with the user's"),
    ]
    for bad, message in broken:
        path.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
        with pytest.raises(UserError, match=rf"pairs\.jsonl:2: .*{message}"):
            list(read_pairs(str(path)))
        rejected: list[tuple[str, str]] = []
        assert len(list(read_pairs(str(path), "skip", rejected))) == 1 and message in rejected[0][1]


def test_annotations_are_read_and_checked(tmp_path: Path) -> None:
    def read(annotations: Any) -> list[dict[str, float]]:
        path = tmp_path / "records.jsonl"
        reply = {"role": "assistant", "content": "x", "annotations": annotations}
        path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}, reply]}) + "\n")
        (record,) = read_records(str(path))
        return annotations_of(record.messages[1], "here")

    assert read([{"quality": 3, "humor": None}, {}, {"quality": 2.5}]) == [{"quality": 3.0}, {"quality": 2.5}]
    assert annotations_of(Message("assistant", "x"), "here") == []
    for bad, message in (
        (3, "must be a list"),
        ([[1]], r"\[0\]=.* must be an object"),
        ([{"quality": "high"}], r"\[0\]\.quality='high' must be a number"),
        ([{"quality": True}], "must be a number"),
    ):
        with pytest.raises(UserError, match=f"here: annotations.*{message}"):
            read(bad)
