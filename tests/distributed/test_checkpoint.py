"""Checkpoints: training goes on bit by bit, at another layout to rounding, and never from a damaged one."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.dist import once, run_ranks
from helpers.engines import Case, bare, make, shards, step_batches, unsplit
from megatron.core import dist_checkpointing
from unit import corpora

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
from steerlm_megatron.errors import UserError
from steerlm_megatron.runtime import parallel
from steerlm_megatron.runtime.collectives import barrier
from steerlm_megatron.stages import train as train_stage
from steerlm_megatron.train.checkpoint import CheckpointMeta, CheckpointStore, read_meta, resolve, verify
from steerlm_megatron.train.engine_mcore import MegatronEngine
from steerlm_megatron.train.sharded import Write

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


def saved(engine: MegatronEngine, folder: Path) -> Path:
    if engine.layout.is_main:
        folder.mkdir(parents=True)
    barrier()
    engine.save(folder)
    barrier()
    return folder


def two_ranks(root: Path) -> Found:
    found: Found = {}
    for objective in OBJECTIVES:
        engine = make(Case(objective, P(tensor=2)))
        steps(engine, 0, SAVED)
        folder = saved(engine, root / objective)
        found[objective, "not resumed"] = steps(engine, SAVED, TOTAL)
        for name, layout in MOVES.items():
            engine = make(Case(objective, layout), seed=77)  # other weights than the checkpoint's
            engine.load(folder)
            if name in _MOVED_TWICE:
                saved(engine, root / f"{objective} {name}")
            found[objective, name] = steps(engine, SAVED, TOTAL)
        for name in _MOVED_TWICE:
            engine = make(Case(objective, P()), seed=78)
            engine.load(root / f"{objective} {name}")
            found[objective, f"{name}, then DP2"] = steps(engine, SAVED, TOTAL)
        engine = make(Case(objective, overlap=True))  # saved between an update and the gathering of its weights
        steps(engine, 0, SAVED)
        folder = saved(engine, root / f"{objective} overlap")
        for name, overlap in (("overlap, then DP2", False), ("overlap", True)):
            engine = make(Case(objective, overlap=overlap), seed=76)
            engine.load(folder)
            found[objective, name] = steps(engine, SAVED, TOTAL)
    found["init"] = head_kept(root, P(pipeline=2))
    return found


def head_kept(root: Path, layout: P) -> Found:
    """A regression model before and after it takes the language model's weights."""
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
    """With dropout, so that generator states count."""
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
    """What is not the same in two checkpoints, bit by bit: tensors, step counts, the schedule."""
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
    """A run that is told to stop at step 3 and falls over at step 5 next time, against one that is left alone."""
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
    """Within: step 3 ends with SIGUSR1 to this process; step 5 raises instead of training."""

    def __init__(self, stop_at: int | None) -> None:
        self.stop_at, self.original = stop_at, MegatronEngine.train_step

    def __enter__(self) -> None:
        original, stop_at = self.original, self.stop_at

        def train_step(engine: MegatronEngine, batches: Any) -> Any:
            done = engine.schedule.num_steps
            if done + 1 == stop_at == 5:
                raise RuntimeError("fell over")
            result = original(engine, batches)
            if done + 1 == stop_at == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
            return result

        MegatronEngine.train_step = train_step

    def __exit__(self, *_: object) -> None:
        MegatronEngine.train_step = self.original


