"""Provides a pipeline run that tests of commands share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.commands import TINY, steerlm
from tests.helpers.dist import once


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which ``run`` is a run of the complete pipeline on two data-parallel ranks."""

    def make() -> str:
        # With workers the folder is beside theirs; without workers its parent would be shared with other pytest calls.
        base = tmp_path_factory.getbasetemp()
        folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "commands"
        folder.mkdir()
        done = steerlm("run", *TINY, "run_dir=run", "parallel.data=2", cwd=folder)
        (folder / "output.txt").write_text(done.stdout + done.stderr)
        return str(folder)

    return Path(once(tmp_path_factory, "commands", make))
