"""The scripts of examples/ run as users run them, on the tiny models of the shared pipeline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools import make_demo_corpus
from steerlm_megatron.steer.records import read_records
from tests.helpers.commands import ENVIRONMENT, steerlm

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.integration


def example(name: str, *arguments: str, cwd: Path, code: int = 0) -> str:
    """Run a script, check its exit code, and return what it prints."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, text=True, capture_output=True, timeout=600, check=False)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_each_script_is_run_here_and_says_what_it_shows() -> None:
    scripts = sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh"))
    assert scripts == [
        "annotate_jsonl.py",
        "label_by_program.py",
        "load_checkpoint.py",
        "serve_and_ask.py",
        "steer_with_transformers.py",
    ]
    here = Path(__file__).read_text()
    exported = Path(__file__).with_name("test_hf_base.py").read_text()  # which has a model that leaves
    for name in scripts:
        assert (EXAMPLES / name).read_text().startswith('"""') and (here + exported).count(f'"{name}"') > 1


def test_serve_and_ask(work: Path) -> None:
    question = ("--attribute", "quality", "--levels", "0", "4", "--max-tokens", "4")
    lines = example("serve_and_ask.py", "run/10-bootstrapped", *question, cwd=work)
    assert "quality=0: " in lines and "quality=4: " in lines


def test_serve_and_ask_says_why_there_is_no_server(work: Path) -> None:
    assert "needed is a language model" in example("serve_and_ask.py", "run/03-train_ap", cwd=work, code=1)


def test_annotate_jsonl(work: Path, tmp_path: Path) -> None:
    rows = [{"q": f"Question {n}?", "a": "An answer.", "other": n} for n in range(5)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = (str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--prompt", "q", "--response", "a")
    assert "5 responses scored" in example("annotate_jsonl.py", "run/03-train_ap", *files, cwd=work)
    scored = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    values = [row.pop("attributes") for row in scored]
    assert scored == rows and all(value and set(value) == set(values[0]) for value in values)
    (tmp_path / "in.jsonl").write_text('{"q": "What?", "a": ""}\n')
    assert "line 1: q or a is missing or empty" in example(
        "annotate_jsonl.py", "run/03-train_ap", *files, cwd=work, code=1
    )


@pytest.mark.parametrize(("run", "words"), [("10-bootstrapped", "answer: "), ("03-train_ap", "values: ")])
def test_load_checkpoint(run: str, words: str, work: Path) -> None:
    said = example("load_checkpoint.py", f"run/{run}", "--max-tokens", "4", cwd=work)
    assert words in said and " parameters\n" in said and "attributes: " in said


def test_a_program_labels_records_with_attributes_that_a_file_of_ours_names(tmp_path: Path) -> None:
    """These are the first commands of docs/own_attribute.md; the file is given to the ranks of a command as well."""
    make_demo_corpus.write(tmp_path / "texts", 60, 7)
    said = example("label_by_program.py", "texts/train.jsonl", "labelled.jsonl", cwd=tmp_path)
    assert "labelled with politeness brevity" in said
    records = list(read_records(tmp_path / "labelled.jsonl"))
    labels = [m.attributes for c in records for m in c.messages if m.role == "assistant"]
    assert all(one is not None and set(one) == {"politeness", "brevity"} for one in labels)
    levels = {one["politeness"] for one in labels if one}
    assert len(levels) > 2 and min(levels) >= 0 and max(levels) <= 5
    schema = f"attributes={os.path.relpath(EXAMPLES / 'politeness.yaml', tmp_path)}"
    made = ("data.input=labelled.jsonl", "data.output_dir=shards", "tokenizer.train=true", "tokenizer.vocab_size=400")
    steerlm("preprocess", schema, *made, cwd=tmp_path)
    small = ("data.train=shards/train", "train.steps=1", "train.row_tokens=256", "parallel.data=2", "run_dir=ap")
    steerlm("train_ap", schema, *small, cwd=tmp_path)
    (meta,) = (tmp_path / "ap").glob("checkpoints/step_*/meta.json")
    assert json.loads(meta.read_text())["label_counts"].keys() == {"politeness", "brevity"}
