"""``evaluate`` with an LLM judge and with judges that are libraries, from question files to the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from data_tools.questions import convert
from tests.helpers.cli import run_here as run
from tests.helpers.judge_endpoint import JudgeStandIn, judging

pytestmark = pytest.mark.integration
EVIL = "<script>window.ran = true</script>"
ROWS = [
    {"question_id": 1, "category": "math", "turns": ["Count the foxes.", "Count the dogs."], "reference": ["2", "3"]},
    {"question_id": 2, "category": "writing", "turns": ["Tell me of a fox."]},
    {"question_id": 3, "category": "writing", "turns": ["Tell me of a dog."]},
]


@pytest.fixture(autouse=True)
def in_folder(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "run").symlink_to(work / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("steerlm_megatron.serve.chat_endpoint._BACKOFF_SEC", 0.01)
    yield


def evaluate(url: str, *more: str) -> int:
    return run(
        "evaluate", "evaluate.models.sft=run/06-sft", "evaluate.models.acsft=run/07-acsft", "evaluate.judge=demo",
        "evaluate.prompts=questions.jsonl", "evaluate.levels=[0,4]", "evaluate.attributes=[verbosity]",
        "sampling.max_tokens=8", "sampling.temperature=9", f"evaluate.llm_judge.url={url}", "run_dir=found", *more,
    )  # fmt: skip


def test_an_evaluation_by_judges_that_never_saw_the_attribute_model(capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    convert(["rows.jsonl"], "questions.jsonl")

    def says(messages: list[dict[str, str]]) -> str:
        pair = "=== Assistant B ===" in messages[1]["content"]
        return f"{EVIL} [[{'B' if pair else '7'}]]"

    how = JudgeStandIn(says)
    lexical = ["evaluate.judges=[textstat,vader]", "evaluate.judge_attributes.words=verbosity"]
    more = lexical if find_spec("textstat") and find_spec("vaderSentiment") else []
    assert evaluate("nowhere", "evaluate.llm_judge.baseline=chatgpt") == 2
    said = capsys.readouterr().err
    assert "'nowhere' must begin with http" in said and "baseline=chatgpt is not one of evaluate.models" in said
    assert evaluate("http://127.0.0.1:9", *more) == 2
    assert "evaluate.llm_judge.url=http://127.0.0.1:9/v1 does not answer" in capsys.readouterr().err
    with judging(how) as url:
        long = [{"question_id": 1, "turns": ["Short.", "The fox is red. " * 3000]}]
        Path("long.jsonl").write_text(json.dumps(long))
        convert(["long.jsonl"], "too_long.jsonl")
        assert evaluate(url, "evaluate.prompts=too_long.jsonl") == 2
        assert "the last turn of the prompt 1 has" in capsys.readouterr().err
        how.fault_of = lambda body: "cut" if len(how.asked) > 5 else None
        assert evaluate(url, *more, "evaluate.llm_judge.max_tries=1", "evaluate.llm_judge.concurrency=1") == 75
        assert "5 answers of the judge are kept in" in capsys.readouterr().err
        how.fault_of = lambda body: None
        assert evaluate(url, *more) == 0
    found = json.loads(Path("found/evaluation.json").read_text())
    wins, grades = found["measures"]["wins"], found["measures"]["grades"]
    assert wins["cost"]["cached"] + grades["cost"]["cached"] == 5
    assert wins["position_bias"]["first_place"]["value"] in (0.0, None), "None if all answers are equal"
    assert sum(wins["models"]["sft"][key] for key in ("won", "tied", "lost")) == 4, "three questions, one of two turns"
    assert set(grades["slices"]["category"]) == {"math", "writing"} and set(grades["slices"]["turn"]) == {"1", "2"}
    assert grades["models"]["acsft"] == {"value": 7.0, "low": 7.0, "high": 7.0, "n": 4}
    follow_up = next(b for b in how.asked if "Count the dogs." in b["messages"][1]["content"])
    assert "Count the foxes." in follow_up["messages"][1]["content"]
    assert not list(Path("found").glob("journal-*")) and Path("found/judged/answers.jsonl").exists()
    if more:
        curve = found["measures"]["steering"]["judges"]["textstat"]["curves"]["verbosity (words)"]
        assert curve["requested"] == [0, 4] and curve["measured"][0]["n"] == 3
    assert run("report", "input=found", "run_dir=reported") == 0
    page = Path("reported/report.html").read_text()
    assert EVIL not in page and "&lt;script&gt;window.ran" in page
