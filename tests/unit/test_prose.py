"""The repository can be read by itself: it has no reference to documents outside of it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The pattern is built from parts, so that this file does not match it.
OUTSIDE = re.compile("|".join(("facts " + "§", "facts" + "/", "DESIGN " + "§", "DESIGN" + r"\.md", "Issue " + "[0-9]")))


def tracked() -> list[Path]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a checkout")
    return [ROOT / name for name in listed.split("\0") if name]


def test_nothing_refers_to_documents_outside_the_repository() -> None:
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        lines = enumerate(text.splitlines(), 1)
        found += [f"{path.relative_to(ROOT)}:{n}: {line.strip()}" for n, line in lines if OUTSIDE.search(line)]
    assert not found, "\n".join(found)
