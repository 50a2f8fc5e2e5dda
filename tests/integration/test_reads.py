"""Every key that a command reads is one that it declares (``config/commands.py``)."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from steerlm_megatron.config import load
from steerlm_megatron.config.commands import COMMANDS, declared
from steerlm_megatron.config.schema import Config
from steerlm_megatron.stages import report_lineage
from tests.helpers.cli import run_here
from tests.helpers.commands import TINY

pytestmark = [pytest.mark.integration, pytest.mark.reads_work]
# These modules read the complete configuration, to store, copy or check it.
_WHOLE = ("dataclasses", "copy", "omegaconf", "steerlm_megatron.config", "steerlm_megatron.cli")
_SHAPE = ("model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64", "train.row_tokens=512")
_TRAIN = ("experiment=quickstart", *_SHAPE, "train.steps=2", "data.train=run/05-annotated_data/shards/train")
_EVALUATED = ("ap_checkpoint=run/03-train_ap", "input=some.jsonl", "evaluate.prompts=some.jsonl",
              "evaluate.models.acsft=run/07-acsft", "evaluate.max_prompts=1", "evaluate.levels=[0]",
              "sampling.max_tokens=4")  # fmt: skip
_DRAW = ("checkpoint=run/07-acsft", "input=some.jsonl", "output=out.jsonl")
COMMAND_LINES: dict[str, tuple[str, ...]] = {
    "preprocess": ("data.input=some.jsonl", "data.output_dir=made", "attributes=demo",
                   "tokenizer.path=run/01-data/shards/train"),
    "preprocess the embedded corpus": ("experiment=quickstart", "data.demo_conversations=60", "data.output_dir=demo"),
    "train_ap": _TRAIN,
    "train_sft": (*_TRAIN, "init_from=run/02-base", "profile.steps=[1,1]"),
    "train_sft with DeepSpeed": (*_TRAIN, "engine=deepspeed"),
    "annotate": ("checkpoint=run/03-train_ap", "input=some.jsonl", "output=out.jsonl"),
    "generate": (*_DRAW, "sampling.max_tokens=4"),
    "bootstrap": (*_DRAW, "ap_checkpoint=run/03-train_ap", "sampling.max_tokens=64", "sampling.temperature=9"),
    "weigh": ("checkpoint=run/07-acsft", "steerlm2.base=run/06-sft", "input=drawn.jsonl", "output=out.jsonl"),
    "train_sft on weighed responses": (
        *_TRAIN[:-1], "data.train=shards", "data.targets=weighed.jsonl", "train.objective=steerlm2",
        "init_from=run/07-acsft",
    ),
    "serve": ("checkpoint=run/07-acsft", "server.port=0"),
    "evaluate": _EVALUATED,
    "export": ("checkpoint=run/07-acsft", "output=exported"),
    "report": ("input=run/11-evaluate",),
    "run": (*TINY, "sampling.max_tokens=64", "sampling.temperature=9"),
}  # fmt: skip


@contextmanager
def recorded() -> Iterator[set[str]]:
    """Record the keys that are read of configurations inside the ``with``, except by modules in ``_WHOLE``."""
    seen: set[str] = set()
    known: dict[int, Any] = {}  # configurations and their sections, without the model of a checkpoint
    fill_one = load.filled

    def filled(config: Config, *layers: Any) -> Config:
        def keep(section: Any) -> None:
            known[id(section)] = section
            for value in vars(section).values():
                if dataclasses.is_dataclass(value):
                    keep(value)

        fill_one(config, *layers)
        keep(config)
        return config

    sections: dict[type, str] = {Config: ""}

    def collect(section: type, prefix: str) -> None:
        for field in dataclasses.fields(section):
            if isinstance(field.default_factory, type) and dataclasses.is_dataclass(field.default_factory):
                sections[field.default_factory] = f"{prefix}{field.name}."
                collect(field.default_factory, f"{prefix}{field.name}.")

    collect(Config, "")
    usual = object.__getattribute__

    def reader(self: Any, name: str) -> Any:
        kind = type(self)
        if not name.startswith("_") and name in kind.__dataclass_fields__ and id(self) in known:
            value = usual(self, name)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if type(value) not in sections and not caller.startswith(_WHOLE):
                seen.add(f"{sections[kind]}{name}")
            return value
        return usual(self, name)

    for section in sections:
        section.__getattribute__ = reader  # type: ignore[method-assign]
    try:
        # The configuration of a run that is reported is an input, as the model of a checkpoint is.
        reported = mock.patch.object(report_lineage, "from_container", lambda *layers: fill_one(Config(), *layers))
        with mock.patch.object(load, "filled", filled), reported:
            yield seen
    finally:
        for section in sections:
            del section.__getattribute__


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_what_a_command_reads_is_declared(
    case: str, work: Path, weighed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("run", "drawn.jsonl", "weighed.jsonl", "shards"):
        (tmp_path / name).symlink_to(weighed / name)
    monkeypatch.chdir(tmp_path)
    records = (work / "run/04-annotate/train.jsonl").read_text().splitlines()[:8]
    Path("some.jsonl").write_text("\n".join(records) + "\n")
    assert json.loads(records[0])["messages"]
    monkeypatch.setattr("steerlm_megatron.serve.server.uvicorn.Server.run", lambda *_, **__: None)
    command = case.split(" ", 1)[0]
    with recorded() as seen:
        assert run_here(command, *COMMAND_LINES[case], "run_dir=here") == 0
    assert seen, "nothing was recorded"
    assert not sorted(key for key in seen if not declared(command, key))


def test_every_command_is_in_this_test() -> None:
    assert {case.split(" ", 1)[0] for case in COMMAND_LINES} == set(COMMANDS)
