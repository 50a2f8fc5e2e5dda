"""The report: its JSON, its verdicts, and a page that refers to nothing outside itself."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from steerlm_megatron.files import to_strict_json
from steerlm_megatron.report.data import report_data
from steerlm_megatron.report.markdown import render_markdown
from steerlm_megatron.report.page import policy
from steerlm_megatron.report.plots import calibration_plot
from steerlm_megatron.report.run_sections import run_sections
from steerlm_megatron.report.terminal import terminal_table
from steerlm_megatron.report.words import cell, model_title, verdict_word
from steerlm_megatron.report.write import write_report
from steerlm_megatron.stages.bootstrap_stats import statistics
from steerlm_megatron.steer.attributes import AttributeSchema

RESULTS: dict[str, Any] = {
    "title": "Quick <start>",
    "judge": "demo",
    "max_level": 4,
    "ap": {
        "quality": {"mse": 0.3, "mae": 0.4, "pearson": 0.9, "spearman": 0.8, "constant_mse": 1.0, "n": 1234},
        "humor": {"mse": 0.2, "mae": 0.3, "pearson": 0.7, "spearman": math.nan, "constant_mse": 0.9, "n": 50},
    },
    "steering": {
        "quality": {"requested": [0, 2, 4], "measured": [0.5, 1.5, 3], "std": [0.1, 0.2, 0.3], "sample_spearman": 0.9},
        "humor": {"requested": [0, 4], "measured": [1.0, 2.0], "std": [0.1, 0.1], "spearman": 1.0},
    },
    "quality_detail": {
        "sft": {"mean": 2.0, "sem": 0.1, "n": 64},
        "acsft": {"mean": 3.0, "sem": 0.1, "n": 64},
        "bootstrapped": {"mean": 3.5, "sem": 0.1, "n": 64},
    },
    "timings": {"train_ap": 12.0, "train_sft": 100.0},
    "versions": {"python": "3.11"},
    "config": "key: <script>alert('config')</script>",
    "examples": [
        {
            "prompt": 'Say <b>hello</b> & "bye"',
            "responses": [
                {"attributes": {"quality": 4}, "text": "<script>alert(1)</script>\nhttp", "measured": {"quality": 3.5}}
            ],
        }
    ],
}


def changed(**parts: Any) -> dict[str, Any]:
    return {**copy.deepcopy(RESULTS), **parts}


def test_json_has_the_agreed_shape(tmp_path: Path) -> None:
    html_path, json_path = write_report(tmp_path, RESULTS)
    assert (html_path, json_path) == (tmp_path / "report.html", tmp_path / "report.json")
    data = json.loads(json_path.read_text())
    assert set(data) == {
        "ap", "steering", "quality", "quality_detail", "judge", "checks", "timings", "versions", "examples"
    }  # fmt: skip
    assert set(data["ap"]["quality"]) == {"mse", "mae", "pearson", "spearman", "constant_mse", "n"}
    assert data["ap"]["humor"]["spearman"] is None
    assert set(data["steering"]["quality"]) == {"requested", "measured", "spearman", "sample_spearman", "std"}
    assert data["steering"]["quality"]["spearman"] == pytest.approx(1.0)
    assert data["quality"] == {"sft": 2.0, "acsft": 3.0, "bootstrapped": 3.5}
    assert all(check["measured"] and check["held"] for check in data["checks"].values())


def test_page_is_escaped_self_contained_and_reproducible(tmp_path: Path) -> None:
    html_path, _ = write_report(tmp_path, RESULTS)
    page = html_path.read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "Say &lt;b&gt;hello&lt;/b&gt; &amp;" in page and "Quick &lt;start&gt;" in page
    assert not re.search(r"(src|href)\s*=\s*['\"](?!data:)", page) and "@import" not in page and "url(" not in page
    assert page.count("data:image/svg+xml;base64,") == 4  # the plots of ap, of two curves, and of quality
    assert "not measured" not in page.lower()
    assert write_report(tmp_path / "again", RESULTS)[0].read_text() == page


def test_the_length_predictor_stands_beside_the_model_where_it_was_measured(tmp_path: Path) -> None:
    ap = {
        name: {**RESULTS["ap"]["quality"], "length_mse": 0.5, "length_spearman": 0.4, "length_gain_low": low, **more}
        for name, low, more in (
            ("quality", 0.1, {"length_gain_high": 0.3}),
            ("humor", -0.1, {"length_gain_high": 0.3}),
            ("toxicity", -0.3, {"length_gain_high": -0.1}),
            ("violence", math.nan, {"length_gain_high": math.nan}),
        )
    }
    results = changed(ap=ap)
    html_path, json_path = write_report(tmp_path, results)
    page, data = Elements(html_path.read_text()), json.loads(json_path.read_text())
    assert data["ap"]["quality"]["length_mse"] == 0.5 and data["ap"]["violence"]["length_gain_low"] is None
    assert "length's Spearman" in page.text and "0.100 to 0.300" in page.text
    assert "length's Spearman" not in write_report(tmp_path / "without", RESULTS)[0].read_text()
    console = Console(width=160, record=True, quiet=False, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(terminal_table(results))
    assert "below: quality; not told apart: humor; above: toxicity\n" in capture.get()
    with console.capture() as capture:
        console.print(terminal_table(RESULTS))
    assert "95 %" not in capture.get()


def a_round(number: int) -> dict[str, Any]:
    """Return what ``bootstrap.json`` says of a round, and the round."""
    before = [("the red fox ran home", {"quality": 2.0, "humor": 1.0}), ("a cow", {"quality": 3.0, "humor": 0.0})]
    kept = [("the fox", {"quality": 4.0, "humor": 2.0}), ("the fox ran", {"quality": 3.6, "humor": 1.0})]
    asked = [({"quality": 4, "humor": level}, values) for level, (_, values) in enumerate(kept)]
    schema = AttributeSchema("own", ("quality", "humor"), 4)
    return {
        "round": number,
        "combinations": {"drawn": "frequency", "number": 3, "quality": 4},
        "counts": {"drawn": 9, "kept": 2, "left_out": {"unfinished": 4, "not quality>=3": 3}},
        **to_strict_json(statistics(before, kept, asked, schema, 1)),
    }


def test_rounds_of_bootstrapping_have_sections_rows_and_a_place_in_the_order(tmp_path: Path) -> None:
    detail = {**RESULTS["quality_detail"], "bootstrapped_2": {"mean": 4.0, "sem": 0.1, "n": 64}}
    results = changed(bootstrap=[a_round(1), a_round(2)], quality_detail=detail)
    html_path, json_path = write_report(tmp_path, results)
    page, data = Elements(html_path.read_text()), json.loads(json_path.read_text())
    assert [one["round"] for one in data["bootstrap"]] == [1, 2]
    assert data["bootstrap"][0]["attributes"]["quality"]["asked"]["pearson"] is None
    assert data["quality"]["bootstrapped_2"] == 4.0 and "round 2" in page.text
    for words in ("Bootstrapped responses: round 2", "3 best combinations, drawn by their frequency", "left out: not",
                  "not quality>=3", "distinct-2", "self-BLEU", "2 of each"):  # fmt: skip
        assert words in page.text, words
    assert html_path.read_text().count("data:image/svg+xml;base64,") == 4 + 2 * 3  # lengths and two attributes
    order = data["checks"]["quality_order"]
    assert order["statement"].endswith("plain SFT < ACSFT ≤ bootstrapped ≤ round 2") and order["held"]
    assert order["cases"]["bootstrapped ≤ round 2"] is True
    console = Console(width=160, file=None)
    with console.capture() as capture:
        console.print(terminal_table(results))
    said = capture.get()
    assert "Bootstrapping, round 2: 2 of 9 responses kept (left out: unfinished 4, not quality>=3 3)" in said
    assert "round 2 4.00" in said
    alone = write_report(tmp_path / "alone", {"bootstrap": [a_round(1)]})[0].read_text()
    assert "<h2>Bootstrapped responses</h2>" in alone and "Bootstrapped responses" not in (
        write_report(tmp_path / "without", RESULTS)[0].read_text()
    )


@pytest.mark.parametrize(
    ("name", "title"),
    [("sft", "plain SFT"), ("bootstrapped", "bootstrapped"), ("bootstrapped_12", "round 12"), ("my_2", "my_2")],
)
def test_what_a_model_is_called(name: str, title: str) -> None:
    assert model_title(name) == title


class Elements(HTMLParser):
    """Parses a page as a browser would: its tags, the values of their attributes, its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = """<script>alert('1')</script><img src=x onerror="alert(2)">' onload='x' " onclick="y" &amp; {{ 7 * 7 }}"""


