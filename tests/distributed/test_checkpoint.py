"""Checkpoints: a resumed run is bitwise the same, at another layout up to rounding, and damaged ones are never used."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from steerlm_megatron.config.schema import (
    AttributesConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TemplateConfig,
    TrainConfig,
)
from steerlm_megatron.config.schema import ParallelConfig as P
from steerlm_megatron.data.shards import ShardWriter
from steerlm_megatron.data.views import build_documents
from steerlm_megatron.stages import train as train_stage
from steerlm_megatron.train.engine_mcore import MegatronEngine
from steerlm_megatron.train.meta import read_meta
from tests.helpers import corpora
from tests.helpers.dist import once, run_ranks
from tests.helpers.engines import Case, bare, make, saved, shards, step_batches, unsplit

SAVED, TOTAL, TOLERANCE = 3, 8, 1e-5
MOVES = {
    "TP2": P(tensor=2),
    "TP2+SP": P(tensor=2, sequence=True),
    "PP2": P(pipeline=2),
    "VPP2": P(pipeline=2, virtual_pipeline=2),
    "CP2": P(context=2),
    "DP2": P(),
}
_MOVED_TWICE = ("PP2", "VPP2", "CP2")
OBJECTIVES = ("sft", "ap")
Found = dict[str, Any]


# ---- inside the ranks


def steps(engine: MegatronEngine, first: int, last: int) -> list[float]:
    return [engine.train_step(step_batches(step)).loss for step in range(first, last)]


def two_ranks(root: Path) -> Found:
    found: Found = {}
    for objective in OBJECTIVES:
        engine = make(Case(objective, P(tensor=2)))
        steps(engine, 0, SAVED)
        folder = saved(engine, root / objective)
        found[objective, "not resumed"] = steps(engine, SAVED, TOTAL)
        for name, layout in MOVES.items():
            engine = make(
                Case(objective, layout), seed=77
            )  # the weights differ from the checkpoint's until it is loaded
            engine.load(folder)
            if name in _MOVED_TWICE:
                saved(engine, root / f"{objective} {name}")
            found[objective, name] = steps(engine, SAVED, TOTAL)
        for name in _MOVED_TWICE:
            engine = make(Case(objective, P()), seed=78)
            engine.load(root / f"{objective} {name}")
            found[objective, f"{name}, then DP2"] = steps(engine, SAVED, TOTAL)
        engine = make(
            Case(objective, overlap=True)
        )  # the save comes between an update and the gathering of its weights
        steps(engine, 0, SAVED)
        folder = saved(engine, root / f"{objective} overlap")
        for name, overlap in (("overlap, then DP2", False), ("overlap", True)):
            engine = make(Case(objective, overlap=overlap), seed=76)
            engine.load(folder)
            found[objective, name] = steps(engine, SAVED, TOTAL)
    found["init"] = head_kept(root, P(pipeline=2))
    return found


def head_kept(root: Path, layout: P) -> Found:
    """Return a regression model before and after it takes the language model's weights."""
    engine = make(Case("ap", layout), seed=79)
    before = shards(bare(engine))
    engine.load_model(root / "sft")
    after = shards(bare(engine))
    return {"before": before, "after": after, "losses": steps(engine, 0, 2)}


def one_rank(root: Path) -> Found:
    found: Found = {}
    for objective in OBJECTIVES:
        engine = make(Case(objective), seed=80)
        engine.load(root / objective)
        found[objective, "1 rank"] = steps(engine, SAVED, TOTAL)
        found[objective, "bitwise"] = three_and_three(root / f"{objective} 3+3", objective)
        found[objective, "keys"] = sorted(dist_checkpointing.load_tensors_metadata(str(root / objective)))
        found[objective, "interrupted"] = interrupted(root, "train_ap" if objective == "ap" else "train_sft")
    found["init"] = head_kept(root, P())
    engine = make(Case("sft"), seed=81)
    engine.load(root / "sft")
    found["lm"] = shards(bare(engine))
    return found


