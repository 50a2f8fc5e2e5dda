"""The report: its JSON, its verdicts, and a page that refers to nothing outside itself."""

from __future__ import annotations

import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from steerlm_megatron.report.data import report_data
from steerlm_megatron.report.terminal import terminal_table
from steerlm_megatron.report.write import write_report

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
        "bootstrapped": {"mean": 3.0, "sem": 0.1, "n": 64},
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
    assert data["quality"] == {"sft": 2.0, "acsft": 3.0, "bootstrapped": 3.0}
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
