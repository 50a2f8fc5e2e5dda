"""Adapters over ranks: their checkpoints move between layouts and engines, masks follow the seed, merging is local."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from steerlm_megatron.config.schema import ParallelConfig as P
from steerlm_megatron.model.lora import is_adapter, merge
from tests.helpers.dist import once, run_ranks
from tests.helpers.engines import LORA, Case, build, make, saved, shards, shards_of, step_batches, unsplit
from tests.helpers.reference import with_adapters

SAVED, TOTAL = 2, 4
SPLIT = P(tensor=2, sequence=True)
MOVES: dict[str, dict[str, Any]] = {
    "PP2": {"layout": P(pipeline=2)},
    "VPP2": {"layout": P(pipeline=2, virtual_pipeline=2)},
    "TP2": {"layout": P(tensor=2)},
    "DP2 ZeRO 3": {"zero": 3},
}
Found = dict[str, Any]


def case(**options: Any) -> Case:
    return Case("sft", **{"tied": True, "lora": LORA, **options})


def steps(engine: Any, first: int, last: int) -> list[float]:
    return [engine.train_step(step_batches(step)).loss for step in range(first, last)]


def two_ranks(root: Path) -> Found:
    found: Found = {}
    engine = make(case(layout=SPLIT))
    steps(engine, 0, SAVED)
    folder = saved(engine, root / "saved")
    found["not resumed"] = steps(engine, SAVED, TOTAL)
    found["keys"] = sorted(dist_checkpointing.load_tensors_metadata(str(folder)))
    for name, options in MOVES.items():
        engine = make(case(**options), seed=77)  # the weights differ from the checkpoint's until it is loaded
        engine.load(folder)
        found[name] = steps(engine, SAVED, TOTAL)
    lora = replace(LORA, dropout=0.3)
    for name, layout in (("TP2+SP", SPLIT), ("TP2", P(tensor=2))):
        found["dropout", name] = {}
        for kind in ("none", "full"):
            engine = make(case(layout=layout, lora=lora, recompute=kind))
            found["dropout", name][kind] = steps(engine, 0, 2)
    engine = make(case(layout=P(tensor=2), lora=lora))
    steps(engine, 0, 1)
    folder = saved(engine, root / "dropout")
    found["whole"] = steps(engine, 1, 3)
    engine = make(case(layout=P(tensor=2), lora=lora), seed=78)
    engine.load(folder)
    found["resumed"] = steps(engine, 1, 3)

    plain = make(case(layout=P(pipeline=2), lora=None))
    folder = saved(plain, root / "plain")
    found["plain"] = plain.evaluate([step_batches(5)])["loss"]
    for name, options in {"PP2": {"layout": P(pipeline=2)}, "ZeRO 3": {"zero": 3}}.items():
        engine = make(case(**options), seed=79)
        before = shards_of(engine)
        engine.load_model(folder)
        found["started", name] = {"before": before, "after": shards_of(engine)}

    engine = make(case(layout=P(tensor=2), tied=False, precision="bf16"))
    before = shards_of(engine)
    losses = steps(engine, 0, 2)
    mains = [group["params"] for inner in engine._inner_optimizers() for group in inner.param_groups]
    found["bf16"] = {
        "before": before,
        "after": shards_of(engine),
        "losses": losses,
        "trained": sum(p.numel() for group in mains for p in group),
        "types": {p.dtype for group in mains for p in group},
    }
    (chunk,) = build(case(layout=P(tensor=2), tied=False))
    found["apart"] = shards([chunk])
    merge(chunk)
    found["merged"] = shards([chunk])
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    root = tmp_path_factory.mktemp("lora")
    return once(tmp_path_factory, "lora", lambda: run_ranks(2, two_ranks, root))


@pytest.mark.distributed
@pytest.mark.parametrize("name", MOVES)
def test_a_checkpoint_moves_to_another_layout(name: str, measured: list[Found]) -> None:
    assert measured[0][name] == pytest.approx(measured[0]["not resumed"], abs=1e-5)


@pytest.mark.distributed
def test_frozen_weights_have_no_optimizer_state(measured: list[Found]) -> None:
    keys = measured[0]["keys"]
    states = [key for key in keys if key.startswith("optimizer.state.")]
    assert states and all(is_adapter(key) for key in states)
    assert {key for key in keys if not key.startswith("optimizer.")} > {
        "decoder.layers.mlp.linear_fc1.weight",
        "decoder.layers.mlp.linear_fc1.lora_b",
        "embedding.word_embeddings.rows",
    }


@pytest.mark.distributed
def test_masks_follow_the_seed(measured: list[Found]) -> None:
    for name in ("TP2", "TP2+SP"):
        losses = measured[0]["dropout", name]
        assert losses["none"] == losses["full"], "recomputation must draw the same masks again"
    assert measured[0]["dropout", "TP2"]["none"][0] != pytest.approx(
        measured[0]["dropout", "TP2+SP"]["none"][0], abs=1e-4
    )
    assert measured[0]["resumed"] == measured[0]["whole"]


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["PP2", "ZeRO 3"])
def test_adapters_that_a_checkpoint_lacks_are_left_alone(name: str, measured: list[Found]) -> None:
    found = [rank["started", name] for rank in measured]
    before, after = (unsplit([rank[when] for rank in found]) for when in ("before", "after"))
    assert all(torch.equal(before[key], after[key]) == is_adapter(key) for key in before if "norm" not in key)


@pytest.mark.distributed
def test_a_bf16_model_has_float32_weights_of_adapters_alone(measured: list[Found]) -> None:
    found = [rank["bf16"] for rank in measured]
    before, after = (unsplit([rank[when] for rank in found]) for when in ("before", "after"))
    assert all(torch.equal(before[key], after[key]) != is_adapter(key) for key in before)
    assert all(value.dtype is torch.bfloat16 for value in after.values())
    ours = {key: shard.tensor.numel() for key, shard in found[0]["after"].items() if is_adapter(key)}
    assert (found[0]["trained"], found[0]["types"]) == (sum(ours.values()), {torch.float32})
    assert all(2 < loss < 9 for loss in found[0]["losses"])


@pytest.mark.distributed
def test_merging_needs_no_other_rank(measured: list[Found]) -> None:
    apart, merged = (unsplit([rank[kind] for rank in measured]) for kind in ("apart", "merged"))
    expected = with_adapters(apart, LORA.scale, LORA.rows[0])
    assert merged.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(merged[key], value, rtol=0, atol=1e-6)
