"""The DeepSpeed engine's checkpoints: bitwise at the same layout, up to rounding at other ZeRO stages and layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steerlm_megatron.config import load
from steerlm_megatron.config.schema import Config, EngineConfig, ParallelConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.runtime.collectives import gather_objects
from tests.helpers.dist import once, run_ranks
from tests.helpers.engines import Case, bare, build, make, put_together, row, saved, shards, shards_of, step_batches

pytestmark = pytest.mark.distributed

DP2, TP2, PP2 = ParallelConfig(), ParallelConfig(tensor=2), ParallelConfig(pipeline=2)
TP2_SP, CP2 = ParallelConfig(tensor=2, sequence=True), ParallelConfig(context=2)
# name: objective, (ZeRO stage, layout) that saves, (ZeRO stage, layout) that loads
MOVES = {
    "DP2 ZeRO 1": ("sft", (1, DP2), (1, DP2)),
    "DP2 ZeRO 2": ("ap", (2, DP2), (2, DP2)),
    "DP2 ZeRO 3": ("ap", (3, DP2), (3, DP2)),
    "TP2 ZeRO 3": ("sft", (3, TP2), (3, TP2)),
    "CP2 ZeRO 3": ("sft", (3, CP2), (3, CP2)),
    "CP2 ZeRO 2 -> TP2 ZeRO 3": ("ap", (2, CP2), (3, TP2)),
    "DP2 ZeRO 3 -> TP2 ZeRO 1": ("sft", (3, DP2), (1, TP2)),
    "TP2 ZeRO 2 -> DP2 ZeRO 3": ("ap", (2, TP2), (3, DP2)),
}


def losses(engine: Any, first: int, last: int) -> list[float]:
    return [engine.train_step(step_batches(step)).loss for step in range(first, last)]


def moved(name: str, root: Path) -> dict[str, Any]:
    objective, (stage, layout), (other_stage, other_layout) = MOVES[name]
    same = (stage, layout) == (other_stage, other_layout)
    case = Case(objective, layout, zero=stage, dropout=0.1 if same else 0.0)
    engine = make(case)
    losses(engine, 0, 3)
    saved(engine, root / name)
    expected = losses(engine, 3, 7)
    last = {key: shard.tensor for key, shard in shards_of(engine).items()}
    engine = make(replace(case, layout=other_layout, zero=other_stage), seed=77)
    engine.load(root / name)
    found = losses(engine, 3, 7)
    equal = same and all(torch.equal(shard.tensor, last[key]) for key, shard in shards_of(engine).items())
    return {"expected": expected, "found": found, "same": same, "equal": equal}


# Pairs of different engines on two ranks, each (ZeRO stage, or 0 for Megatron-Core; layout).
CROSSINGS = {
    "ZeRO 3 DP2 -> Megatron-Core PP2": ("sft", (3, DP2), (0, PP2)),
    "ZeRO 2 DP2 -> Megatron-Core CP2": ("sft", (2, DP2), (0, CP2)),
    "ZeRO 1 TP2 -> Megatron-Core DP2": ("ap", (1, TP2), (0, DP2)),
    "Megatron-Core TP2+SP -> ZeRO 3 DP2": ("sft", (0, TP2_SP), (3, DP2)),
    "Megatron-Core PP2 -> ZeRO 2 TP2+SP": ("ap", (0, PP2), (2, TP2_SP)),
}


def crossed(name: str, root: Path) -> dict[str, Any]:
    """Return losses of the steps after a change of engine, and of the run that kept its own."""
    objective, (stage, layout), (other_stage, other_layout) = CROSSINGS[name]
    engine = make(Case(objective, layout, zero=stage))
    losses(engine, 0, 3)
    saved(engine, root / name)
    expected = losses(engine, 3, 8)
    engine = make(Case(objective, other_layout, zero=other_stage), seed=77)
    engine.load(root / name)
    return {"expected": expected, "found": losses(engine, 3, 8)}


def weights_alone(root: Path) -> dict[str, Any]:
    """Load a checkpoint's weights into either engine, and a checkpoint without the regression head that a model has."""
    folder = root / "DP2 ZeRO 3 -> TP2 ZeRO 1"
    out: dict[str, Any] = {"valid": []}
    for case in (Case("sft"), Case("sft", zero=1), Case("sft", zero=3)):
        engine = make(case, seed=78)
        engine.load_model(folder)
        out["valid"].append(engine.evaluate([step_batches(3)])["loss"])
    regression = make(Case("ap", zero=3), seed=79)
    before = put_together(regression, "output_layer.regression.weight").clone()
    regression.load_model(folder)
    out["head kept"] = torch.equal(before, put_together(regression, "output_layer.regression.weight"))
    return out