def test_html_in_any_value_is_shown_as_text_everywhere(tmp_path: Path) -> None:
    """Answers, and every other value, may be untrusted text, none of which may become markup of the page."""
    places = {
        where: f"{where}{HOSTILE}"
        for where in ("title", "note", "judge", "ap", "curve", "model", "prompt", "answer", "by", "asked", "level",
                      "got", "step", "package", "version", "config")
    }  # fmt: skip
    curve = {"requested": [0, 4], "measured": [1.0, 2.0], "std": [0.1, 0.1], "sample_spearman": 0.5}
    response = {
        "model": places["by"],
        "text": places["answer"],
        "attributes": {places["asked"]: places["level"]},
        "measured": {places["got"]: 1.5},
    }
    results = {
        "title": places["title"],
        "notes": [places["note"]],
        "judge": places["judge"],
        "ap": {places["ap"]: {"mse": 2.0, "constant_mse": 1.0, "n": 3}},
        "steering": {places["curve"]: curve},
        "quality": {places["model"]: 1.0},
        "examples": [{"prompt": places["prompt"], "responses": [response]}],
        "timings": {places["step"]: 1.0},
        "versions": {places["package"]: places["version"]},
        "config": places["config"],
    }
    page = write_report(tmp_path, results)[0].read_text()
    found, plain = Elements(page), Elements(write_report(tmp_path / "plain", RESULTS)[0].read_text())
    assert found.tags <= plain.tags and "script" not in found.tags
    assert {name for name, _ in found.attributes} == {name for name, _ in plain.attributes}
    for where, value in places.items():
        assert value in found.text, where
    assert ("alt", f"measured over requested {places['curve']}") in found.attributes
    assert "<script" not in page and "<img src=x" not in page and "49" not in found.text


