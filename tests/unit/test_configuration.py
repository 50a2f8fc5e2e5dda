"""Declarations of keys and commands, and the help, completion and errors that follow from them."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerlm_megatron.config import compose, document, help
from steerlm_megatron.config.commands import COMMANDS, readers
from steerlm_megatron.config.fields import above, at_least, between, one_of
from steerlm_megatron.config.schema import KEYS, RENAMED
from steerlm_megatron.errors import UserError
from tests.helpers.cli import run_here as run

ROOT = Path(__file__).resolve().parents[2]


def test_every_key_is_read_by_a_command_and_says_what_it_means() -> None:
    for key in KEYS.values():
        assert readers(key.name), f"{key.name} is read by nobody"
        assert key.help and not key.help.endswith("."), key.name


def test_every_declaration_names_keys_that_are_there() -> None:
    for command in COMMANDS.values():
        for read in (*command.reads, *command.needs):
            assert read in KEYS or any(name.startswith(f"{read}.") for name in KEYS), f"{command.name}: {read}"
        assert all(command.reads_key(key) for key in command.needs), command.name


def test_the_names_of_keys_are_an_interface() -> None:
    """A removed or renamed key breaks scripts. Enter the new name in RENAMED, then change this list."""
    frozen = (Path(__file__).with_name("configuration_keys.txt")).read_text().splitlines()
    assert sorted(KEYS) == frozen
    assert not set(RENAMED) & set(KEYS) and {new for new, _ in RENAMED.values()} <= set(KEYS)


def test_the_page_of_the_configuration_is_fresh() -> None:
    told = "make it again: python -m steerlm_megatron.config.document > docs/configuration.md"
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == document.page(), told


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_is_an_error_with_the_new_one(old: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train_sft", f"{old}=4") == 2
    assert f"error: {old} is now {RENAMED[old][0]}: " in capsys.readouterr().err


@given(st.data())
def test_a_key_that_a_command_does_not_read_is_refused_and_a_reader_named(data: st.DataObject) -> None:
    command = data.draw(st.sampled_from(sorted(COMMANDS)))
    foreign = [key for key in KEYS if not COMMANDS[command].reads_key(key)]
    key = data.draw(st.sampled_from(foreign))
    said = compose.misplaced_key(command, key)
    assert said is not None and said.startswith(f"{key}: {command} does not read it; ")
    assert any(name in said for name in readers(key))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["train_sft", "experiment=quickstart", "server.port=9"],
            ["server.port: train_sft does not read it; serve does"],
        ),
        (
            ["train_sft", "bootstrap.prompts=5", "server.port=9", "export.precision=bf16"],
            ["bootstrap.prompts", "bootstrap and run do", "server.port", "export.precision", "export does"],
        ),
        (["report", "engine=deepspeed"], ["engine: report does not read it"]),
        (["serve", "optim=tiny", "checkpoint=x"], ["optim: serve does not read it; train_ap, train_sft and run do"]),
        (["annotate", "+train.steps=1"], ["train.steps: annotate does not read it"]),
        (["annotate", "train.stepz=1"], ["train.stepz: no such key"]),
        (["generate", "generation.cuda_graphs=maybe"], ["generation.cuda_graphs: Value 'maybe' is not a valid bool"]),
        (["run", "experiment=quickstart", "server.port=1"], ["server.port: run does not read it; serve does"]),
        (
            ["annotate"],
            ["input is not set", "output is not set", "checkpoint is not set: name the run folder of train_ap"],
        ),
    ],
)  # fmt: skip
def test_what_is_said_of_a_command_line(
    arguments: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert all(words in said for words in expected), said


def test_an_experiment_may_set_what_another_command_reads(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("serve", "experiment=quickstart", "checkpoint=nowhere", "--cfg", "job") == 0
    assert "demo_conversations: 3000" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_a_commands_own_keys_within_100_columns(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= help.WIDTH
    for name, key in KEYS.items():
        shown = f"  {name}=" in text
        assert shown == (COMMANDS[command].reads_key(name) and name != "command"), name
        if shown:
            assert " ".join(key.help.split()[:3]) in " ".join(text.split()), name


def test_help_shows_the_values_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train_sft", "experiment=quickstart", "optim.lr=0.5", "--help") == 0
    text = capsys.readouterr().out
    assert "train.row_tokens=768 " in text and "optim.lr=0.5 " in text and "learning rate" in text


def test_help_of_a_wrong_command_line_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train_sft", "train.stepz=1", "--help") == 2
    assert "train.stepz: no such key; did you mean train.steps?" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("steerlm tr", {"train_ap", "train_sft"}),
        ("steerlm train_sft optim.l", {"optim.lr="}),
        ("steerlm train_sft server.p", set()),
        ("steerlm serve server.p", {"server.port=", "server.page=true", "server.page=false"}),
        (
            "steerlm train_sft experiment=",
            {f"experiment={file.stem}" for file in compose.conf_dir().glob("experiment/*.yaml")},
        ),
        ("steerlm train_sft engine.precision=", {"engine.precision=fp32", "engine.precision=bf16"}),
    ],
)
def test_completion(line: str, expected: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--completion", "bash") == 0
    script = capsys.readouterr().out
    words = line.split(" ")
    code = f"{script}\nCOMP_WORDBREAKS=' '; COMP_LINE='{line}'; COMP_POINT={len(line)}; COMP_CWORD={len(words) - 1}\n"
    code += f"COMP_WORDS=({' '.join(words)}); _steerlm; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert set(done.stdout.split()) == expected


def test_completion_of_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--completion", "csh") == 2
    assert "legal: bash zsh" in capsys.readouterr().err


def test_the_first_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from steerlm_megatron import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'hydra', 'omegaconf', 'numpy', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@given(st.floats(allow_nan=True), st.floats(-10, 10))
def test_rules_of_numbers(value: float, limit: float) -> None:
    assert (at_least(limit).broken(value) is None) == (value >= limit and value != math.inf)
    assert (above(limit).broken(value) is None) == (limit < value < math.inf)
    assert (between(limit, limit + 1).broken(value) is None) == (limit <= value <= limit + 1)


def test_rules_of_words() -> None:
    assert one_of("a", "b").broken("b") is None
    assert one_of("a", "b").broken("c") == "is not one of: a b" and one_of("a", "b").words == "a | b"


@pytest.mark.parametrize(
    "text",
    ["plain", "it's", "a b,c=[d]{e}", "back\\slash", "end\\", "\\'", 'two "marks"', "(x)*~!", "", "\\\\''"],
)
def test_a_quoted_value_is_what_it_was(text: str) -> None:
    assert compose._parsed(f"run_dir={compose.quoted(text)}", sweep=False).value() == text


def test_a_file_of_ones_own_is_taken_for_any_group(tmp_path: Path) -> None:
    schema, recipe = tmp_path / "my schema.yaml", tmp_path / "recipe.yaml"
    schema.write_text("name: mine\nnames: [politeness]\nmax_level: 5\nquality: politeness\nbest: {politeness: 5}\n")
    recipe.write_text(
        "# @package _global_\ndefaults:\n  - override /optim: tiny\ntrain: {row_tokens: 512}\n"
        "pipeline: {acsft: {train: {epochs: 2.0}}}\n"
    )
    overrides = [f"experiment={recipe}", f"attributes={schema}", "train.epochs=3.0"]
    found = compose.composed("run", overrides)
    assert found["attributes"]["names"] == ["politeness"] and found["attributes"]["max_level"] == 5
    assert found["train"]["row_tokens"] == 512 and found["pipeline"] == {"acsft": {"train": {"epochs": 2.0}}}
    assert found["optim"] == compose.composed("run", ["optim=tiny"])["optim"]
    assert found["train"]["epochs"] == 3.0
    compose.check("run", overrides)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("none.yaml", None, "cannot be read"),
        ("list.yaml", "- 1\n", "has no keys; write them as the files in conf/attributes do"),
        ("torn.yaml", "names: [a", "cannot be read"),
        ("key.yaml", "nmaes: [a]\n", "nmaes"),
    ],
)
def test_a_wrong_file_of_ones_own_is_named(name: str, text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        compose.check("run", [f"attributes={tmp_path / name}"])


def test_paths_of_ones_own_files_are_absolute_for_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["attributes=mine.yaml", "data.input=a.yaml", "evaluate.prompts=x.yaml", "model=tiny"]
    assert compose.absolute_files(given) == [f"attributes={tmp_path}/mine.yaml", *given[1:]]
