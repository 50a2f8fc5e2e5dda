"""``meta.json``: properties that follow from the task, and checkpoints of the previous format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steerlm_megatron.errors import UserError
from steerlm_megatron.train.meta import TASKS, CheckpointMeta, read_meta, task_of, write_meta


def meta(task: str, **more: Any) -> CheckpointMeta:
    return CheckpointMeta(7, task, {"num_layers": 2}, 300, None, {"name": "steerlm"}, "hash", **more)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_read_back_with_what_follows_from_it(task: str, tmp_path: Path) -> None:
    write_meta(tmp_path, meta(task))
    found = read_meta(tmp_path)
    assert (found.task, found.head, found.conditioned) == (task, TASKS[task].head, TASKS[task].conditioned)
    assert task_of(TASKS[task].view) == task
    assert not {"head", "conditioned"} & set(json.loads((tmp_path / "meta.json").read_text())), "one field says it all"


@pytest.mark.parametrize(
    ("head", "conditioned", "view", "expected"),
    [
        ("regression", False, "ap", "ap_regression"),
        ("regression", False, None, "ap_regression"),  # an export, which does not name its view
        ("lm", True, "acsft", "acsft"),
        ("lm", True, None, "acsft"),
        ("lm", False, "sft", "sft"),
        ("lm", False, "lm", "lm"),
        ("lm", False, None, "sft"),
    ],
)
def test_a_checkpoint_of_the_format_before_opens(
    head: str, conditioned: bool, view: str | None, expected: str, tmp_path: Path
) -> None:
    write_meta(tmp_path, meta("lm", data={} if view is None else {"task": view}))
    content = json.loads((tmp_path / "meta.json").read_text())
    del content["task"], content["label_counts"], content["sha256"]
    content |= {"head": head, "conditioned": conditioned, "format": 3}
    (tmp_path / "meta.json").write_text(json.dumps(content))
    found = read_meta(tmp_path)
    assert (found.task, found.head, found.conditioned) == (expected, head, conditioned)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "format 2, this version reads 3 and 4"),
        ({"task": "ranking"}, "this version knows: lm sft"),
    ],
)
def test_what_this_version_does_not_know_is_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_meta(tmp_path, meta("lm"))
    content = json.loads((tmp_path / "meta.json").read_text()) | change
    del content["sha256"]
    (tmp_path / "meta.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        read_meta(tmp_path)
