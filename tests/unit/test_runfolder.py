"""The run folder: its files, refusals, the status of an ended run, and fingerprints."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from steerlm_megatron.errors import UserError
from steerlm_megatron.observe import runfolder
from steerlm_megatron.observe.log import close_logging, get_logger, setup_logging
from steerlm_megatron.observe.runfolder import (
    RunFolder,
    default_run_dir,
    fingerprint,
    is_complete,
    read_summary,
)


def test_a_folder_belongs_to_one_process_until_its_run_ends(tmp_path: Path) -> None:
    code = f"from steerlm_megatron.observe.runfolder import RunFolder; RunFolder({str(tmp_path)!r}, 'x').start()"

    def other() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=False)

    with RunFolder(tmp_path, "train_sft").start():
        RunFolder(tmp_path, "train_sft")  # the same process may open the folder again
        refused = other().stderr
        assert f"TryLater: run_dir={tmp_path} is in use by pid {os.getpid()} on " in refused
    before = fingerprint({}, [tmp_path])
    assert "holds a complete run" in other().stderr
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "tool").write_text("x")
    assert fingerprint({}, [tmp_path]) == before, "to what depends on it, a refused start or a tool's file is nothing"
    (tmp_path / "summary.json").unlink()
    assert other().returncode == 0, "which ended without a word, and holds nothing"
    assert RunFolder(tmp_path, "train_sft").resumed


def test_a_run_from_start_to_end(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", "train_sft")
    with folder.start("a: 1\n", ["steerlm", "train_sft", "x=a b"], inputs="abc") as run:
        assert (read_summary(run.path) or {})["status"] == "running"
        run.update(counts={"in": 5}, timings={"train_sec": 1.5})
        run.update(counts={"out": 4})
    summary = read_summary(run.path)
    assert summary is not None
    assert summary["status"] == "complete" and summary["counts"] == {"in": 5, "out": 4}
    assert summary["wall_sec"] >= 0 and summary["versions"]["python"]
    assert (run.path / "config.yaml").read_text() == "a: 1\n"
    assert (run.path / "command.txt").read_text() == "steerlm train_sft 'x=a b'\n"
    assert {"versions", "host", "devices", "git"} <= json.loads((run.path / "env.json").read_text()).keys()
    assert is_complete(run.path) and is_complete(run.path, "abc") and not is_complete(run.path, "abd")


def test_a_complete_run_is_replaced_only_when_asked(tmp_path: Path) -> None:
    with RunFolder(tmp_path, "annotate"):
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "journal-drawn").mkdir()
        (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="overwrite=true"):
        RunFolder(tmp_path, "annotate")
    run = RunFolder(tmp_path, "annotate", overwrite=True)
    assert not run.resumed and read_summary(tmp_path) is None
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "journal-drawn").exists()
    assert (tmp_path / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("no"), "failed"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(75), "interrupted"),
        (SystemExit(2), "failed"),
    ],
)
def test_how_it_ended(tmp_path: Path, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), RunFolder(tmp_path, "train_ap"):
        raise error
    summary = read_summary(tmp_path)
    assert summary is not None and summary["status"] == status
    assert ("error" in summary) == (status == "failed")
    again = RunFolder(tmp_path, "train_ap").start(argv=["steerlm", "again"])
    assert again.resumed
    assert len((tmp_path / "command.txt").read_text().splitlines()) == 2
    assert (read_summary(tmp_path) or {})["attempts"] == 2


def test_a_summary_that_cannot_be_written_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk the first error is reported, and not the failure to record it."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match="what happened"), RunFolder(tmp_path / "a", "x"):
        monkeypatch.setattr(runfolder, "write_json_atomic", full)
        raise ValueError("what happened")


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", "train_ap", rank=1) as run:
        run.update(counts={"in": 1})
    assert not (tmp_path / "run").exists()


def test_run_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "file", "train_ap")
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json is not JSON"):
        RunFolder(tmp_path, "train_ap")


def test_default_run_dir_is_new(tmp_path: Path) -> None:
    found = [default_run_dir("serve", tmp_path) for _ in range(3)]
    assert len(set(found)) == 3 and {path.parent for path in found} == {tmp_path / "serve"}
    assert all(path.is_dir() for path in found)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made: Not a directory; name a run_dir"):
        default_run_dir("serve", tmp_path / "file")


def test_fingerprint_follows_the_inputs(tmp_path: Path) -> None:
    file = tmp_path / "corpus.jsonl"
    file.write_text("one")
    base = fingerprint({"a": 1, "b": 2}, [file])
    assert fingerprint({"b": 2, "a": 1}, [file]) == base
    assert fingerprint({"a": 1, "b": 3}, [file]) != base
    file.write_text("two")
    assert fingerprint({"a": 1, "b": 2}, [file]) != base
    with RunFolder(tmp_path / "run", "preprocess").start(inputs="f1"):
        pass
    run = fingerprint({}, [tmp_path / "run"])
    (tmp_path / "run" / "log").mkdir()
    (tmp_path / "run" / "log" / "x").write_text("lines do not count")
    assert fingerprint({}, [tmp_path / "run"]) == run
    with pytest.raises(UserError, match="no such file"):
        fingerprint({}, [tmp_path / "absent"])


def test_log_lines_go_to_console_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        setup_logging(tmp_path, rank=0, terminal=False)
        setup_logging(tmp_path, rank=0, terminal=False)
        get_logger("steerlm_megatron.train.loop").info("step %d", 3)
        setup_logging(tmp_path, rank=1, terminal=False)
        get_logger().info("only in the file of rank 1")
        get_logger().warning("seen")
    finally:
        close_logging()
    shown = capsys.readouterr().err
    assert shown.count("step 3") == 1 and "only in the file" not in shown and "[rank 1] seen" in shown
    assert "steerlm.train.loop: step 3" in (tmp_path / "log" / "rank_0.log").read_text()
    assert "only in the file" in (tmp_path / "log" / "rank_1.log").read_text()