# ---- outside


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What two ranks found and saved, then what one rank found in it."""

    def compute() -> Found:
        root = tmp_path_factory.mktemp("checkpoints")
        return {"two": run_ranks(2, two_ranks, root, timeout=240), "one": run_ranks(1, one_rank, root, timeout=240)}

    return once(tmp_path_factory, "checkpoints", compute)


def largest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "name", [*MOVES, "1 rank", "PP2, then DP2", "VPP2, then DP2", "CP2, then DP2", "overlap, then DP2", "overlap"]
)
def test_a_checkpoint_moves_to_another_layout(objective: str, name: str, measured: Found, record_property: Any) -> None:
    """Saved after three steps at TP2; the losses of the next five are those of the run that went on."""
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
    """SIGUSR1 at step 3: saved, exit 75. A crash in step 5: back to step 4. Data, dropout and optimizer all go on."""
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


# ---- the store: files and names, in this process


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    parallel.initialize(P(), 0)
    return CheckpointStore(tmp_path / "run" / "checkpoints", keep_last=2, keep_best=True)


def meta(step: int, metric: float | None = None) -> CheckpointMeta:
    return CheckpointMeta(step, "lm", {}, 300, None, {}, False, "hash", metric=metric)


def write(folder: Path) -> None:
    (folder / "__0_0.distcp").write_bytes(bytes(100))


def save_tokenizer(folder: Path) -> None:
    folder.mkdir()
    (folder / "steerlm_tokenizer.json").write_text("{}")


def begin(folder: Path) -> Write:
    return Write(partial(write, folder), lambda: (folder / "common.pt").write_bytes(bytes(10)), ["__0_0.distcp"])


def save(
    store: CheckpointStore, step: int, metric: float | None = None, best: bool = False, background: bool = False
) -> Path:
    return store.save(meta(step, metric), begin, save_tokenizer, best, background)


class Gate:
    """A write that comes to its end when the test says so."""

    def __init__(self, error: OSError | None = None) -> None:
        self.open, self.error = threading.Event(), error

    def begin(self, folder: Path) -> Write:
        def run() -> None:
            assert self.open.wait(30)
            if self.error is not None:
                raise self.error
            write(folder)

        return Write(run, lambda: (folder / "common.pt").write_bytes(bytes(10)), ["__0_0.distcp"])


def change(folder: Path, old: bytes, new: bytes) -> None:
    """Replace bytes of ``meta.json``: what stands there is still the JSON that somebody could have meant."""
    content = (folder / "meta.json").read_bytes()
    assert old in content
    (folder / "meta.json").write_bytes(content.replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: os.truncate(folder / "__0_0.distcp", 60), ["__0_0.distcp", "60 bytes", "100"]),
        (lambda folder: (folder / "common.pt").unlink(), ["common.pt", "missing"]),
        (lambda folder: (folder / "tokenizer" / "steerlm_tokenizer.json").unlink(), ["tokenizer.json", "missing"]),
        (lambda folder: os.truncate(folder / "meta.json", 20), ["meta.json", "not JSON"]),
        (lambda folder: (folder / "meta.json").unlink(), ["is not a checkpoint", "meta.json"]),
        (lambda folder: change(folder, b'"step": ', b'"step": 7'), ["meta.json", "SHA-256"]),
        (lambda folder: change(folder, b'"sha256": "', b'"sha257": "'), ["meta.json", "SHA-256"]),
        (lambda folder: change(folder, b'"head"', b'"he\xe4d'), ["meta.json", "not JSON"]),
        (lambda folder: (folder / "meta.json").write_text("[3]"), ["meta.json", "not a JSON object"]),
        (lambda folder: (folder / "__0_0.distcp").write_bytes(b"x" * 100), ["__0_0.distcp", "SHA-256"]),
    ],
    ids=["truncated", "missing", "tokenizer", "meta", "no meta", "step", "key", "encoding", "list", "changed"],
)
def test_a_torn_checkpoint_is_named_and_passed_over(
    store: CheckpointStore, damage: Callable[[Path], None], words: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = save(store, 1), save(store, 2)
    assert store.latest() == second and read_meta(second).step == 2
    damage(second)
    with pytest.raises(UserError) as error:
        verify(second)
    assert str(second) in str(error.value) and all(word in str(error.value) for word in words)
    with caplog.at_level("WARNING", logger="steerlm_megatron"):
        assert store.latest() == first
    assert all(word in caplog.text for word in words)
    damage(first)
    with pytest.raises(UserError, match="no other checkpoint in .* is intact"):
        store.latest()
    save(store, 1)
    assert save(store, 2) == second and store.latest() == second, "its successor takes its place"


def test_a_killed_save_leaves_nothing_behind(store: CheckpointStore) -> None:
    save(store, 1)

    def killed(folder: Path) -> Write:
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.save(meta(2), killed, save_tokenizer)
    assert [p.name for p in store.root.iterdir() if p.suffix == ".tmp"] == ["step_00000002.tmp"]
    assert store.latest() == store.root / "step_00000001"
    assert resolve(str(store.root.parent), "checkpoint").name == "step_00000001"
    save(store, 3)
    assert sorted(p.name for p in store.root.iterdir()) == ["step_00000001", "step_00000003"]


@pytest.mark.parametrize("call", range(1, 4))
def test_kill_9_within_a_save_leaves_whole_checkpoints(store: CheckpointStore, call: int) -> None:
    """Killed just before the n-th change of names (commit, retention), and within a removal."""
    for step in (1, 2):
        save(store, step)
    child = os.fork()
    if child == 0:
        left = call

        def doomed(original: Callable[..., None], remove: bool) -> Callable[..., None]:
            def count(path: Path, *rest: Any, **options: Any) -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    if remove:
                        (path / "common.pt").unlink()
                    os.kill(os.getpid(), signal.SIGKILL)
                original(path, *rest, **options)

            return count

        shutil.rmtree, os.rename = doomed(shutil.rmtree, True), doomed(os.rename, False)
        save(store, 3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    for folder in store.root.glob("step_*"):
        if folder.suffix != ".tmp":
            verify(folder)
            assert read_meta(folder).step == int(folder.name[-8:])
    assert store.latest() in {store.root / f"step_{step:08d}" for step in (2, 3)}
    save(store, 4)
    assert not list(store.root.glob("*.tmp"))


def test_a_save_beside_training_has_its_name_when_it_is_whole(store: CheckpointStore) -> None:
    gate, first = Gate(), save(store, 1)
    second = store.save(meta(2), gate.begin, save_tokenizer, best=True, background=True)
    assert not store.poll() and not second.exists() and store.latest() == first
    assert not (store.root / "best.json").exists(), "it is the best once it is there"
    gate.open.set()
    store.wait()
    assert store.poll() and store.latest() == second
    verify(second)
    assert resolve(str(store.root.parent), "checkpoint") == second
    for step in range(3, 7):
        save(store, step, background=True)  # waits for the one before
    store.wait()
    assert [p.name for p in sorted(store.root.iterdir())] == [
        "best.json",
        *(f"step_{step:08d}" for step in (2, 5, 6)),
    ]


@pytest.mark.parametrize("background", [True, False])
def test_a_save_that_cannot_be_written_is_no_checkpoint(store: CheckpointStore, background: bool) -> None:
    first, gate = save(store, 1), Gate(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    gate.open.set()
    with pytest.raises(UserError, match=r"step_00000002: not saved, rank 0 .*No space left on device.* MB are free"):
        store.save(meta(2), gate.begin, save_tokenizer, background=background)
        store.wait()
    assert store.latest() == first and store.poll(), "said once"
    assert not list(store.root.glob("*.tmp")), "on a full disk, what else a run has to write needs the room"
    assert store.latest() == first != save(store, 2) == store.latest()
    assert not list(store.root.glob("*.tmp"))


def test_kill_9_beside_training_leaves_whole_checkpoints(store: CheckpointStore) -> None:
    """Killed at whatever moment of saves that follow one another."""
    save(store, 1)
    for delay in (0.0, 0.001, 0.003, 0.01, 0.03, 0.1):
        child = os.fork()
        if child == 0:
            for step in range(2, 10_000):
                save(store, step, background=True)
                store.poll()
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        folders = [folder for folder in store.root.glob("step_*") if folder.suffix != ".tmp"]
        assert folders
        for folder in folders:
            verify(folder)
        assert store.latest() == max(folders)
        save(store, 1)
        assert not list(store.root.glob("*.tmp"))


def test_the_last_ones_and_the_best_are_kept(store: CheckpointStore) -> None:
    for step, metric in enumerate((3.0, 1.0, 2.0, 4.0, 5.0), start=1):
        save(store, step, metric, best=metric in (3.0, 1.0))
    names = [p.name for p in sorted(store.root.glob("step_*"))]
    assert names == ["step_00000002", "step_00000004", "step_00000005"]
    assert store.best_metric() == 1.0
    assert store.latest() == store.root / "step_00000005"


def test_a_damaged_checkpoint_takes_nobodys_place(store: CheckpointStore) -> None:
    """Resumed before two damaged ones, the run keeps what it saves until it has replaced them."""
    store.keep_last, store.keep_best = 1, False
    save(store, 3)
    for step in (4, 5):
        shutil.copytree(store.root / "step_00000003", store.root / f"step_{step:08d}")
        (store.root / f"step_{step:08d}" / "meta.json").write_text("torn")
    found = []
    for step in (4, 5, 6):
        assert store.latest() == store.root / f"step_{step - 1:08d}"
        save(store, step, background=True)
        store.wait()
        found.append(sorted(int(p.name[-1]) for p in store.root.glob("step_*")))
    assert found == [[4, 5], [5], [6]]


def test_a_damaged_checkpoint_takes_no_others_place(tmp_path: Path) -> None:
    """With one to keep, those saved after it was passed over are what the run goes on from; it is the best no more."""
    parallel.initialize(P(), 0)
    root = tmp_path / "checkpoints"
    before = CheckpointStore(root, keep_last=1, keep_best=True)
    save(before, 1, 2.0)
    shutil.copytree(root / "step_00000001", tmp_path / "kept")
    damaged = save(before, 5, 1.0, best=True)
    shutil.move(tmp_path / "kept", root / "step_00000001")
    os.truncate(damaged / "common.pt", 3)
    store = CheckpointStore(root, keep_last=1, keep_best=True)
    assert store.latest() == root / "step_00000001" and store.best_metric() == math.inf
    third = save(store, 3)
    store.wait()
    assert CheckpointStore(root, 1, True).latest() == third and not (root / "step_00000001").exists()
    save(store, 5, 1.0, best=True)
    assert store.best_metric() == 1.0 and store.latest() == root / "step_00000005"


def test_folders_of_other_names_are_left_alone(store: CheckpointStore) -> None:
    mine = store.root / "step_00000001_before_the_change"
    shutil.copytree(save(store, 1), mine)
    for step in range(2, 6):
        save(store, step)
    store.wait()
    assert mine.exists() and store.latest() == store.root / "step_00000005"
    assert resolve(str(mine), "init_from") == mine


def test_a_damaged_best_json_is_named(store: CheckpointStore) -> None:
    save(store, 1, 0.5, best=True)
    best = store.root / "best.json"
    for content in (b'{"folder": "step_00000001', b"[1]", b'{"folder": "step_00000001", "metric": "low"}', b"\xff"):
        best.write_bytes(content)
        for use in (store.best_metric, partial(resolve, str(store.root.parent), "checkpoint")):
            with pytest.raises(UserError, match=r"best\.json: damaged .*delete it"):
                use()
    best.unlink()
    assert store.best_metric() == math.inf


def test_what_a_path_means(store: CheckpointStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="init_from=.*no such file"):
        resolve(str(tmp_path / "nowhere"), "init_from")
    with pytest.raises(UserError, match="init_from="):
        resolve(str(tmp_path), "init_from")
    first = save(store, 1, 0.5, best=True)
    second = save(store, 2, 0.7)
    run = store.root.parent
    assert resolve(str(run), "init_from") == first, "the best, not the latest"
    assert resolve(str(store.root), "init_from") == first
    assert resolve(str(second), "init_from") == second, "what is named is taken"
    (store.root / "best.json").unlink()
    assert resolve(str(run), "init_from") == second
