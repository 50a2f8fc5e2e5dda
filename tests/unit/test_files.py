"""Atomic writing of files, and checksums."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from steerlm_megatron.errors import UserError
from steerlm_megatron.files import (
    atomic_path,
    describe_file,
    file_sha256,
    put_folder,
    read_json_object,
    take_back,
    write_bytes_atomic,
    write_json_atomic,
)


def test_json_is_strict_and_atomic(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json_atomic(path, {"x": math.nan, "y": np.float32(1.5), "z": (1, np.arange(2)), "p": tmp_path, 3: {"b", "a"}})
    assert json.loads(path.read_text()) == {"x": None, "y": 1.5, "z": [1, [0, 1]], "p": str(tmp_path), "3": ["a", "b"]}
    with pytest.raises(TypeError, match="object"):
        write_json_atomic(path, {"x": object()})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text())["y"] == 1.5
    assert list(tmp_path.iterdir()) == [path]


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_anybody_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "a.bin"
    done: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        done.append("fsync " + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        done.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_bytes_atomic(path, b"abc")
    assert done == [f"fsync .a.bin.{os.getpid()}.tmp", "rename", "fsync new"] and path.read_bytes() == b"abc"
    done.clear()
    with atomic_path(path, sync=False) as temporary:
        temporary.write_bytes(b"de")
    assert done == ["rename"] and path.read_bytes() == b"de"


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (2 << 20) + 5])
def test_a_file_is_described_in_one_reading(size: int, tmp_path: Path) -> None:
    data = np.random.default_rng(size).bytes(size)
    path, seen = tmp_path / "a", bytearray()
    path.write_bytes(data)
    assert describe_file(path, seen.extend) == {"bytes": size, "sha256": hashlib.sha256(data).hexdigest()}
    assert seen == data and file_sha256(path) == hashlib.sha256(data).hexdigest()


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "a").write_text(text)
    return path


def test_a_folder_is_replaced_or_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, aside = tmp_path / "target", tmp_path / "aside"
    put_folder(folder(tmp_path / "first", "1"), target, aside)
    put_folder(folder(tmp_path / "second", "2"), target, aside)
    assert (target / "a").read_text() == "2" and list(tmp_path.iterdir()) == [target]
    real = Path.rename

    def rename(self: Path, to: Path) -> Path:
        if self.name == "third":
            raise OSError("full")
        return real(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="full"):
        put_folder(folder(tmp_path / "third", "3"), target, aside)
    assert (target / "a").read_text() == "2" and not aside.exists()
    target.rename(aside)  # as after a kill between the two renames
    take_back(target, aside)
    take_back(target, aside)
    assert (target / "a").read_text() == "2" and not aside.exists()


def test_an_object_is_read_from_json(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    assert read_json_object(path) == {}
    path.write_text('{"a": [1]}')
    assert read_json_object(path) == {"a": [1]}
    path.write_text("[1]")
    assert read_json_object(path) == {}
    path.write_text("{")
    with pytest.raises(UserError, match=r"one\.json cannot be read"):
        read_json_object(path)