def three_and_three(root: Path, objective: str) -> Found:
    """Train three steps, save, and train three more. Dropout makes the generators' states matter."""
    case = Case(objective, dropout=0.1)
    engine = make(case)
    whole = steps(engine, 0, 6)
    saved(engine, root / "whole")
    engine = make(case)
    parts = steps(engine, 0, 3)
    saved(engine, root / "half")
    engine = make(case, seed=82)
    engine.load(root / "half")
    parts += steps(engine, 3, 6)
    saved(engine, root / "parts")
    return {"whole": whole, "parts": parts, "differing": differing(root / "whole", root / "parts")}


def differing(a: Path, b: Path) -> list[str]:
    """Return the differences between two checkpoints: tensors (bitwise), step counts, the schedule."""
    first, second = (dict(leaves(dist_checkpointing.load_plain_tensors(str(folder)))) for folder in (a, b))
    assert any("exp_avg_sq" in key for key in first) and "decoder.final_layernorm.weight" in first, sorted(first)
    return sorted(
        f"{key}: {first.get(key)} {second.get(key)}"
        for key in first.keys() | second.keys()
        if not equal(first.get(key), second.get(key))
    )


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    return type(a) is type(b) and a == b


def interrupted(root: Path, command: str) -> Found:
    """Compare a run that is told to stop at step 3 and crashes at step 5 when resumed with an undisturbed run."""
    data = root / "data"
    if not data.exists():
        write_shards(data)
    alone, disturbed = root / command / "alone", root / command / "disturbed"
    train_stage.run(config(command, alone, data))
    codes = []
    for stop_at in (3, 5, None):
        try:
            with disturbance(stop_at):
                train_stage.run(config(command, disturbed, data))
            codes.append(0)
        except SystemExit as stop:
            codes.append(stop.code)
        except RuntimeError as error:
            codes.append(str(error))
    runs = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (alone, disturbed)]
    kept = [(row.get("step"), row.get("loss"), row.get("valid/loss"), row.get("samples")) for row in runs[0]]
    again = [(row.get("step"), row.get("loss"), row.get("valid/loss"), row.get("samples")) for row in runs[1]]
    last = [run / "checkpoints" / "step_00000006" for run in (alone, disturbed)]
    return {
        "codes": codes,
        "alone": kept,
        "disturbed": again,
        "differing": differing(*last),
        "folders": sorted(p.name for p in (disturbed / "checkpoints").iterdir()),
        "loader": [read_meta(folder).loader for folder in last],
        "label_mean": read_meta(last[0]).label_mean,
    }


def write_shards(folder: Path) -> None:
    tokenizer = corpora.tokenizer("trained")
    for part, seed in (("train", 5), ("valid", 6)):
        with ShardWriter(folder / part, tokenizer, corpora.SCHEMA, corpora.STEERLM, 4000) as writer:
            conversations = corpora.conversations(40, seed=seed)
            for document in build_documents(conversations, tokenizer, corpora.STEERLM, corpora.SCHEMA):
                writer.add(document)
            writer.commit({}, [])


def config(command: str, run_dir: Path, data: Path) -> Config:
    schema = corpora.SCHEMA
    return Config(
        command=command,
        run_dir=str(run_dir),
        model=ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=48, dropout=0.1, max_position=160),
        optim=OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=2),
        attributes=AttributesConfig(name=schema.name, names=list(schema.names), max_level=schema.max_level),
        template=TemplateConfig(name="steerlm", system="You are kind."),
        data=DataConfig(train=str(data / "train"), valid=str(data / "valid")),
        train=TrainConfig(
            steps=6,
            row_tokens=160,
            global_batch_samples=12,
            log_every_steps=1,
            validate_every_steps=3,
            save_every_steps=2,
            keep_last=9,
        ),
    )


