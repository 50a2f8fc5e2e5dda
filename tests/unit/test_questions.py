"""Question files of Vicuna-80 and MT-bench: their published forms, and what a record has of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.questions import convert, main
from steerlm_megatron.errors import UserError
from steerlm_megatron.evaluate.questions import follow_ups, question_of
from steerlm_megatron.steer.records import read_records

VICUNA = [
    {"question_id": 1, "text": "How can I improve?", "category": "generic"},
    {"question_id": 2, "category": "math", "turns": ["Solve x."]},
]
MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Compose.", "Rewrite."]},
    {"question_id": 111, "category": "math", "turns": ["Area?", "Radius?"], "reference": ["3", "5"]},
]
HUB = [{"prompt_id": 81, "category": "writing", "prompt": ["Compose.", "Rewrite."], "reference": []}]


def written(folder: Path, rows: list[Any], name: str = "question.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def records(folder: Path, rows: list[Any], **more: Any) -> list[Any]:
    convert([written(folder, rows)], str(folder / "out.jsonl"), **more)
    return list(read_records(folder / "out.jsonl", require_response=False))


def test_vicuna_questions(tmp_path: Path) -> None:
    first, second = records(tmp_path, VICUNA)
    assert (first.id, first.messages[0].content, first.extra) == ("1", "How can I improve?", {"category": "generic"})
    assert second.messages[0].content == "Solve x." and not follow_ups(second)


@pytest.mark.parametrize("rows", [MT_BENCH, HUB])
def test_mt_bench_questions_keep_turns_category_and_solutions(tmp_path: Path, rows: list[Any]) -> None:
    found = records(tmp_path, rows)
    assert follow_ups(found[0]) == ("Rewrite.",) and "reference" not in found[0].extra
    question = question_of(found[0])
    assert (question.category, question.asked, question.references) == ("writing", ("Compose.", "Rewrite."), ("", ""))
    if rows is MT_BENCH:
        assert question_of(found[1]).references == ("3", "5")
        assert records(tmp_path, rows, first_turn=True)[1].extra == {"category": "math", "reference": ["3"]}


def test_reference_answers_of_another_file(tmp_path: Path) -> None:
    answers = written(tmp_path, [{"question_id": 81, "choices": [{"turns": ["a", "b"]}]}], "gpt-4.jsonl")
    first, second = records(tmp_path, MT_BENCH, references=[answers])
    assert first.extra["reference"] == ["a", "b"] and second.extra["reference"] == ["3", "5"]
    with pytest.raises(UserError, match=r"gpt-4.jsonl: no question has the id 81 \(1 such references\)"):
        records(tmp_path, VICUNA, references=[answers])
    wrong = written(tmp_path, [{"question_id": 81}], "wrong.jsonl")
    with pytest.raises(UserError, match=r"wrong.jsonl:1: the row has no reference answer"):
        records(tmp_path, MT_BENCH, references=[wrong])


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": "x"}, "has no question_id"),
        ({"question_id": True, "text": "x"}, "has no question_id"),
        ({"question_id": 1}, "has no question"),
        ({"question_id": 1, "turns": []}, "has no question"),
        ({"question_id": 1, "turns": ["x", " "]}, "has no question"),
        ({"question_id": 1, "text": "x", "category": 3}, "category=3 must be a text"),
        ({"question_id": 1, "text": "x", "reference": [3]}, "reference must be a list"),
        ({"question_id": 2, "text": "x"}, "the id 2 occurs twice"),
    ],
)
def test_a_row_that_is_no_question_is_named(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=rf"question.jsonl:2: .*{told}"):
        records(tmp_path, [{"question_id": 2, "text": "fine"}, row])
    assert not (tmp_path / "out.jsonl").exists()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, MT_BENCH)
    assert main([file, "--output", str(tmp_path / "o.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "out": 2, "turns": 4, "with_reference": 1, "categories": {"math": 1, "writing": 1},
    }  # fmt: skip
    assert main([str(tmp_path / "none.jsonl"), "--output", str(tmp_path / "o.jsonl")]) == 2
    assert "no such file" in capsys.readouterr().err
