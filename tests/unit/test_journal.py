"""The journal loses no finished work of a killed job, and takes no torn line for finished."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from steerlm_megatron.stages.journal import Journal


def test_lines_that_are_no_entries_are_done_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0, "key", is_main=True)
    journal.append([(0, ["one\r\n\u2028 line", 1]), (1, "half an emoji \ud83d")])
    with journal.path.open("ab") as file:
        file.write(b"\x00\xff\n7\n[]\nnull\n" + b'{"v": 3}\n{"i": [2], "v": 3}\n{"i": 2, "v": 4}\n{"i": 3, "v"')
    assert journal.read() == {0: ["one\r\n\u2028 line", 1], 1: "half an emoji \ud83d", 2: 4}


def test_the_journal_of_other_inputs_is_emptied(tmp_path: Path) -> None:
    left_over = Journal(tmp_path, 3, "key", is_main=True)
    left_over.append([(0, "old")])
    assert Journal(tmp_path, 0, "key", is_main=True).read() == {0: "old"}
    journal = Journal(tmp_path, 3, "another", is_main=True)
    assert not list(tmp_path.iterdir())
    left_over.append([(1, "old")])  # written by a rank that is still running
    journal.append([(1, "new")])
    assert journal.read() == {1: "new"}


def test_what_a_full_disk_tore_is_cut_off_before_the_next_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path, 0, "key", is_main=True)
    journal.append([(0, "zero")])

    def fsync(descriptor: int) -> Any:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - 3)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space.*part-key-00000"):
        patch.setattr(os, "fsync", fsync)
        journal.append([(1, "one")])
    journal.append([(1, "one"), (2, "two")])
    assert journal.read() == {0: "zero", 1: "one", 2: "two"}
    assert journal.path.read_bytes().count(b"\n") == 3


def test_what_is_noted_is_on_disk_soon_and_when_it_ends(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0, "key", is_main=True)
    with pytest.raises(KeyboardInterrupt), journal.recorder(0.01) as note:
        note(0, "first")
        deadline = time.monotonic() + 60
        while not journal.read() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert journal.read() == {0: "first"}, "though nothing came after it"
        for index in range(1, 500):
            note(index, "more")
        raise KeyboardInterrupt
    assert list(journal.read()) == list(range(500))


def test_a_full_disk_ends_the_work_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, full = Journal(tmp_path, 0, "key", is_main=True), threading.Event()

    def fsync(descriptor: int) -> None:
        full.set()
        raise OSError(28, "No space left on device")

    def work() -> None:
        with journal.recorder(0.01) as note:
            note(0, "first")
            assert full.wait(60)
            monkeypatch.undo()  # the disk has room again
            for index in range(1, 10_000_000):
                note(index, "more")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        work()
    assert journal.read()[0] == "first"
