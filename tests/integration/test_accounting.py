"""Every command that reads records accounts for all of them, and reads the records that other commands write."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steerlm_megatron.steer.records import read_records
from tests.helpers.cli import run_here as run
from tests.helpers.commands import summary

pytestmark = pytest.mark.integration
SHORT = "sampling.max_tokens=8"
FAST = {
    "evaluate": (SHORT, "evaluate.levels=[0,4]", "evaluate.max_prompts=3"),
    "generate": (SHORT,),
    "bootstrap": (SHORT,),
}
LONG = "The fox is red. " * 3000
ENDING = ("sampling.max_tokens=64", "sampling.temperature=9")  # so that a barely trained model ends some responses
SHARDS = ("experiment=quickstart", "data.source=messages", "data.valid_fraction=0", "tokenizer.train=false",
          "tokenizer.path=run/01-data/shards/train")  # fmt: skip
MODEL = ("experiment=quickstart", "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64",
         "train.row_tokens=512", "train.steps=1")  # fmt: skip


@pytest.fixture(autouse=True)
def in_folder(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "run").symlink_to(work / "run")
    monkeypatch.chdir(tmp_path)
    yield


def command(name: str, source: str, *more: str) -> tuple[str, ...]:
    """Return a command that reads ``source``, with the models of the shared run."""
    models = {
        "annotate": ("checkpoint=run/03-train_ap",),
        "generate": ("checkpoint=run/07-acsft",),
        "bootstrap": ("checkpoint=run/07-acsft", "ap_checkpoint=run/03-train_ap"),
        "evaluate": (
            "ap_checkpoint=run/03-train_ap",
            "evaluate.models.acsft=run/07-acsft",
            f"evaluate.prompts={source}",
        ),
    }[name]
    output = () if name == "evaluate" else (f"output={name}.jsonl",)
    return (name, f"input={source}", *output, *models, f"run_dir={name}", *FAST.get(name, ()), *more)


def good(rng: random.Random, number: int) -> dict[str, Any]:
    """Return a labelled record of the shared run with a distinct id."""
    records = [json.loads(line) for line in Path("run/04-annotate/train.jsonl").read_text().splitlines()]
    return {**rng.choice(records), "id": f"good {number}"}


def lines(seed: int) -> tuple[list[str], dict[str, int]]:
    """Return lines of a record file in random order, and how many there are of each kind."""
    rng = random.Random(seed)
    prompt = {"role": "user", "content": "Hi"}
    kinds = {
        "good": lambda n: json.dumps(good(rng, n)),
        "torn": lambda n: f'{{"id":"torn {n}","messages":[{{"role":"user","content":',
        "no user": lambda n: json.dumps({"id": f"{n}", "messages": [{"role": "assistant", "content": "x"}]}),
        "wrong role": lambda n: json.dumps({"id": f"{n}", "messages": [{"role": "oracle", "content": "x"}]}),
        "not an object": lambda n: json.dumps([n]),
        "long": lambda n: json.dumps(
            {"id": f"long {n}", "messages": [{**prompt, "content": LONG}, {"role": "assistant", "content": "Ok."}]}
        ),
        "blank": lambda n: "  ",
        "empty reply": lambda n: json.dumps(
            {"id": f"empty {n}", "messages": [prompt, {"role": "assistant", "content": rng.choice(["", " \n"])}]}
        ),
    }  # fmt: skip
    counts = {kind: rng.randint(1, 3) for kind in kinds} | {"good": 8}
    found = [make(number) for kind, make in kinds.items() for number in range(counts[kind])]
    rng.shuffle(found)
    return found, counts


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", ["annotate", "generate", "bootstrap", "evaluate"])
def test_in_is_out_and_what_was_skipped(name: str, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    content, of = lines(seed)
    Path("mixed.jsonl").write_text("\n".join(content) + "\n")
    assert run(*command(name, "mixed.jsonl", "data.on_error=skip", *(ENDING if name == "bootstrap" else ()))) == 0
    counts = summary(Path(name))["counts"]
    broken = of["torn"] + of["no user"] + of["wrong role"] + of["not an object"]
    read = len(content) - of["blank"]
    for part in [counts] if name != "evaluate" else [counts["input"], counts["prompts"]]:
        assert part["in"] == read and part["in"] == part["out"] + sum(part["skipped"].values())
        assert part["skipped"]["rejected"] == broken
    assert counts["in"] == counts["out"] + sum(counts["skipped"].values())
    rejected = [json.loads(line) for line in Path(name, "rejected.jsonl").read_text().splitlines()]
    at_fault = [i for i, line in enumerate(content, 1) if line.strip() and not _is_good(line)]
    listed = {entry["where"] for entry in rejected if json.loads(json.dumps(entry))["reason"]}
    assert listed >= {f"mixed.jsonl:{i}" for i in at_fault}
    log = Path(name, "log/rank_0.log").read_text()
    for entry in rejected:
        assert entry["line"].strip() and f"skipped {entry['where']}: " in log
    too_long = {
        "annotate": 0,
        "generate": of["long"],
        "bootstrap": 1,
    }  # bootstrap takes a prompt that several records share once
    if name != "evaluate":
        assert counts["skipped"].get("prompt_too_long", 0) == too_long[name]
        out = list(read_records(f"{name}.jsonl"))
        assert len(out) == counts["out"] == read - sum(counts["skipped"].values())
    if name == "annotate":
        assert counts["empty_replies"] == of["empty reply"]
        empty = [r for r in out if r.id.startswith("empty")]
        assert len(empty) == of["empty reply"] and all(not r.messages[-1].attributes for r in empty)


def _is_good(line: str) -> bool:
    try:
        roles = [m["role"] for m in json.loads(line)["messages"]]
    except (ValueError, TypeError):
        return False
    return roles[0] == "user"


@pytest.mark.parametrize("name", ["annotate", "generate", "bootstrap", "evaluate"])
def test_a_bad_line_is_an_error_unless_it_may_be_skipped(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.jsonl").write_text(json.dumps(good(random.Random(0), 0)) + "\n" + '{"id": "torn\n')
    assert run(*command(name, "bad.jsonl")) == 2
    assert "error: bad.jsonl:2: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["generate", "bootstrap", "evaluate"])
def test_a_prompt_that_is_too_long_says_what_to_set(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"id": "long", "messages": [{"role": "user", "content": LONG}, {"role": "assistant", "content": "Ok."}]}
    Path("long.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (good(random.Random(0), 0), record)))
    assert run(*command(name, "long.jsonl", "generation.max_sequence_tokens=2048")) == 2
    said = capsys.readouterr().err
    assert (
        "error: long.jsonl:2: the last turn of the prompt long" in said
        and "generation.max_sequence_tokens=2048" in said
    )
    assert "sampling.max_tokens" in said and "data.on_error=skip" in said


def test_nothing_left_is_an_error_that_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    Path("none.jsonl").write_text("{\n[]\n")
    assert run(*command("generate", "none.jsonl", "data.on_error=skip")) == 2
    assert "holds no record that can be used; 2 lines were rejected, the first: none.jsonl:1" in capsys.readouterr().err


def test_what_one_command_writes_the_next_one_reads() -> None:
    """Replies without text are included, since a barely trained model gives some."""
    prompts = "".join(
        json.dumps({"id": f"{i}", "messages": [{"role": "user", "content": f"Tell me about {i}."}]}) + "\n"
        for i in range(60)
    )
    Path("prompts.jsonl").write_text(prompts)
    assert run(*command("generate", "prompts.jsonl", "sampling.max_tokens=2", "sampling.temperature=9")) == 0
    content = Path("generate.jsonl").read_text().splitlines()
    blank = json.loads(content[0])
    blank["messages"][-1]["content"] = ""  # ensures one, whatever the model gave
    Path("generate.jsonl").write_text("\n".join([json.dumps(blank), *content[1:]]) + "\n")
    assert run(*command("annotate", "generate.jsonl")) == 0
    counts = summary(Path("annotate"))["counts"]
    assert counts["in"] == counts["out"] == 60 and counts["empty_replies"] >= 1
    for name in ("generate", "annotate"):
        assert run("preprocess", *SHARDS, f"data.input={name}.jsonl", f"data.output_dir={name} shards") == 0
    assert run(*command("evaluate", "annotate.jsonl")) == 0
    assert run(*command("bootstrap", "annotate.jsonl", *ENDING)) == 0
    assert run("preprocess", *SHARDS, "data.input=bootstrap.jsonl", "data.output_dir=round two") == 0


PARTIAL = {"quality": 3.0, "verbosity": 2.0}


def test_attributes_without_a_label_are_never_made_up(capsys: pytest.CaptureFixture[str]) -> None:
    """If two attributes have labels, the other three appear nowhere, up to the second round."""
    with Path("partial.jsonl").open("w") as file:
        for number in range(40):
            record = good(random.Random(number), number)
            for message in record["messages"]:
                if message.get("attributes"):
                    message["attributes"] = {name: message["attributes"][name] for name in PARTIAL}
                    message.pop("levels", None)
            file.write(json.dumps(record) + "\n")
    train = (*MODEL, "init_from=run/02-base")
    assert run("preprocess", *SHARDS, "data.input=partial.jsonl", "data.output_dir=one") == 0
    assert run("train_ap", *train, "data.train=one/train", "run_dir=ap") == 0
    assert "helpfulness, humor, toxicity" in capsys.readouterr().err
    assert run("annotate", "checkpoint=ap", "input=partial.jsonl", "output=annotated.jsonl", "run_dir=annotate") == 0
    values = [m.attributes for r in read_records("annotated.jsonl") for m in r.messages if m.role == "assistant"]
    assert values and all(v is not None and set(v) == set(PARTIAL) for v in values)
    assert run("preprocess", *SHARDS, "data.input=annotated.jsonl", "data.output_dir=two") == 0
    assert run("train_sft", *train, "data.train=two/train", "run_dir=sft") == 0
    one = ("checkpoint=sft", "input=partial.jsonl", "output=answers.jsonl", "run_dir=answers", SHORT)
    assert run("generate", *one) == 0
    assert all(set(r.extra["requested"]) == set(PARTIAL) for r in read_records("answers.jsonl"))
    capsys.readouterr()
    assert run("generate", *one, "attributes.best.humor=1", "overwrite=true") == 2
    assert "'humor' had no label" in capsys.readouterr().err
    assert run("evaluate", "ap_checkpoint=ap", "input=annotated.jsonl", "evaluate.models.acsft=sft", *FAST["evaluate"],
               "evaluate.prompts=partial.jsonl", "run_dir=evaluate") == 0  # fmt: skip
    found = json.loads(Path("evaluate/evaluation.json").read_text())
    assert set(found["ap"]) == set(found["steering"]) == set(PARTIAL)


@pytest.mark.parametrize("command_name", ["train_ap", "train_sft"])
def test_no_model_is_conditioned_on_nothing(command_name: str, capsys: pytest.CaptureFixture[str]) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    context = [*messages, {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    context[1] = {
        **context[1],
        "weight": 0,
        "attributes": {"quality": 3},
    }  # a label that only an untrained response has
    Path("bare.jsonl").write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"messages": context}) + "\n")
    assert run("preprocess", *SHARDS, "data.input=bare.jsonl", "data.output_dir=bare") == 0
    tiny = (*MODEL, "data.train=bare/train")
    assert run(command_name, *tiny, "run_dir=refused") == 2
    assert "no trained response has a value of attributes=demo" in capsys.readouterr().err
    if command_name == "train_sft":
        assert run(command_name, *tiny, "attributes=none", "run_dir=plain") == 0


def test_a_run_accounts_for_the_lines_that_it_deals_to_training_and_validation() -> None:
    content, of = lines(3)
    Path("mixed.jsonl").write_text("\n".join(content) + "\n")
    tiny = (*MODEL, "data.source=messages", "data.input=mixed.jsonl", "data.on_error=skip", "tokenizer.train=false",
            "tokenizer.path=run/01-data/shards/train", "data.valid_fraction=0.3", *FAST["evaluate"],
            "bootstrap.prompts=4")  # fmt: skip
    # The run is stopped by an error in its last step; its first step's counts are all that matters here.
    assert run("run", *tiny, "run_dir=all", "evaluate.judge=ap", "sampling.max_tokens=1") in (0, 2)
    counts = summary(Path("all/01-data"))["counts"]
    broken = of["torn"] + of["no user"] + of["wrong role"] + of["not an object"]
    assert counts["in"] == len(content) - of["blank"] == counts["out"] + sum(counts["skipped"].values())
    assert counts["skipped"]["rejected"] == broken
    assert len(Path("all/01-data/rejected.jsonl").read_text().splitlines()) == broken