def test_nothing_measured_is_said_not_asserted(tmp_path: Path) -> None:
    html_path, json_path = write_report(tmp_path, {})
    data = json.loads(json_path.read_text())
    assert "ap" not in data and "steering" not in data and "quality" not in data
    assert all(check["measured"] is False and check["held"] is None for check in data["checks"].values())
    page = html_path.read_text()
    assert page.count("Not measured in this run") == 6 and 'class="badge yes"' not in page


@pytest.mark.parametrize(
    ("parts", "name", "held"),
    [
        ({"ap": {"humor": {"mse": 1.0, "constant_mse": 1.0}}}, "ap_beats_constant", False),
        ({"ap": {"humor": {"mse": math.nan, "constant_mse": 1.0}}}, "ap_beats_constant", None),
        ({"steering": {"humor": {"requested": [0, 1, 2], "measured": [2.0, 2.0, 2.0]}}}, "steering_monotone", False),
        ({"steering": {"humor": {"requested": [0, 1, 2], "measured": [1.0, 3.0, 2.0]}}}, "steering_monotone", False),
        ({"steering": {"humor": {"requested": [0, 1], "measured": [1.0, None]}}}, "steering_monotone", None),
        ({"steering": {"humor": {"requested": [0], "measured": [1.0]}}}, "steering_monotone", None),
        ({"quality": {"sft": 1.0, "acsft": 1.0, "bootstrapped": 2.0}}, "quality_order", False),
        ({"quality": {"sft": 1.0, "acsft": 2.0, "bootstrapped": 1.9}}, "quality_order", False),
        ({"quality": {"sft": 1.0, "acsft": 2.0}}, "quality_order", True),
        ({"quality": {"acsft": 2.0}}, "quality_order", None),
    ],
)
def test_verdicts(parts: dict[str, Any], name: str, held: bool | None, tmp_path: Path) -> None:
    results = changed(**parts)
    check = report_data(results)["checks"][name]
    assert check["held"] is held and check["measured"] is (held is not None)
    write_report(tmp_path, results)


