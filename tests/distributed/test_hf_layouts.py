"""A folder of ``transformers`` fills any layout of ranks with the same model; what ranks share is trained alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steerlm_megatron.config.schema import EngineConfig
from steerlm_megatron.config.schema import ParallelConfig as P
from steerlm_megatron.model.gpt import build_model
from steerlm_megatron.model.hf import HFFolder
from steerlm_megatron.model.predict import predict_values
from steerlm_megatron.model.weights import fill, initial_weights
from steerlm_megatron.runtime import parallel
from steerlm_megatron.stages.train import engine_of
from tests.helpers import hf
from tests.helpers.dist import run_ranks
from tests.helpers.engines import MODEL, OPTIM, Case, Shard, objective, shards, shards_of, step_batches, unsplit
from tests.helpers.engines import VOCAB as ENGINE_VOCAB

pytestmark = pytest.mark.distributed

ADDED = 3
SCORED = ("llama3.1", "gpt_neox", "gemma2_tied")  # classifiers as well
LAYOUTS = {
    "TP2": P(tensor=2),
    "TP2 SP": P(tensor=2, sequence=True),
    "PP2": P(pipeline=2),
    "PP2 VPP2": P(pipeline=2, virtual_pipeline=2),
    "TP2xPP2": P(tensor=2, pipeline=2),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder per case, one of them in shards, and the logits of transformers."""
    root = tmp_path_factory.mktemp("hf")
    models = {case: hf.make(case, root / case, shard="20KB" if case == "llama3.1" else "5GB") for case in hf.CASES}
    logits = {case: hf.their_logits(model, hf.row()) for case, model in models.items()}
    batch = hf.row((150, 1, 41))
    bounds = batch.cu_seqlens.tolist()
    documents = [batch.tokens_T[None, a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    for case in SCORED:
        scores = hf.make(case, root / _scores(case), values=3)
        with torch.no_grad():
            logits[_scores(case)] = torch.cat([scores(tokens).logits.float() for tokens in documents])
    return root, logits


def _scores(case: str) -> str:
    return f"{case} scores"


def read(root: Path, layout: P) -> dict[str, Any]:
    """Per case this rank's parameters and (on the last stage) logits; with chunks of stages, parameters alone."""
    parallel.initialize(layout, 1)
    out = {}
    for case in hf.CASES:
        folder = HFFolder.open(root / case, "init_from")
        chunks = []
        for stage in range(layout.virtual_pipeline or 1):
            at = stage if layout.virtual_pipeline else None
            size = hf.VOCAB + ADDED
            chunks.append(build_model(folder.model, layout, EngineConfig(), size, vp_stage=at, gather_logits=True))
        for chunk in chunks:
            fill(folder.weights(chunk, hf.VOCAB + ADDED))
            chunk.eval()
        batch = hf.row((150, 1, 41))  # sequence parallelism wants an even number
        found = None if layout.virtual_pipeline else predict_values(chunks[0], batch)
        out[case] = shards(chunks), None if found is None else found[:, : hf.VOCAB]
    for case in map(_scores, SCORED):
        folder, chunks = HFFolder.open(root / case, "checkpoint"), []
        for stage in range(layout.virtual_pipeline or 1):
            at = stage if layout.virtual_pipeline else None
            chunks.append(build_model(folder.model, layout, EngineConfig(), hf.VOCAB, attributes=3, vp_stage=at))
            fill(folder.weights(chunks[-1], hf.VOCAB))
            chunks[-1].eval()
        ends = replace(hf.row((150, 1, 41)), pool_P=torch.tensor([149, 150, 191]))
        out[case] = shards(chunks), None if layout.virtual_pipeline else predict_values(chunks[0], ends)
    return out


@pytest.fixture(scope="module")
def alone(folders: tuple[Path, dict[str, torch.Tensor]]) -> dict[str, Any]:
    """What one rank has read."""
    (found,) = run_ranks(1, read, folders[0], P())
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_the_same_model(
    layout: str, folders: tuple[Path, dict[str, torch.Tensor]], alone: dict[str, Any]
) -> None:
    root, theirs = folders
    where = LAYOUTS[layout]
    found = run_ranks(where.tensor * where.pipeline, read, root, where)
    for case in map(_scores, SCORED):
        together = unsplit([rank[case][0] for rank in found])
        whole = {name: part.tensor for name, part in alone[case][0].items()}
        assert sorted(together) == sorted(whole)
        assert all(torch.equal(together[name], value) for name, value in whole.items()), case
        for values in (rank[case][1] for rank in found if rank[case][1] is not None):
            torch.testing.assert_close(values, theirs[case], rtol=0, atol=1e-4)
    for case in hf.CASES:
        whole = {name: part.tensor for name, part in alone[case][0].items()}
        together = unsplit([rank[case][0] for rank in found])
        tied = case.endswith("_tied") and where.pipeline > 1
        assert sorted(together) == sorted([*whole, *(["output_layer.weight"] if tied else [])])
        for name, value in whole.items():
            assert torch.equal(together[name], value), f"{case}: {name}"
        if tied:
            assert torch.equal(together["output_layer.weight"], whole["embedding.word_embeddings.weight"])
        if where.virtual_pipeline:
            continue
        (logits, *others) = [rank[case][1] for rank in found if rank[case][1] is not None]
        assert len(others) == where.tensor - 1
        torch.testing.assert_close(logits, alone[case][1], rtol=0, atol=1e-4)


def test_one_rank_has_the_logits_of_transformers(
    folders: tuple[Path, dict[str, torch.Tensor]], alone: dict[str, Any]
) -> None:
    """What the layouts are compared with, for the documents of the unit tests' row."""
    for case, logits in folders[1].items():
        torch.testing.assert_close(alone[case][1][:191], logits, rtol=0, atol=1e-4)


# Queries' and keys' norms are shared by heads on all tensor-parallel ranks, biases are split with their rows.

TRAINED = replace(
    MODEL, qk_norm=True, qkv_bias=True, parallel_residual=True, rotary_scaling="llama3", rotary_original=16
)
TRAINING = {
    "TP2": Case("sft", P(tensor=2)),
    "TP2 SP": Case("sft", P(tensor=2, sequence=True)),
    "ZeRO1 TP2": Case("sft", P(tensor=2), zero=1),
    "ZeRO1 TP2 SP": Case("sft", P(tensor=2, sequence=True), zero=1),
}


def trained(case: Case) -> dict[str, Shard]:
    """Parameters after two steps."""
    parallel.initialize(case.layout, 1)
    gpt = build_model(TRAINED, case.layout, case.engine, ENGINE_VOCAB)
    weights = list(initial_weights(gpt, TRAINED, ENGINE_VOCAB, 5))
    engine = engine_of(case.engine)([gpt], objective(case), OPTIM["sft"], case.engine, 8)
    engine.fill(weights)
    for step in range(2):
        engine.train_step(step_batches(step))
    return shards_of(engine)


@pytest.mark.parametrize("name", TRAINING)
def test_norms_of_heads_are_trained_alike_in_tensor_parallelism(name: str) -> None:
    (alone,) = run_ranks(1, trained, Case("sft"))
    together = unsplit(run_ranks(2, trained, TRAINING[name]))
    assert sum("q_layernorm" in name for name in together) == TRAINED.num_layers
    for parameter, part in alone.items():
        torch.testing.assert_close(together[parameter], part.tensor, rtol=0, atol=2e-5, msg=parameter)
        if "q_layernorm" in parameter or "linear_qkv.bias" in parameter:
            moved = (part.tensor - (1.0 if "norm" in parameter else 0.0)).abs().max()
            assert moved > 20 * 2e-5, f"{parameter} was not trained"