HEAD_ONLY = {
    "DP2": Case("ap", DP2, head_only=True),
    "DP2 overlap": Case("ap", DP2, overlap=True, head_only=True),
    "TP2": Case("ap", TP2, head_only=True),
    "DP2 ZeRO 1": Case("ap", DP2, zero=1, head_only=True),
    "DP2 ZeRO 3": Case("ap", DP2, zero=3, head_only=True),
}


def head_alone(case: Case, folder: Path) -> dict[str, Any]:
    """Return which parameters three steps move, and whether a saved run goes on with the same losses."""
    engine = make(case)
    before = {name: shard.tensor.clone() for name, shard in shards_of(engine).items()}
    losses(engine, 0, 3)
    saved(engine, folder)
    moved = {name for name, shard in shards_of(engine).items() if not torch.equal(shard.tensor, before[name])}
    expected = losses(engine, 3, 5)
    engine = make(case, seed=80)
    engine.load(folder)
    return {"moved": moved, "expected": expected, "found": losses(engine, 3, 5)}


ACCUMULATED = {
    "Megatron-Core": Case("sft", DP2, precision="bf16"),
    "ZeRO 2": Case("sft", DP2, zero=2, precision="bf16"),
    "ZeRO 3": Case("sft", DP2, zero=3, precision="bf16"),
    "ZeRO 3 offload all": Case("sft", DP2, zero=3, offload="all", precision="bf16"),
}


def accumulated(case: Case) -> list[float]:
    """Return the gradient norms in bf16 of one micro-batch, and of 32 copies of it: the division by 32 is exact."""
    return [make(case).train_step([row(0, 2)] * times).grad_norm for times in (1, 32)]


ROUNDED = {
    "Megatron-Core DP2": Case("sft", DP2, precision="bf16"),
    "Megatron-Core TP2": Case("sft", TP2, precision="bf16"),
    "ZeRO 1 TP2": Case("sft", TP2, zero=1, precision="bf16"),
    "ZeRO 2 DP2": Case("sft", DP2, zero=2, precision="bf16"),
    "ZeRO 3 DP2": Case("sft", DP2, zero=3, precision="bf16"),
}


def main_weights(case: Case) -> bool:
    """Whether the float32 weights that are updated start as the initial ones, which are not rounded."""
    engine = make(case)
    expected = {name: s.tensor for name, s in shards(build(replace(case, zero=0, precision="fp32"))).items()}
    if case.zero:
        return all(torch.equal(put_together(engine, name).cpu(), value) for name, value in expected.items())
    (chunk,) = bare(engine)
    mains = {name: getattr(parameter, "main_param", None) for name, parameter in chunk.named_parameters()}
    if engine.layout.tp_size > 1:
        by_rank = [mains]
    else:  # each data-parallel rank has a range of the flattened parameter, the first rank the first one
        by_rank = gather_objects(mains)
    return all(
        torch.equal(torch.cat([part[name] for part in by_rank if part[name] is not None]), value.flatten())
        for name, value in expected.items()
    )