def figure(value: float, low: float, high: float, n: int = 64) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": n}


CURVE = {"requested": [0, 2, 4], "measured": [1.0, 1.2, 1.3], "spearman": 1.0, "sample_spearman": 0.1, "std": [1, 1, 1]}
PAIR = {"low": "acsft", "high": "bootstrapped"}


@pytest.mark.parametrize(
    ("parts", "name", "word", "undecided"),
    [
        ({"steering": {"humor": {**CURVE, "slope": figure(0.1, 0.05, 0.2)}}}, "steering_monotone", "yes", []),
        ({"steering": {"humor": {**CURVE, "slope": figure(0.1, -0.1, 0.2)}}}, "steering_monotone", "not told apart",
         ["humor"]),
        ({"ap": {"humor": {"mse": 0.9, "constant_mse": 1.0, "constant_gain_low": -0.1, "constant_gain_high": 0.3}}},
         "ap_beats_constant", "not told apart", ["humor"]),
        ({"ap": {"humor": {"mse": 0.9, "constant_mse": 1.0, "constant_gain_low": 0.05, "constant_gain_high": 0.15}}},
         "ap_beats_constant", "yes", []),
        ({"quality_pairs": [{**PAIR, "difference": figure(0.03, -0.146, 0.206)}]}, "quality_order", "not told apart",
         ["ACSFT ≤ bootstrapped"]),
        ({"quality_pairs": [{**PAIR, "difference": figure(0.03, 0.01, 0.05)}]}, "quality_order", "yes", []),
        ({"quality_pairs": [{**PAIR, "difference": figure(-0.3, -0.4, -0.2)}]}, "quality_order", "no", []),
        # What was written without paired differences has standard errors: 3.00 ± 0.10 against 3.03 ± 0.10 says nothing.
        ({"quality": {"sft": 2.0, "acsft": 3.0, "bootstrapped": 3.03}}, "quality_order", "not told apart",
         ["ACSFT ≤ bootstrapped"]),
    ],
)  # fmt: skip
def test_an_interval_that_includes_zero_is_no_yes(
    parts: dict[str, Any], name: str, word: str, undecided: list[str]
) -> None:
    check = report_data(changed(**parts))["checks"][name]
    assert verdict_word(check) == word and check["undecided"] == undecided
    assert ("not told apart" in check["detail"]) == bool(undecided)


SECTIONS: dict[str, Any] = {
    "prediction": {
        "version": 1,
        "title": "Attribute prediction, with intervals",
        "attributes": {
            "humor": {
                "confusion": [[1, 0, 0, 0, 0]] * 5,
                "calibration": {"bins": [{"predicted": 1.0, "label": figure(1.5, 1.2, 1.8, 20)}] * 2},
            }
        },
        "tables": [{"title": "Agreement", "columns": ["attribute", "MSE"], "rows": [["humor", figure(0.5, 0.4, 0.6)]]}],
    },
    "steering": {
        "version": 1,
        "title": "Steering, by every judge",
        "words": ["How to read it."],
        "judges": {"demo": {"cross_talk": {"quality": {"quality": figure(1.0, 0.9, 1.1), "humor": figure(0, -1, 1)}}}},
        "summary": [["strongest cross-talk", figure(-0.25, -0.3, -0.2)]],
        "tables": [],
    },
    "own": {
        "version": 7,
        "title": "A measure <b>of</b> another",
        "words": ["<i>Words</i>."],
        "tables": [
            {"title": "Seen", "columns": ["model", "wins", "note"], "rows": [["a", 1234, "x"], ["b", None, None]]},
            {"title": "Folded", "columns": ["n"], "rows": [[0.123456]], "folded": True},
        ],
    },
}


