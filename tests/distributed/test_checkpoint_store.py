"""The store of checkpoints keeps complete files under the right names, whatever is killed, torn or removed."""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from steerlm_megatron.config.schema import ParallelConfig as P
from steerlm_megatron.errors import UserError
from steerlm_megatron.runtime import parallel
from steerlm_megatron.train.checkpoint import CheckpointStore, resolve, verify
from steerlm_megatron.train.meta import CheckpointMeta, read_meta
from steerlm_megatron.train.sharded import Write


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    parallel.initialize(P(), 0)
    return CheckpointStore(tmp_path / "run" / "checkpoints", keep_last=2, keep_best=True)


def meta(step: int, metric: float | None = None) -> CheckpointMeta:
    return CheckpointMeta(step, "lm", {}, 300, None, {}, "hash", metric=metric)


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
    """A write that ends when the test allows it."""

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
    """Replace bytes of ``meta.json`` so that it is still valid JSON."""
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
        (lambda folder: change(folder, b'"task"', b'"ta\xe4k'), ["meta.json", "not JSON"]),
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
    """The process is killed just before the n-th rename (commit, retention), and within a removal."""
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
        save(store, step, background=True)  # the call waits for the save before
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
    """The process is killed at a random moment of consecutive saves."""
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


def test_damaged_checkpoints_stay_until_they_are_replaced(store: CheckpointStore) -> None:
    """A run that resumes from a checkpoint before two damaged ones keeps the checkpoints that it saves."""
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
    """With one checkpoint to keep, a damaged one does not displace later ones, and is no longer the best."""
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
