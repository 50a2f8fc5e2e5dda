"""What a killed job had finished: nothing is lost, nothing torn is taken for finished."""

from __future__ import annotations

import os
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
    Journal(tmp_path, 3, "key", is_main=True).append([(0, "old")])
    assert Journal(tmp_path, 0, "key", is_main=True).read() == {0: "old"}
    assert Journal(tmp_path, 0, "another", is_main=True).read() == {}


def test_what_a_full_disk_tore_is_cut_off_before_the_next_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path, 0, "key", is_main=True)
    journal.append([(0, "zero")])

    def fsync(descriptor: int) -> Any:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - 3)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", fsync)
        journal.append([(1, "one")])
    journal.append([(1, "one"), (2, "two")])
    assert journal.read() == {0: "zero", 1: "one", 2: "two"}
    assert journal.path.read_bytes().count(b"\n") == 3
