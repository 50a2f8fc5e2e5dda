"""A step of many micro-batches is computed in parts, with the numbers of a single part, and may be given up between."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from steerlm_megatron.config.schema import ParallelConfig as P
from steerlm_megatron.runtime.parallel import layout
from steerlm_megatron.train import engine as engine_module
from steerlm_megatron.train.engine import StepGivenUp, pieces
from tests.helpers.dist import once, run_ranks
from tests.helpers.engines import Case, make, row, saved, shards_of

pytestmark = pytest.mark.distributed

CASES = {
    "data": Case("sft", dropout=0.1),
    "data, overlapped": Case("ap", overlap=True),
    "tensor": Case("sft", P(tensor=2, sequence=True), dropout=0.1),
    "pipeline": Case("sft", P(pipeline=2), tied=True),
    "interleaved": Case("ap", P(pipeline=2, virtual_pipeline=2)),
    "zero 2": Case("sft", zero=2),
    "zero 3": Case("ap", zero=3),
}


def batches(step: int, rows: int = 13) -> list[Any]:
    at = layout()
    count = rows - rows % at.dp_size
    return [row(step, number % 6) for number in range(count)][at.dp_rank :: at.dp_size]


@contextmanager
def pieces_of(micro_batches: int) -> Iterator[None]:
    usual, engine_module._UNTIL_ASKED = engine_module._UNTIL_ASKED, micro_batches
    try:
        yield
    finally:
        engine_module._UNTIL_ASKED = usual


def trained(case: Case, root: Path, size: int, give_up: bool = False) -> dict[str, Any]:
    """Train two steps in parts of ``size`` micro-batches. With ``give_up`` the second is given up once, and the run
    resumes from what is saved then.
    """
    asked = itertools.count()
    with pieces_of(size):
        engine = make(case)
        results = [engine.train_step(batches(0), lambda: next(asked) < 0)]
        questions = next(asked)
        if give_up:
            with pytest.raises(StepGivenUp):
                engine.train_step(batches(1), lambda: True)
            saved(engine, root)
            engine = make(case, seed=6)
            engine.load(root)
        results.append(engine.train_step(batches(1), lambda: False))
    return {
        "losses": [r.loss for r in results],
        "norms": [r.grad_norm for r in results],
        "parameters": {name: shard.tensor for name, shard in shards_of(engine).items()},
        "questions": questions,
    }


def run(root: Path) -> dict[str, Any]:
    out = {}
    for number, (name, case) in enumerate(CASES.items()):
        ways = {"whole": trained(case, root, 1000), "pieces": trained(case, root, 2)}
        out[name] = ways | {"given up": trained(case, root / str(number), 2, give_up=True)}
    return out


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("large_step")
    return once(tmp_path_factory, "large_step", lambda: run_ranks(2, run, root))


@pytest.mark.parametrize("way", ["pieces", "given up"])
@pytest.mark.parametrize("name", CASES)
def test_pieces_add_up_and_a_step_that_is_given_up_leaves_no_trace(
    name: str, way: str, found: list[dict[str, Any]]
) -> None:
    for rank in found:
        whole, other = rank[name]["whole"], rank[name][way]
        assert whole["questions"] == 0 and other["questions"] > 0
        assert other["losses"] == pytest.approx(whole["losses"], rel=1e-6)
        assert other["norms"] == pytest.approx(whole["norms"], rel=1e-5)
        for parameter, expected in whole["parameters"].items():
            torch.testing.assert_close(other["parameters"][parameter], expected, rtol=0, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("stages", [1, 2, 8])
def test_pieces_hold_every_micro_batch_once_and_are_not_small(stages: int) -> None:
    for count in (1, 2, 31, 32, 33, 63, 64, 65, 1000):
        found = pieces(range(count), stages)  # type: ignore[arg-type]  # anything that can be sliced
        assert [number for piece in found for number in piece] == list(range(count))
        assert len(found) == 1 or min(map(len, found)) >= 32 * stages
        assert max(map(len, found)) < 64 * stages
