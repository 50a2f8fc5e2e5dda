"""The kernels over the cache's blocks, in Triton's interpreter; tests/gpu/test_decode.py has them on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.helpers.paged_cases import CASES


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is installed with Python 3.12")
def test_kernels_in_the_interpreter_are_their_formula() -> None:
    """In a process of its own: whether Triton interprets is decided when it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.paged_cases"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("PagedCase") == len(CASES)