def test_a_calibration_plot_shows_single_responses_where_there_are_any() -> None:
    calibration = SECTIONS["prediction"]["attributes"]["humor"]["calibration"]
    points = [[0.5 + 0.01 * place, float(place % 5)] for place in range(100)]
    without, shown = calibration_plot("humor", calibration, 4), calibration_plot("humor", calibration, 4, points)
    assert shown.count("<use ") - without.count("<use ") >= 100
    assert shown == calibration_plot("humor", calibration, 4, points), "nothing in it is random"


def test_sections_of_measures_are_shown_and_one_that_is_unknown_as_tables(tmp_path: Path) -> None:
    results = changed(measures=SECTIONS)
    html_path, json_path = write_report(tmp_path, results)
    html, data = html_path.read_text(), json.loads(json_path.read_text())
    page = Elements(html)
    assert data["measures"]["own"]["version"] == 7
    assert html.count("data:image/svg+xml;base64,") == 4 + 2  # a calibration curve and a matrix of cross-talk
    for words in ("Agreement", "0.500 (0.400 to 0.600)", "How to read it.", "A measure <b>of</b> another",
                  "<i>Words</i>.", "1,234", "0.123"):  # fmt: skip
        assert words in page.text, words
    assert "<summary>Folded</summary>" in html and "i" not in page.tags and "<b>of" not in html
    assert html.index("Agreement") < html.index("How to read it.") < html.index("A measure &lt;b&gt;")
    assert '<td>a</td><td class="n">1,234</td><td>x</td>' in html, "columns with words stand left, numbers right"
    console = Console(width=160, file=None)
    with console.capture() as capture:
        console.print(terminal_table(results))
        console.print(terminal_table(data))
    assert capture.get().count("strongest cross-talk -0.250 (-0.300 to -0.200)") == 2
    assert write_report(tmp_path / "again", results)[0].read_text() == html


def test_intervals_stand_beside_means(tmp_path: Path) -> None:
    detail = {name: {**row, "low": row["mean"] - 0.2, "high": row["mean"] + 0.2}
              for name, row in RESULTS["quality_detail"].items()}  # fmt: skip
    curve = {**RESULTS["steering"]["quality"], "low": [0.4, 1.4, 2.9], "high": [0.6, 1.6, None]}
    results = changed(quality_detail=detail, steering={"quality": curve})
    page = Elements(write_report(tmp_path, results)[0].read_text())
    assert "2.000 (1.800 to 2.200)" in page.text
    assert json.loads((tmp_path / "report.json").read_text())["steering"]["quality"]["high"][-1] is None
    console = Console(width=160, file=None)
    with console.capture() as capture:
        console.print(terminal_table(results))
    assert "plain SFT 2.00 (1.80 to 2.20)" in capture.get()


def test_an_evaluation_from_before_there_were_measures_is_still_reported(tmp_path: Path) -> None:
    stored = json.loads((Path(__file__).with_name("evaluation_without_measures.json")).read_text())
    html_path, json_path = write_report(tmp_path, stored)
    data = json.loads(json_path.read_text())
    assert "measures" not in data and set(data["ap"]) == set(data["steering"])
    assert {verdict_word(check) for check in data["checks"].values()} <= {"yes", "no", "not told apart"}
    assert "Not measured in this run: the attribute" not in html_path.read_text()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (figure(0.5, 0.25, 0.75), "0.500 (0.250 to 0.750)"),
        (figure(1234.5, math.nan, math.nan), "1,234"),
        ({"value": None, "low": None, "high": None}, "–"),
        (12.3456, "12.35"), (123.456, "123.5"), (7, "7"), (None, "–"), ("text", "text"),
    ],
)  # fmt: skip
def test_how_a_cell_is_written(value: Any, words: str) -> None:
    assert cell(value) == words


def test_partly_measured_names_what_is_missing() -> None:
    check = report_data(changed(quality={"sft": 1.0, "acsft": 2.0}))["checks"]["quality_order"]
    assert "not measured: ACSFT ≤ bootstrapped" in check["detail"]


