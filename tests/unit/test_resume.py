"""Preprocessing gives the same bytes for any number of processes and interruptions."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from steerlm_megatron.config.schema import DataConfig
from steerlm_megatron.data.shards import ShardReader
from steerlm_megatron.data.views import build_documents
from steerlm_megatron.data.write import chunks, seen_ids
from steerlm_megatron.data.write import preprocess as module
from steerlm_megatron.data.write.blocks import join
from steerlm_megatron.data.write.chunks import Chunk, read_chunks
from steerlm_megatron.data.write.preprocess import REJECTED_FILE, WORK, preprocess
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.records import Conversation, Message, write_records
from tests.helpers import corpora

DATA = {"shard_tokens": 9000, "valid_fraction": 0.2, "on_error": "skip"}

# The process that is killed runs this: chunks of 16 lines, and a pause after one of them so that it can be killed
# there.
SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
from tests.helpers import corpora
from steerlm_megatron.config.schema import DataConfig
from steerlm_megatron.data.write import chunks, preprocess as module
from steerlm_megatron.data.text.tokenizer import Tokenizer

def main():
    chunks.CHUNK_LINES = 16
    module.WORKER_BYTES = 1
    said = []
    def progress(done, total):
        said.append(done)
        print(done, flush=True)
        if len(said) == {pause_at}:
            time.sleep(600)
    tok = Tokenizer.load({tokenizer!r})
    data = DataConfig(**{data!r})
    module.preprocess({{"train": {files!r}}}, {output!r}, tok, corpora.SCHEMA, corpora.STEERLM, data, progress)

if __name__ == "__main__":
    {limit}
    main()
"""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_LINES", 16)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Write two files of 500 records together, with malformed lines, repeated ids and missing ids."""
    folder = tmp_path_factory.mktemp("in")
    records = corpora.conversations(500, seed=5)
    write_records(folder / "a.jsonl", records[:300])
    write_records(folder / "b.jsonl.zst", records[300:])
    lines = (folder / "a.jsonl").read_text().splitlines()
    lines[33] = lines[34] = lines[20]
    lines[7] = "{torn"
    for number in (50, 51):
        row = json.loads(lines[number])
        del row["id"]
        lines[number] = json.dumps(row)
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    return [str(folder / "a.jsonl"), str(folder / "b.jsonl.zst")]


def run(files: list[str], output: Path, workers: int = 1, **given: Any) -> dict[str, Any]:
    options = {name: given.pop(name) for name in ("progress", "overwrite") if name in given}
    tok, cfg = corpora.tokenizer("trained"), DataConfig(**(DATA | {"workers": workers} | given))
    with pytest.MonkeyPatch.context() as patch:  # use as many workers as asked for, however small the corpus is
        patch.setattr(module, "WORKER_BYTES", 1)
        return preprocess({"train": files}, output, tok, corpora.SCHEMA, corpora.STEERLM, cfg, **options)