class disturbance:
    """Inside the ``with``, step 3 ends with SIGUSR1 to this process, and step 5 raises instead of training."""

    def __init__(self, stop_at: int | None) -> None:
        self.stop_at, self.original = stop_at, MegatronEngine.train_step

    def __enter__(self) -> None:
        original, stop_at = self.original, self.stop_at

        def train_step(engine: MegatronEngine, batches: Any, stopping: Any) -> Any:
            done = engine.schedule.num_steps
            if done + 1 == stop_at == 5:
                raise RuntimeError("fell over")
            result = original(engine, batches, stopping)
            if done + 1 == stop_at == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
            return result

        MegatronEngine.train_step = train_step

    def __exit__(self, *_: object) -> None:
        MegatronEngine.train_step = self.original


# ---- outside


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Return the measurements of two ranks that save, then those of one rank that loads the same files."""

    def compute() -> Found:
        root = tmp_path_factory.mktemp("checkpoints")
        return {"two": run_ranks(2, two_ranks, root), "one": run_ranks(1, one_rank, root)}

    return once(tmp_path_factory, "checkpoints", compute)


def largest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "name", [*MOVES, "1 rank", "PP2, then DP2", "VPP2, then DP2", "CP2, then DP2", "overlap, then DP2", "overlap"]
)
def test_a_checkpoint_moves_to_another_layout(objective: str, name: str, measured: Found, record_property: Any) -> None:
    """The checkpoint is saved after three steps at TP2; the next five losses equal those of the run that went on."""
    expected = measured["two"][0][objective, "not resumed"]
    found = measured["one" if name == "1 rank" else "two"][0][objective, name]
    assert len(found) == TOTAL - SAVED
    record_property("measured", (f"resumed {objective} TP2 -> {name}", {"loss": largest(found, expected)}))
    assert largest(found, expected) <= TOLERANCE, (found, expected)
    if name == "TP2":
        assert found == expected, "the same layout: bit by bit"


@pytest.mark.distributed
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_three_steps_and_three_are_six(objective: str, measured: Found) -> None:
    found = measured["one"][0][objective, "bitwise"]
    assert found["parts"] == found["whole"]
    assert found["differing"] == []


@pytest.mark.distributed
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_disturbed_run_ends_as_an_undisturbed_one(objective: str, measured: Found) -> None:
    """At SIGUSR1 in step 3 the run saves and exits with 75; after a crash in step 5 it resumes from step 4."""
    found = measured["one"][0][objective, "interrupted"]
    assert found["codes"] == [75, "fell over", 0]
    assert found["disturbed"] == found["alone"]
    assert [row[0] for row in found["alone"] if row[1] is not None] == [1, 2, 3, 4, 5, 6]
    assert found["differing"] == []
    assert found["loader"][0] == found["loader"][1] and found["loader"][0]["consumed_rows"] > 0
    assert {"step_00000003", "step_00000004", "step_00000006", "best.json"} <= set(found["folders"])
    assert len(found["label_mean"]) == (3 if objective == "ap" else 0)


@pytest.mark.distributed
def test_the_head_is_in_the_checkpoint(measured: Found) -> None:
    keys = {objective: measured["one"][0][objective, "keys"] for objective in OBJECTIVES}
    head = {"output_layer.regression.weight", "output_layer.regression.bias"}
    assert head <= set(keys["ap"]) and "output_layer.weight" not in keys["ap"]
    assert "output_layer.weight" in keys["sft"] and not head & set(keys["sft"])


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", ["one", "two"])
def test_a_regression_model_starts_from_a_language_model(ranks: str, measured: Found) -> None:
    before, after = (unsplit([found["init"][when] for found in measured[ranks]]) for when in ("before", "after"))
    language = unsplit([measured["one"][0]["lm"]])
    assert before.keys() == after.keys()
    for name, weight in after.items():
        if name.startswith("output_layer."):
            assert torch.equal(weight, before[name]), "the head keeps its initial weights"
        else:
            assert torch.equal(weight, language[name]), name
            assert "layernorm" in name or not torch.equal(weight, before[name])
    losses = [found["init"]["losses"] for found in measured[ranks]]
    assert largest(losses[0], measured["one"][0]["init"]["losses"]) <= TOLERANCE, "the optimizer has the new weights"