def test_terminal_table() -> None:
    console = Console(width=130, record=True, quiet=False, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(terminal_table(RESULTS, "runs/x/report.html"))
        console.print(terminal_table(json.loads(json.dumps(report_data(RESULTS)))))
    text = capture.get()
    assert "0.50 → 3.00" in text and "plain SFT 2.00 · ACSFT 3.00" in text and "runs/x/report.html" in text
    with console.capture() as capture:
        console.print(terminal_table({}))
    assert capture.get().count("not measured") == 3


def test_markdown_has_the_tables_and_no_markup_of_others(tmp_path: Path) -> None:
    results = changed(title=HOSTILE, judge="a|b [x](http://y) `z`", measures=SECTIONS, bootstrap=[a_round(1)])
    write_report(tmp_path, results)
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# &lt;script&gt;") and "<script" not in text and "<b>" not in text
    assert "a\\|b \\[x\\](http://y) \\`z\\`" in text
    assert "| quality | 0.300 | 1.000 |" in text and "| humor | 0.500 (0.400 to 0.600) |" in text
    assert "## What was expected, and whether it held" in text and "## Bootstrapped responses, round 1" in text
    rows = [line for line in text.splitlines() if line.startswith("| quality | 0 |")]
    assert rows == ["| quality | 0 | 0.50 | 1.000 | – |"]
    assert "\n## " not in render_markdown({"checks": {}, "timings": {}, "versions": {}}, {}).replace("## Versions", "")


def test_the_page_allows_its_own_style_and_script_alone(tmp_path: Path) -> None:
    responses = [{"model": "acsft", "prompt": "p", "asked": {"humor": 1}, "best": True, "text": HOSTILE,
                  "measured": {"humor": 0.5}}]  # fmt: skip
    page = write_report(tmp_path, changed(responses=responses, prompt_texts={"p": HOSTILE}))[0].read_text()
    found = Elements(page)
    contents = [value or "" for name, value in found.attributes if name == "content"]
    (policy_said,) = [value for value in contents if value.startswith("default-src 'none'")]
    for tag in ("style", "script"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy_said
    assert "require-trusted-types-for" in policy_said and "script-src" not in policy("", None)
    (embedded,) = re.findall(r'<script id="samples-data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert json.loads(embedded)["groups"][0]["r"][0]["t"] == HOSTILE
    assert page.count("alert('1')") == 2, "as a prompt and as a response, in the JSON alone"
    assert "Responses at different levels" not in page and "All 1 response." in found.text


def test_what_a_run_left_is_shown_with_its_plots(tmp_path: Path) -> None:
    curve = {"loss": [[1, 2.0], [2, 1.5]], "valid": [[2, 1.6]], "step": 2, "step_sec": 0.5, "tokens_per_sec": 900.0,
             "peak_memory_gib": None, "seconds": 61.0}  # fmt: skip
    step = {"name": "03-train_ap", "command": "train_ap", "status": "failed", "from": ["01-data", "<i>x</i>"],
            "in": None, "out": None, "steps": 2, "conversations": 9, "tokens": 1000, "labels": 7,
            "seconds": None}  # fmt: skip
    source = {"name": "OASST", "kind": "corpus", "licence": None, "used_by": "01-data"}
    results = changed(
        training={"03-train_ap": curve},
        lineage={"steps": [step], "sources": [source]},
        distributions={"humor": {"01-data": {"mean": 1.5, "levels": [1, 2, 3]}}},
    )
    html, data = write_report(tmp_path, results)
    page, plain = html.read_text(), html.with_suffix(".md").read_text()
    assert page.count("data:image/svg+xml;base64,") == 4 + 2, "one curve, and the levels of one attribute"
    for text in (Elements(page).text, plain):
        for words in ("train_ap (failed)", "not known here", "What was trained on what", "Levels before and after"):
            assert words in text, words
    assert "<i>" not in page and "| 03-train_ap | 2 | 1.500 | 1.600 | 900.0 | 0.500 | – | 1:01 |" in plain
    assert json.loads(data.read_text())["training"]["03-train_ap"]["valid"] == [[2, 1.6]]
    assert [one["title"] for one in run_sections(json.loads(data.read_text()))] == [
        "Levels before and after annotation and bootstrapping", "Training", "What was trained on what"
    ]  # fmt: skip
