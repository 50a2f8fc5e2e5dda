"""SteerLM 2.0 as commands: drawing groups of responses, weighing them, training on them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steerlm_megatron.config.load import finalize, from_container
from steerlm_megatron.data.groups import TARGETS, shares
from steerlm_megatron.data.views import build_documents, make_sample
from steerlm_megatron.evaluate.label_likelihood import log_likelihood
from steerlm_megatron.model.weights import global_names
from steerlm_megatron.runtime import parallel
from steerlm_megatron.stages.session import load_model
from steerlm_megatron.steer.records import Conversation, read_records, write_records
from tests.helpers.cli import run_here
from tests.helpers.commands import TINY, steerlm, summary
from tests.helpers.reference import forward

pytestmark = [pytest.mark.integration, pytest.mark.reads_work]
POLICY, BASE = "checkpoint=run/07-acsft", "steerlm2.base=run/06-sft"
WEIGH = ("weigh", POLICY, BASE, "input=drawn.jsonl")
_SHAPE = tuple(key for key in TINY if key.startswith(("experiment", "model", "train.row_tokens", "train.log")))
TRAIN = (
    "train_sft", *_SHAPE, "init_from=run/07-acsft", "data.train=shards", "train.objective=steerlm2", "train.steps=2",
    "data.targets=weighed.jsonl", "optim.warmup_steps=0", "optim.lr=1e-5", "optim.min_lr=1e-5",
)  # fmt: skip


@pytest.fixture(autouse=True)
def inside(weighed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder with groups of responses that were drawn and weighed, and the models of the shared run."""
    for entry in weighed.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)


def weights(path: str) -> dict[str, dict[str, Any]]:
    return {record.id: record.extra[TARGETS] for record in read_records(path)}


def plain_log_probability(checkpoint: str, conversation: Conversation, conditioned: bool) -> float:
    """Return log P of the last response by a forward pass of plain torch over this conversation alone, in float64."""
    parallel.initialize(from_container({}).parallel, 0)
    config = finalize(from_container({"command": "weigh", "engine": {"precision": "fp32"}}))
    loaded = load_model(checkpoint, config, "checkpoint")
    params = {name: p.detach().double() for name, p in global_names(loaded.model)}
    if not conditioned:
        bare = tuple(replace(message, attributes=None) for message in conversation.messages)
        conversation = replace(conversation, messages=bare)
    schema = loaded.schema if conditioned else None
    document = build_documents([conversation], loaded.tokenizer, loaded.template, schema)[0]
    sample = make_sample(document, "acsft" if conditioned else "sft")
    assert sample is not None
    tokens = torch.from_numpy(sample.tokens_T).long()
    rows = forward(params, tokens, loaded.model_config)[:-1, : loaded.meta.vocab_size].log_softmax(-1)
    wanted = rows.gather(1, tokens[1:, None])[:, 0]
    return float(wanted[torch.from_numpy(sample.loss_mask_T[1:])].sum())


def test_weights_are_those_of_the_formula() -> None:
    """Log-probabilities equal those of plain torch, one response at a time; the weights follow from what is written."""
    records = list(read_records("weighed.jsonl"))
    counts = summary(Path("weighed"))["counts"]
    assert (
        counts["in"] == len(list(read_records("drawn.jsonl"))) == counts["out"] + sum(counts["skipped"].values())
        and counts["out"] == len(records) > 8
    )
    for record in (records[0], records[-1]):
        row = record.extra[TARGETS]
        assert row["logprob"] == pytest.approx(plain_log_probability("run/07-acsft", record, True), abs=2e-4)
        assert row["base_logprob"] == pytest.approx(plain_log_probability("run/06-sft", record, False), abs=2e-4)
    for record in records:
        row, final = record.extra[TARGETS], record.messages[-1]
        asked, measured = record.extra["requested"], final.extra["measured"]
        assert final.attributes == {name: float(level) for name, level in asked.items()}
        assert row["log_label_probability"] == pytest.approx(log_likelihood(asked, measured, list(asked), 4))
        expected = row["log_label_probability"] + row["base_logprob"] - row["logprob"]
        assert row["log_weight"] == pytest.approx(expected) and row["logprob"] < 0 > row["base_logprob"]
    found = [record.extra[TARGETS] for record in records]
    groups, group_S = np.unique([row["group"] for row in found], return_inverse=True)
    share_S = shares(np.array([row["log_weight"] for row in found]), group_S, len(groups))
    effective = float(np.mean(1 / np.bincount(group_S, share_S**2)))
    assert summary(Path("weighed"))["metrics"]["effective_responses"] == pytest.approx(effective)
    assert all(len({record.id.rpartition("/")[0] for record, g in zip(records, group_S, strict=True) if g == i}) == 1
               for i in range(len(groups)))  # fmt: skip


