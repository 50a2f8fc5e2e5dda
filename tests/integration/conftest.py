"""Provides a pipeline run that tests of commands share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.cli import run_here
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


@pytest.fixture(scope="session")
def weighed(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the shared run (``run``), groups of responses that one of its models drew (``drawn.jsonl``),
    their weights for SteerLM 2.0 (``weighed.jsonl``), and shards of these (``shards``).
    """

    def make() -> str:
        folder = work.parent / "weighed"
        folder.mkdir()
        (folder / "run").symlink_to(work / "run")
        lines = (work / "run/04-annotate/train.jsonl").read_text().splitlines()[:5]
        (folder / "some.jsonl").write_text("\n".join(lines) + "\n")
        models = ("checkpoint=run/07-acsft", "ap_checkpoint=run/03-train_ap", "input=some.jsonl")
        drawn = ("bootstrap.responses_per_prompt=3", "bootstrap.combinations=best", "bootstrap.drop_truncated=false",
                 "sampling.max_tokens=16", "sampling.temperature=2.0")  # fmt: skip
        weigh = ("checkpoint=run/07-acsft", "steerlm2.base=run/06-sft", "input=drawn.jsonl", "output=weighed.jsonl")
        shards = ("data.source=messages", "data.input=weighed.jsonl", "data.output_dir=shards", "data.valid_fraction=0",
                  "tokenizer.train=false", "tokenizer.path=run/01-data/shards/train")  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            assert run_here("bootstrap", *models, *drawn, "output=drawn.jsonl", "run_dir=drawn") == 0
            assert run_here("weigh", *weigh, "run_dir=weighed") == 0
            assert run_here("preprocess", "experiment=quickstart", *shards, "run_dir=preprocessed") == 0
        return str(folder)

    return Path(once(tmp_path_factory, "weighed", make))