def everything(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {name: moved(name, root) for name in MOVES}
    found |= {name: crossed(name, root) for name in CROSSINGS}
    found["weights"] = weights_alone(root)
    found["accumulated"] = {name: accumulated(case) for name, case in ACCUMULATED.items()}
    found["unrounded"] = {name: main_weights(case) for name, case in ROUNDED.items()}
    found["head"] = {name: head_alone(case, root / f"head {name}") for name, case in HEAD_ONLY.items()}
    return found


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("deepspeed")
    return once(tmp_path_factory, "deepspeed", lambda: run_ranks(2, everything, root))


@pytest.mark.parametrize("name", ROUNDED)
def test_main_weights_start_from_values_that_are_not_rounded(name: str, measured: list[dict[str, Any]]) -> None:
    assert [rank["unrounded"][name] for rank in measured] == [True, True]


@pytest.mark.parametrize("name", MOVES)
def test_training_goes_on(name: str, measured: list[dict[str, Any]]) -> None:
    for rank in measured:
        found = rank[name]
        if found["same"]:
            assert found["found"] == found["expected"] and found["equal"], "bit by bit, dropout too"
        else:
            assert max(abs(a - b) for a, b in zip(found["found"], found["expected"], strict=True)) <= 1e-5, found


@pytest.mark.parametrize("name", CROSSINGS)
def test_training_goes_on_with_the_other_engine(name: str, measured: list[dict[str, Any]]) -> None:
    """Five steps are compared, since a wrong moment or step count shows from the second step on."""
    for rank in measured:
        pairs = zip(rank[name]["found"], rank[name]["expected"], strict=True)
        assert max(abs(a - b) for a, b in pairs) <= 1e-5, rank[name]


def test_either_engine_takes_the_weights_alone(measured: list[dict[str, Any]]) -> None:
    found = measured[0]["weights"]
    assert max(found["valid"]) - min(found["valid"]) <= 1e-6, found
    assert found["head kept"]


@pytest.mark.parametrize("name", HEAD_ONLY)
def test_the_head_alone_is_trained(name: str, measured: list[dict[str, Any]]) -> None:
    found = measured[0]["head"][name]
    assert found["moved"] == {"output_layer.regression.weight", "output_layer.regression.bias"}
    assert found["found"] == found["expected"], "the trunk too is in the checkpoint"
    same = measured[0]["head"]["DP2"]["expected"]
    assert max(abs(a - b) for a, b in zip(found["expected"], same, strict=True)) <= 1e-5


@pytest.mark.parametrize("name", ACCUMULATED)
def test_micro_batches_add_up_in_float32(name: str, measured: list[dict[str, Any]]) -> None:
    """In bf16 the sum of 32 equal gradients would be 0.06 % off, since adding to a large sum rounds a part away."""
    once_over, many_times = measured[0]["accumulated"][name]
    assert many_times == pytest.approx(once_over, rel=1e-5)


@pytest.mark.parametrize(
    ("engine", "layout", "words"),
    [
        ({"name": "deepspeed"}, {"pipeline": 2}, ["parallel.pipeline=2", "engine.zero_stage=3", "engine=megatron"]),
        ({"name": "deepspeed", "zero_stage": 4}, {}, ["engine.zero_stage=4", "1 2 3"]),
        ({"name": "deepspeed", "offload": "all"}, {}, ["engine.offload=all", "engine.zero_stage=3"]),
        ({"zero_stage": 3}, {}, ["engine.zero_stage=3", "engine=deepspeed"]),
    ],
)
def test_what_it_cannot_do_is_refused(engine: dict[str, Any], layout: dict[str, Any], words: list[str]) -> None:
    config = Config(command="train_sft", engine=EngineConfig(**engine), parallel=ParallelConfig(**layout))
    with pytest.raises(UserError) as error:
        load.finalize(config)
    assert all(word in str(error.value) for word in words), error.value