def test_parts_of_an_array_and_split_models_find_the_same_weights() -> None:
    parts = ("output=parts.jsonl", "run_dir=parts")
    assert run_here(*WEIGH, *parts, "array.tasks=2", "array.task=1") == 0
    assert run_here(*WEIGH, *parts) == 0  # does the rest, and puts all together
    assert [record.id for record in read_records("parts.jsonl")] == [r.id for r in read_records("weighed.jsonl")]
    assert not list(Path("parts").glob("journal-*"))
    steerlm(
        *WEIGH, "output=split.jsonl", "run_dir=split", "parallel.tensor=2", "scoring.batch_tokens=64", cwd=Path.cwd()
    )
    # Rows are filled otherwise by a part of an array, which processors of some kinds round otherwise.
    for path, most in (("parts.jsonl", 1e-5), ("split.jsonl", 1e-3)):
        one, other = weights("weighed.jsonl"), weights(path)
        assert one.keys() == other.keys()
        for name, row in one.items():
            assert row["group"] == other[name]["group"]
            assert all(row[key] == pytest.approx(other[name][key], abs=most) for key in row if key != "group"), path


def test_training_goes_on_from_the_model_that_drew_the_responses() -> None:
    assert run_here(*TRAIN, "run_dir=trained") == 0
    rows = [json.loads(line) for line in Path("trained/metrics.jsonl").read_text().splitlines()]
    first, second = [row for row in rows if "loss" in row]
    members = len(weights("weighed.jsonl")) / len({row["group"] for row in weights("weighed.jsonl").values()})
    assert first["model_responses"] == pytest.approx(members, rel=1e-4), "at first all responses of a group count alike"
    assert 0 < second["loss"] < first["loss"] and second["model_responses"] < first["model_responses"]
    # The same command with other weights is another run.
    changed = [replace(r, extra={**r.extra, TARGETS: {**r.extra[TARGETS], "log_weight": 0.0}})
               for r in read_records("weighed.jsonl")]  # fmt: skip
    write_records("changed.jsonl", changed)
    assert run_here(*TRAIN, "run_dir=trained", "data.targets=changed.jsonl", "train.steps=3") == 2


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("train.row_tokens=64",), "longer than train.row_tokens=64"),
        (("data.targets=few.jsonl",), "have no weight there"),
        (("data.targets=drawn.jsonl",), "no weights of this response"),
        (("data.train=run/08-bootstrap/none",), "no such shard folder"),
    ],
)
def test_what_does_not_fit_is_told(overrides: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_records("few.jsonl", list(read_records("weighed.jsonl"))[1:])
    assert run_here(*TRAIN, *overrides, "run_dir=wrong", "overwrite=true") == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("checkpoint=run/06-sft",), "was trained without attributes"),
        (("steerlm2.base=run/07-acsft",), "P(response | prompt) is a plain SFT model's"),
        (("steerlm2.base=run/03-train_ap",), "holds an attribute-prediction model"),
        (("steerlm2.attributes=[creativity]",), "steerlm2.attributes: creativity was not asked"),
        (("input=some.jsonl",), "the levels that were asked for ('requested')"),
        (("input=lonely.jsonl",), "has another one to the same prompt"),
        (("input=strange.jsonl",), "strange.jsonl:1: requested: quality=9 must be an integer in 0..4"),
    ],
)
def test_what_cannot_be_weighed_is_told(
    overrides: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = {record.id.rpartition("/")[0]: record for record in read_records("drawn.jsonl")}
    write_records("lonely.jsonl", list(first.values()))
    strange = next(iter(first.values()))
    write_records("strange.jsonl", [replace(strange, extra={**strange.extra, "requested": {"quality": 9}})])
    given = {argument.split("=")[0]: argument for argument in (*WEIGH[1:], *overrides)}
    assert run_here("weigh", *given.values(), "output=no.jsonl", "run_dir=no", "overwrite=true") == 2
    assert told in capsys.readouterr().err
    assert not Path("no.jsonl").exists()


def test_fewer_attributes_make_weights_more_alike() -> None:
    assert (
        run_here(*WEIGH, "steerlm2.attributes=[quality]", "steerlm2.bins=equal", "output=one.jsonl", "run_dir=one") == 0
    )
    for record in read_records("one.jsonl"):
        asked, measured = record.extra["requested"], record.messages[-1].extra["measured"]
        expected = log_likelihood(asked, measured, ["quality"], 4, bins="equal")
        assert math.isclose(record.extra[TARGETS]["log_label_probability"], expected)
