"""Faults below Python leave a stack in the log and a message that names the signal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from steerlm_megatron.launch.local import how_it_ended

_TWO_RUNS_AND_A_FAULT = """
import faulthandler, sys
from steerlm_megatron.observe.log import setup_logging
def reads_a_shard():
    faulthandler._sigsegv()
setup_logging(sys.argv[1], 3)
setup_logging(sys.argv[2], 3)  # the next step of a pipeline
reads_a_shard()
"""


def test_a_fault_below_python_leaves_its_place_in_the_log_of_the_rank(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONFAULTHANDLER", "PYTHONDEVMODE")}
    command = [sys.executable, "-c", _TWO_RUNS_AND_A_FAULT, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode < 0 and not done.stderr
    said = [(folder / "log/rank_3.log").read_text() for folder in folders]
    assert "Segmentation fault" in said[1] and "in reads_a_shard" in said[1] and not said[0]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (1, "failed with exit code 1"),
        (-9, "was killed by SIGKILL (perhaps for want of host memory: see dmesg)"),
        (-6, "was killed by SIGABRT"),
        (-200, "was killed by signal 200"),
    ],
)
def test_how_a_rank_ended_is_said_in_words(code: int, text: str) -> None:
    assert how_it_ended(code) == text