def start(files: list[str], output: Path, folder: Path, workers: int, pause_at: int = 0, limit: str = "") -> Any:
    """Start a process that preprocesses and prints its progress, and that hangs after ``pause_at`` such lines."""
    corpora.tokenizer("trained").save(folder / "tokenizer")
    script = folder / f"script_{output.name}.py"
    script.write_text(
        SCRIPT.format(
            root=str(Path(__file__).parents[2]), pause_at=pause_at, files=files,
            output=str(output), data=DATA | {"workers": workers}, tokenizer=str(folder / "tokenizer"), limit=limit,
        )
    )  # fmt: skip
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def reference(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_LINES", 16)
        out = run(files, folder)
    assert out["in"] == 500 == out["out"] + sum(out["skipped"].values()) and out["skipped"]["rejected"] == 3
    assert len(ShardReader(folder / "train", verify=True).shards) > 2
    return content(folder)


def test_rejected_lines_say_why(files: list[str], reference: dict[str, bytes]) -> None:
    rejected = [json.loads(line) for line in reference[REJECTED_FILE].decode().splitlines()]
    assert [entry["where"] for entry in rejected] == [f"{files[0]}:{line}" for line in (8, 34, 35)]
    assert "malformed JSON" in rejected[0]["reason"] and "id='c20' occurred before" in rejected[1]["reason"]


def test_repeated_ids_are_errors(files: list[str], tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("".join(line + "\n" for line in Path(files[0]).read_text().splitlines()[10:40]))
    with pytest.raises(UserError, match=r"r\.jsonl:24: id='c20' occurred before; ids must be unique"):
        run([str(path)], tmp_path / "out", on_error="error")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [WORK]


@pytest.mark.parametrize("size", [1, 8, 1000])
def test_seen_ids_are_exact_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(seen_ids, "RUN_IDS", size)
    rng, known = np.random.default_rng(0), set()
    ids = seen_ids.SeenIds(tmp_path / "ids")
    for _ in range(60):
        batch = rng.integers(0, 90, 7)
        hashes = np.zeros((7, 16), np.uint8)
        hashes[:, 5] = batch  # batch 0 is no id; zeros at the end must not be taken for padding
        expected = [bool(n) and (n in known or n in batch[:i]) for i, n in enumerate(batch.tolist())]
        assert ids.repeated(hashes).tolist() == expected
        known.update(batch.tolist())
        assert len(ids.recent) < size + 7


def test_any_number_of_processes_gives_the_same_bytes(
    files: list[str], reference: dict[str, bytes], tmp_path: Path
) -> None:
    run(files, tmp_path / "out", workers=3)
    assert content(tmp_path / "out") == reference


@pytest.mark.parametrize("lines", [5, 500])
def test_the_size_of_chunks_does_not_show(
    files: list[str], reference: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: int
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_LINES", lines)
    run(files, tmp_path / "out")
    assert content(tmp_path / "out") == reference


def test_stopped_between_chunks_does_nothing_again(
    files: list[str], reference: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StopError(BaseException):
        pass

    made: list[str] = []
    real = chunks.tokenize
    monkeypatch.setattr("steerlm_megatron.data.write.pool.tokenize", lambda c, j: made.append(c.name) or real(c, j))
    rng = random.Random(0)
    for _ in range(8):
        left = len(made) + rng.randint(1, 4)

        def progress(done: int, total: int, left: int = left) -> None:
            if len(made) >= left:
                raise StopError

        with pytest.raises(StopError):
            run(files, tmp_path / "out", progress=progress)
        assert not (tmp_path / "out" / "train").exists()
    run(files, tmp_path / "out")
    assert content(tmp_path / "out") == reference
    assert len(made) == len(set(made)) == len(list(read_chunks("train", files)))


def test_an_error_in_any_write_is_gone_on_from(
    files: list[str], reference: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An fsync or rename that fails stands for a kill there; from many such points the job ends with equal results."""
    real = {"fsync": os.fsync, "replace": os.replace, "rename": Path.rename}
    calls = [0, 0]

    def failing(name: str) -> Any:
        def call(*arguments: Any) -> Any:
            calls[0] += 1
            if calls[0] == calls[1]:
                raise KeyboardInterrupt
            return real[name](*arguments)

        return call

    monkeypatch.setattr(os, "fsync", failing("fsync"))
    monkeypatch.setattr(os, "replace", failing("replace"))
    monkeypatch.setattr(Path, "rename", failing("rename"))
    interrupted = 0
    for place in range(20, 500, 2):
        calls[:] = [0, place]
        try:
            run(files, tmp_path / "out")
        except KeyboardInterrupt:
            interrupted += 1
            continue
        break
    assert interrupted >= 8, calls
    assert content(tmp_path / "out") == reference


@pytest.mark.integration
def test_kill_9_and_another_number_of_processes(files: list[str], reference: dict[str, bytes], tmp_path: Path) -> None:
    output, finished = tmp_path / "out", [0]
    for workers, lines in ((2, 3), (1, 9), (3, 14)):
        process = start(files, output, tmp_path, workers, pause_at=lines)
        for _ in range(lines):
            line = process.stdout.readline()
        assert line, "the job ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        finished.append(len(list((output / WORK).rglob("*.chunk"))))
        assert finished[-1] >= lines and not (output / "train").exists()
    assert finished == sorted(finished), "it went on from where it was"
    run(files, output, workers=2)
    assert content(output) == reference


@pytest.mark.integration
def test_processes_end_with_the_one_that_started_them(files: list[str], tmp_path: Path) -> None:
    process = start(files, tmp_path / "out", tmp_path, workers=2, pause_at=1)
    process.stdout.readline()
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    end = time.monotonic() + 120

    def alive() -> list[psutil.Process]:
        return [c for c in children if c.is_running() and c.status() != psutil.STATUS_ZOMBIE]

    while time.monotonic() < end and alive():
        time.sleep(0.05)
    assert not alive()


@pytest.mark.integration
def test_a_dead_process_is_named_and_the_work_kept(files: list[str], tmp_path: Path) -> None:
    def kill_one(done: int, total: int) -> None:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended, as they do one after the other
                if child.status() != psutil.STATUS_ZOMBIE and "spawn_main" in " ".join(child.cmdline()):
                    child.kill()

    with pytest.raises(UserError, match=r"was killed, perhaps for want of memory; lower data\.workers"):
        run(files, tmp_path / "out", workers=2, progress=kill_one)
    assert list((tmp_path / "out" / WORK).rglob("*.chunk")) and not (tmp_path / "out" / "train").exists()


@pytest.mark.integration
def test_a_full_disk_is_named_and_gone_on_from(files: list[str], reference: dict[str, bytes], tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))"
    _, said = start(files, tmp_path / "out", tmp_path, workers=1, limit=limit).communicate(timeout=600)
    assert "UserError: data.output_dir=" in said and "File too large" in said, said
    assert "make room and run the same command again" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [WORK]
    run(files, tmp_path / "out")
    assert content(tmp_path / "out") == reference


def test_a_torn_chunk_is_made_again(files: list[str], reference: dict[str, bytes], tmp_path: Path) -> None:
    """A power cut may leave a file under its name without all of its bytes."""

    def stop(done: int, total: int) -> None:
        if done > 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(files, tmp_path / "out", progress=stop)
    made = sorted((tmp_path / "out" / WORK).rglob("*.chunk"))
    assert len(made) > 10
    for number, path in enumerate(made):
        data = bytearray(path.read_bytes())
        if number % 3 == 0:
            data = data[: len(data) * (number + 1) // (len(made) + 1)]
        elif number % 3 == 1:
            data[len(data) // 2] ^= 255
        path.write_bytes(data)
    run(files, tmp_path / "out")
    assert content(tmp_path / "out") == reference


def test_a_mended_input_keeps_the_work_on_what_did_not_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.jsonl"
    write_records(path, corpora.conversations(100))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:70], b"{\n", *lines[71:]]))
    with pytest.raises(UserError, match=r"r\.jsonl:71: malformed JSON"):
        run([str(path)], tmp_path / "out", on_error="error")
    path.write_bytes(b"".join(lines))
    made: list[Chunk] = []
    real = chunks.tokenize
    monkeypatch.setattr("steerlm_megatron.data.write.pool.tokenize", lambda c, j: made.append(c) or real(c, j))
    assert run([str(path)], tmp_path / "out", on_error="error")["in"] == 100
    assert [chunk.first_line for chunk in made] == [65, 81, 97]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["train", "valid"]


def test_work_is_kept_when_errors_are_to_be_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.jsonl"
    write_records(path, corpora.conversations(100))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:70], b"{\n", *lines[71:]]))
    with pytest.raises(UserError, match=r"r\.jsonl:71: malformed JSON"):
        run([str(path)], tmp_path / "out", on_error="error")
    made: list[Chunk] = []
    real = chunks.tokenize
    monkeypatch.setattr("steerlm_megatron.data.write.pool.tokenize", lambda c, j: made.append(c) or real(c, j))

    def stop(done: int, total: int) -> None:
        if done > 90:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([str(path)], tmp_path / "out", on_error="skip", progress=stop)
    assert [chunk.first_line for chunk in made] == [65, 81]
    for workers in (1, 2):  # lines that were skipped are found in the stored chunks, and are errors again
        with pytest.raises(UserError, match=r"r\.jsonl:71: malformed JSON"):
            run([str(path)], tmp_path / "out", workers, on_error="error")
    assert run([str(path)], tmp_path / "out", on_error="skip")["skipped"]["rejected"] == 1


def test_damage_is_met_in_its_place(files: list[str], tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl.gz"
    write_records(path, corpora.conversations(900, seed=8))
    path.write_bytes(path.read_bytes()[:-900])
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"b\.jsonl\.gz:\d+: cannot be read "):
            run([str(path), files[0]], tmp_path / "out", workers, on_error="error")
    out = run([str(path), files[1]], tmp_path / "out")
    assert out["in"] == out["out"] + sum(out["skipped"].values()) and out["in"] > 500
    first = json.loads((tmp_path / "out" / REJECTED_FILE).read_text().splitlines()[0])
    assert "cannot be read" in first["reason"] and first["where"].startswith(str(path))


def test_an_input_that_changes_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write_records(path, corpora.conversations(40))

    def append(done: int, total: int) -> None:
        with open(path, "a") as file:
            file.write("\n")

    with pytest.raises(UserError, match=r"r\.jsonl was changed while it was read"):
        run([str(path)], tmp_path / "out", progress=append)
    assert not (tmp_path / "out" / "train").exists()


# What stands there already


def test_the_same_again_is_left_as_it_is(files: list[str], tmp_path: Path) -> None:
    first = run(files, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert run(files, tmp_path / "out", workers=2, overwrite=False) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    path = tmp_path / "out" / "train" / "shard-00000.bin"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    assert run(files, tmp_path / "out", verify=True) == first
    assert ShardReader(tmp_path / "out" / "train", verify=True)


def test_a_changed_input_is_refused_or_replaces(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"

    def make(overwrite: bool, **data: Any) -> dict[str, Any]:
        return run([str(path)], tmp_path / "out", overwrite=overwrite, **({"valid_fraction": 0.0} | data))

    write_records(path, corpora.conversations(20))
    assert make(False)["in"] == 20
    write_records(path, corpora.conversations(21))
    with pytest.raises(UserError, match=r"from r\.jsonl, whose contents have changed since .*overwrite=true"):
        make(False)
    assert make(True)["in"] == 21
    for changed in ({"shard_tokens": 500}, {"on_error": "error"}, {"valid_fraction": 0.4}):
        with pytest.raises(UserError, match=r"with another tokenizer, template, schema, or other data\.\* settings"):
            make(False, **changed)


# Control strings and blocks


@pytest.mark.parametrize("policy", ["escape", "reject"])
def test_control_strings_in_text(tmp_path: Path, policy: str) -> None:
    texts = ["plain", "<extra_id_1>User", "<extra_id_7> and <extra_id_0>", "<extra_id_>", "a < b", "[INST] x"]
    records = [Conversation(str(n), (Message("user", t), Message("assistant", "river"))) for n, t in enumerate(texts)]
    write_records(tmp_path / "r.jsonl", records)
    out = run([str(tmp_path / "r.jsonl")], tmp_path / "out", valid_fraction=0.0, control_strings=policy)
    reader = ShardReader(tmp_path / "out" / "train")
    assert reader.manifest["policies"]["control_strings"] == {"policy": policy, "messages": 2}
    if policy == "reject":
        assert out["skipped"] == {"control_string": 2} and out["out"] == 4 and out["in"] == 6
        rejected = [json.loads(line) for line in (tmp_path / "out" / REJECTED_FILE).read_text().splitlines()]
        assert [entry["where"][-2:] for entry in rejected] == [":2", ":3"]
        assert "messages[0].content has the control string '<extra_id_1>'" in rejected[0]["reason"]
        return
    assert out["out"] == 6
    tok = reader.tokenizer
    for index, text in enumerate(texts):
        document = reader.document(index)
        assert text in tok.decode(document.tokens_T)
        made = np.isin(document.tokens_T, list(tok.controls.values()))
        assert made.sum() == 4  # the control tokens of the template, and none from the text


def test_blocks_keep_every_document() -> None:
    tok = corpora.tokenizer("trained")
    documents = build_documents(corpora.conversations(30, seed=3), tok, corpora.STEERLM, corpora.SCHEMA)
    whole = join(documents, tok.vocab_size, 3, list(range(1, 31)))
    rng = np.random.default_rng(0)
    for _ in range(20):
        start, stop = sorted(rng.integers(0, 31, 2).tolist())
        keep = np.zeros(30, np.bool_)
        keep[start:stop] = True
        expected = join(documents[start:stop], tok.vocab_size, 3, list(range(start + 1, stop + 1))).arrays()
        for block in (whole.cut(start, stop), whole.select(keep)):
            for name, array in block.arrays().items():
                assert array.dtype == expected[name].dtype and array.shape == expected[name].shape
                assert array.tobytes() == expected[name].tobytes(), name


def test_index_bytes_are_megatrons(files: list[str], tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    run(files, tmp_path / "out", valid_fraction=0.0)
    reader = ShardReader(tmp_path / "out" / "train")
    first = 0
    for shard in reader.shards:
        dtype = DType.optimal_dtype(reader.tokenizer.vocab_size)
        builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=dtype)
        for index in range(shard.documents):
            tokens = np.asarray(reader.document(first + index).tokens_T)
            builder.add_document(tokens, [len(tokens)])
        builder.finalize(str(tmp_path / "x.idx"))
        for suffix in ("bin", "idx"):
            ours = shard.prefix.with_name(f"{shard.prefix.name}.{suffix}")
            assert ours.read_bytes() == (tmp_path / f"x.{suffix}").read_bytes()
        first += shard.documents
