"""Every layout trains the model that a plain-torch reference trains; packing changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from steerlm_megatron.config.schema import EngineConfig
from steerlm_megatron.config.schema import ParallelConfig as P
from steerlm_megatron.model.attention import PackedAttention
from steerlm_megatron.model.gpt import build_model
from steerlm_megatron.model.packed_tokens import PackedTokens
from steerlm_megatron.model.weights import fill, global_names, initialize
from steerlm_megatron.runtime import parallel
from tests.helpers.dist import once, run_ranks
from tests.helpers.engines import (
    LABEL_WEIGHTS,
    LORA,
    MODEL,
    NAMES,
    OPTIM,
    VOCAB,
    Case,
    build,
    documents,
    grouped_documents,
    grouped_row,
    head_weights,
    make,
    row,
    shards,
    shards_of,
    step_batches,
    unsplit,
)
from tests.helpers.reference import Document, Trainer, forward, learning_rate, loss_of_all

pytestmark = pytest.mark.beside
STEPS, TOTAL_STEPS, TOLERANCE = 4, 8, 1e-5  # with fewer steps no gradient is left unclipped

# Name of a case: ranks and case. Each runs with both objectives. VPP2 has two chunks on each of two stages.
MATRIX: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {"micro_batches": 1}),
    "accumulation x4": (1, {}),
    "TP2": (2, {"layout": P(tensor=2)}),
    "TP2+SP": (2, {"layout": P(tensor=2, sequence=True)}),
    "TP2+SP recompute": (2, {"layout": P(tensor=2, sequence=True), "recompute": "full"}),
    "PP2": (2, {"layout": P(pipeline=2)}),
    "VPP2": (2, {"layout": P(pipeline=2, virtual_pipeline=2)}),
    "VPP2 micro-batch of its own": (2, {"layout": P(pipeline=2, virtual_pipeline=2), "micro_batches": 1}),
    "CP2": (2, {"layout": P(context=2)}),
    "CP2 recompute": (2, {"layout": P(context=2), "recompute": "selective"}),
    "CP2 ZeRO 1": (2, {"zero": 1, "layout": P(context=2)}),
    "CP2 ZeRO 3": (2, {"zero": 3, "layout": P(context=2)}),
    "DP2": (2, {}),
    "DP2 overlap": (2, {"overlap": True}),
    "DP2 ZeRO 1": (2, {"zero": 1}),
    "DP2 ZeRO 2": (2, {"zero": 2}),
    "DP2 ZeRO 3": (2, {"zero": 3}),
    "DP2 ZeRO 3 recompute": (2, {"zero": 3, "recompute": "full"}),
    "DP2 ZeRO 2 offload": (2, {"zero": 2, "offload": "optimizer"}),
    "DP2 ZeRO 3 offload all": (2, {"zero": 3, "offload": "all"}),
    "TP2 ZeRO 1": (2, {"zero": 1, "layout": P(tensor=2)}),
    "TP2+SP ZeRO 2": (2, {"zero": 2, "layout": P(tensor=2, sequence=True)}),
    "TP2+SP ZeRO 3 recompute": (2, {"zero": 3, "layout": P(tensor=2, sequence=True), "recompute": "full"}),
    "TP2xPP2": (4, {"layout": P(tensor=2, pipeline=2)}),
    "TP2xPP2+SP": (4, {"layout": P(tensor=2, pipeline=2, sequence=True)}),
    "TP2xVPP2+SP": (4, {"layout": P(tensor=2, pipeline=2, virtual_pipeline=2, sequence=True)}),
    "TP2xDP2": (4, {"layout": P(tensor=2)}),
    "TP2xDP2 ZeRO 2": (4, {"zero": 2, "layout": P(tensor=2)}),
    "TP2xDP2 ZeRO 3": (4, {"zero": 3, "layout": P(tensor=2)}),
    "TP2xDP2+SP ZeRO 1": (4, {"zero": 1, "layout": P(tensor=2, sequence=True)}),
    "TP2xDP2+SP ZeRO 3": (4, {"zero": 3, "layout": P(tensor=2, sequence=True)}),
    "CP4": (4, {"layout": P(context=4)}),
    "TP2xCP2+SP": (4, {"layout": P(tensor=2, context=2, sequence=True)}),
    "PP2xCP2": (4, {"layout": P(pipeline=2, context=2)}),
    "TP2xCP2+SP overlap": (
        4,
        {"layout": P(tensor=2, context=2, sequence=True), "overlap": True, "recompute": "full"},
    ),
    "VPP2xCP2 micro-batch of its own": (
        4,
        {"layout": P(pipeline=2, virtual_pipeline=2, context=2), "micro_batches": 1},
    ),
    "CP2xDP2 overlap": (4, {"layout": P(context=2), "overlap": True}),
    "CP2xDP2 ZeRO 2": (4, {"zero": 2, "layout": P(context=2)}),
    "PP2xDP2": (4, {"layout": P(pipeline=2)}),
    "PP2xDP2 overlap": (4, {"layout": P(pipeline=2), "overlap": True}),
    "VPP2xDP2 overlap": (4, {"layout": P(pipeline=2, virtual_pipeline=2), "overlap": True}),
    "TP2xDP2+SP overlap": (4, {"layout": P(tensor=2, sequence=True), "overlap": True, "recompute": "full"}),
}
TIED = (
    "DP2 overlap",
    "PP2xDP2 overlap",
    "DP2 ZeRO 3",
    "TP2xDP2 ZeRO 2",
    "1 rank",
    "TP2+SP",
    "PP2",
    "VPP2",
    "TP2xPP2+SP",
    "PP2xDP2",
    "PP2xCP2",
)
# Layouts at which adapters are trained, and as what: with the loss of SFT, of AP (the head at a rate of its own), or of
# SFT with tied tables.
ADAPTED = {
    "1 rank": ("sft lora", "ap lora", "sft lora tied"),
    "TP2": ("ap lora",),
    "TP2+SP recompute": ("sft lora tied",),
    "PP2": ("sft lora",),
    "VPP2": ("sft lora tied",),
    "CP2": ("sft lora",),
    "DP2 ZeRO 3 recompute": ("sft lora tied",),
    "TP2xPP2+SP": ("sft lora tied", "ap lora"),
    "TP2xDP2+SP ZeRO 1": ("sft lora",),
    "PP2xDP2 overlap": ("sft lora tied",),
}
HEAD_LR = 4e-4

# Layouts at which SteerLM 2.0 is trained: its loss compares the responses of a group, which share a micro-batch.
GROUPED = (
    "1 rank", "accumulation x4", "TP2+SP recompute", "PP2", "VPP2 micro-batch of its own", "CP2", "CP2 ZeRO 3",
    "DP2 overlap", "DP2 ZeRO 2", "TP2xPP2", "PP2xCP2",
)  # fmt: skip
GEMMA = ("1 rank", "TP2+SP", "PP2", "CP2", "DP2 ZeRO 3", "TP2xPP2")


def key(objective: str, name: str, kind: str = "") -> str:
    return f"{objective}{kind and ' '}{kind} {name}"


def cases(ranks: int) -> dict[str, Case]:
    found = {}
    for name, (needed, options) in MATRIX.items():
        if needed != ranks:
            continue
        for objective in ("sft", "ap"):
            found[key(objective, name)] = Case(objective, **options)
        if name in TIED:
            found[key("sft", name, "tied")] = Case("sft", tied=True, **options)
        if name in GROUPED:
            found[key("steerlm2", name)] = Case("steerlm2", **options)
        if name in GEMMA:
            found[key("sft", name, "gemma")] = Case("sft", gemma=True, **options)
        for kind in ADAPTED.get(name, ()):
            found[f"{kind} {name}"] = adapted(kind, **options)
    return found


def adapted(kind: str, **options: Any) -> Case:
    """A case in which nothing but adapters (and a regression head) is trained."""
    objective = kind.split()[0]
    head_lr = HEAD_LR if objective == "ap" else None
    return Case(objective, tied=kind.endswith("tied"), lora=LORA, head_lr=head_lr, **options)


# ---- inside the ranks


def train(case: Case) -> dict[str, Any]:
    engine = make(case, steps=TOTAL_STEPS)
    if case.overlap and engine.layout.pp_rank == 0:  # on other stages the pipeline hides the collectives
        assert len(engine.chunks[0].bucket_groups) > 2
    grouped = case.objective == "steerlm2"
    results = [engine.train_step(step_batches(step, case.micro_batches, grouped)) for step in range(STEPS)]
    valid = engine.evaluate([step_batches(step, case.micro_batches, grouped) for step in (100, 101)])
    return {
        "loss": [r.loss for r in results],
        "norm": [r.grad_norm for r in results],
        "lr": [r.lr for r in results],
        "valid": valid["loss"],
        "params": shards_of(engine),
    }


def train_all(ranks: int) -> dict[str, Any]:
    return {name: train(case) for name, case in cases(ranks).items()}


def reference(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Train the reference, in float64, so that the differences are those of the engines."""
    start = {name: p.to(dtype) for name, p in unsplit([shards(build(case))]).items()}
    weights_A = torch.tensor([LABEL_WEIGHTS.get(name, 1.0) for name in NAMES])
    lora = None if case.lora is None else (case.lora.scale, case.lora.rows[0])
    if case.lora is not None and case.tied:
        start.pop("output_layer.rows", None)
    trainer = Trainer(dict(start), case.model, case.optim, TOTAL_STEPS, weights_A, lora)
    results = [trainer.train_step(documents_of(case, step)) for step in range(STEPS)]
    weights = trainer.weights(trainer.params)
    sums = [loss_of_all(weights, documents_of(case, step), case.model, weights_A) for step in (100, 101)]
    losses, norms = zip(*results, strict=True)
    return {
        "loss": losses,
        "norm": norms,
        "lr": [learning_rate(OPTIM[case.objective], step + 1, TOTAL_STEPS) for step in range(STEPS)],
        "valid": float(sum(total for total, _ in sums)) / sum(count for _, count in sums),
        "params": trainer.params,
        "moved": {name: float((p - start[name]).abs().max()) for name, p in trainer.params.items()},
    }


def documents_of(case: Case, step: int) -> list[Document]:
    """Return the documents of all micro-batches of a step."""
    return grouped_documents(step) if case.objective == "steerlm2" else documents([row(step, i) for i in range(4)])


def references() -> dict[str, Any]:
    parallel.initialize(P(), 1)
    wanted = {
        "sft": Case("sft"),
        "ap": Case("ap"),
        "steerlm2": Case("steerlm2"),
        "sft tied": Case("sft", tied=True),
        "sft gemma": Case("sft", gemma=True),
    }
    wanted |= {kind: adapted(kind) for kind in ADAPTED["1 rank"]}
    found = {name: reference(case) for name, case in wanted.items()}
    return found | {f"{name} float32": reference(Case(name), torch.float32) for name in OPTIM}


LENGTHS = (1, 600, 37, 513, 2, 511, 1, 64, 9, 512, 37)
VARIANTS = [(o, g, r) for o in ("sft", "ap") for g in (4, 2) for r in ("none", "selective", "full")]


def packed_against_alone() -> dict[Any, dict[str, float]]:
    parallel.initialize(P(), 1)
    found = {}
    for objective in ("sft", "ap"):
        for groups in (4, 2):
            probes = {kind: _Probe(objective, groups, kind) for kind in ("none", "selective", "full")}
            plain = probes["none"]
            alone = plain.gradients([plain.run([tokens]) for tokens in plain.tokens], plain.params)
            params = {name: p.detach().double().requires_grad_() for name, p in plain.params.items()}
            reference = plain.gradients([forward(params, tokens, plain.model) for tokens in plain.tokens], params)
            for kind, probe in probes.items():
                found[objective, groups, kind] = probe.compare({"alone": alone, "reference": reference})
    return found


class _Probe:
    """A small model and documents for it, with a random weight for every output."""

    def __init__(self, objective: str, groups: int, recompute: str) -> None:
        self.model = replace(MODEL, num_query_groups=groups, num_layers=2)
        head = len(NAMES) if objective == "ap" else None
        engine = EngineConfig(recompute=recompute, attention="sdpa")
        self.gpt = initialize(build_model(self.model, P(), engine, VOCAB, head), self.model, VOCAB, seed=3)
        if head:
            fill(head_weights(self.gpt, scale=0.5))
        self.params: dict[str, torch.Tensor] = dict(global_names(self.gpt))
        g = torch.Generator().manual_seed(0)
        self.tokens = [torch.randint(0, VOCAB, (length,), generator=g) for length in LENGTHS]
        width = head or self.gpt.output_layer.weight.shape[0]
        self.weights = [torch.randn(length, width, generator=g) for length in LENGTHS]

    def run(self, tokens: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the outputs for all of ``tokens`` as one packed row."""
        cu = torch.tensor([0, *map(len, tokens)]).cumsum(0).to(torch.int32)
        positions = torch.cat([torch.arange(len(t)) for t in tokens])
        packed = PackedTokens.from_cu_seqlens(cu, positions)
        return self.gpt(torch.cat(list(tokens))[None], positions[None], None, packed_seq_params=packed)[0]

    def gradients(
        self, outputs: Sequence[torch.Tensor], params: dict[str, torch.Tensor]
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Return the outputs, and the gradient of their weighted sum for every parameter."""
        for p in params.values():
            p.grad = None
        torch.stack([(o * w).sum() for o, w in zip(outputs, self.weights, strict=True)]).sum().backward()
        return [o.detach() for o in outputs], {name: p.grad for name, p in params.items()}

    def compare(self, others: dict[str, tuple[list[torch.Tensor], dict[str, torch.Tensor]]]) -> dict[str, float]:
        """Return the largest differences of the packed row: in outputs and, relative to the largest, in gradients."""
        calls, original = [], PackedAttention.forward

        def counted(module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return original(module, *args, **kwargs)

        PackedAttention.forward = counted
        try:
            outputs, grads = self.gradients(self.run(self.tokens).split(LENGTHS), self.params)
        finally:
            PackedAttention.forward = original
        found: dict[str, float] = {"attention calls": len(calls)}
        for name, (their_outputs, their_grads) in others.items():
            pairs = zip(outputs, their_outputs, strict=True)
            found[f"output-{name}"] = max(float((a - b).abs().max()) for a, b in pairs)
            found[f"grad-{name}"] = max(
                float((a - their_grads[n]).abs().max() / their_grads[n].abs().max()) for n, a in grads.items()
            )
        return found


def train_with_dropout(ranks: int) -> dict[str, Any]:
    layout = {1: P(), 2: P(tensor=2, sequence=True), 4: P(tensor=2, context=2)}[ranks]
    runs = {"first": ("none", 5), "again": ("none", 5), "other seed": ("none", 6)}
    runs |= {kind: (kind, 5) for kind in ("selective", "full")}
    found = {
        name: _losses(Case("sft", layout, dropout=0.2, recompute=kind), seed) for name, (kind, seed) in runs.items()
    }
    return found | {"without": _losses(Case("sft", layout))}


def _losses(case: Case, seed: int = 5) -> list[float]:
    engine = make(case, seed, TOTAL_STEPS)
    return [engine.train_step(step_batches(step, case.micro_batches)).loss for step in range(3)]


def one_rank() -> dict[str, Any]:
    return {
        "trained": train_all(1),
        "references": references(),
        "packed": packed_against_alone(),
        "dropout": train_with_dropout(1),
    }


def several_ranks(ranks: int) -> dict[str, Any]:
    return {"trained": train_all(ranks), "dropout": train_with_dropout(ranks)}


# ---- outside


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """Return a function from a world of 1, 2 or 4 ranks, each started once, to the measurements of its ranks."""
    known: dict[int, list[dict[str, Any]]] = {}

    def get(ranks: int) -> list[dict[str, Any]]:
        if ranks not in known:
            work = (1, one_rank) if ranks == 1 else (ranks, several_ranks, ranks)
            known[ranks] = once(tmp_path_factory, f"parity{ranks}", lambda: run_ranks(*work, timeout=1500))
        return known[ranks]

    return get


def _all_cases() -> list[tuple[int, str]]:
    return [(ranks, name) for ranks in (1, 2, 4) for name in cases(ranks)]


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "name"), _all_cases(), ids=[name.replace(" ", "-") for _, name in _all_cases()])
def test_every_layout_trains_the_references_model(
    ranks: int, name: str, measured: Callable[[int], list[dict[str, Any]]], record_property: Any
) -> None:
    kinds = [kind for kind in ("lora", "tied", "gemma") if f" {kind} " in name]
    expected = measured(1)[0]["references"][" ".join([name.split()[0], *kinds])]
    by_rank = [found["trained"][name] for found in measured(ranks)]
    params = unsplit([found["params"] for found in by_rank])
    if "output_layer.weight" in params and {"tied", "gemma"} & {*kinds}:  # the last stage has a tied copy
        assert torch.equal(params.pop("output_layer.weight"), params["embedding.word_embeddings.weight"])
        if "output_layer.rows" in params:
            assert torch.equal(params.pop("output_layer.rows"), params["embedding.word_embeddings.rows"])
    assert params.keys() == expected["params"].keys()
    for other in by_rank[1:]:  # every rank gets the same numbers
        assert all(other[kind] == by_rank[0][kind] for kind in ("loss", "norm", "valid"))
    compare(name, by_rank[0], params, expected, record_property)


def compare(
    name: str, found: dict[str, Any], params: dict[str, torch.Tensor], expected: dict[str, Any], record_property: Any
) -> None:
    different = {n: float((p - expected["params"][n]).abs().max()) for n, p in params.items()}
    worst = {
        "loss": max(abs(a - b) for a, b in zip(found["loss"], expected["loss"], strict=True)),
        "norm": max(abs(a / b - 1) for a, b in zip(found["norm"], expected["norm"], strict=True)),
        "valid": abs(found["valid"] - expected["valid"]),
        "params": max(different.values()),
    }
    record_property("measured", (name, worst))
    assert max(worst.values()) <= TOLERANCE, (worst, max(different, key=lambda n: different[n]))


@pytest.mark.distributed
@pytest.mark.parametrize("objective", list(OPTIM))
def test_the_yardstick(objective: str, measured: Callable[[int], list[dict[str, Any]]], record_property: Any) -> None:
    """The reference in float32 shows the effect of rounding alone."""
    found = measured(1)[0]["references"]
    rounded = found[f"{objective} float32"]
    compare(f"{objective} reference in float32", rounded, rounded["params"], found[objective], record_property)


@pytest.mark.distributed
@pytest.mark.parametrize("objective", list(OPTIM))
def test_the_matrix_would_see_a_difference(objective: str, measured: Callable[[int], list[dict[str, Any]]]) -> None:
    """Parameters move far beyond the tolerance, some steps are clipped and some are not, and counts are unequal."""
    found = measured(1)[0]["references"][objective]
    assert min(found["moved"].values()) > 50 * TOLERANCE, found["moved"]
    assert min(found["norm"]) < OPTIM[objective].clip_grad < max(found["norm"])
    engine = measured(1)[0]["trained"][key(objective, "accumulation x4")]
    assert engine["lr"] == pytest.approx(found["lr"]) and engine["lr"][0] == pytest.approx(5e-4)
    if objective == "steerlm2":
        drawn = [[grouped_row(step, i)[1] for i in range(4)] for step in range(STEPS)]
        counts = [[groups.count for groups in step] for step in drawn]
        assert counts[1][3] == 0 and all(max(c) > 1.3 * min(c) for c in counts), counts
        sizes = {int(size) for step in drawn for groups in step for size in np.bincount(groups.group_N)}
        assert sizes == {2, 3}, "groups of different sizes"
        return
    rows = [[row(step, i) for i in range(4)] for step in range(STEPS)]
    counts = [[r.target_tokens if objective == "sft" else r.values_PA.isfinite().sum() for r in step] for step in rows]
    assert counts[1][3] == 0 and all(max(c) > 1.3 * min(c) for c in counts), counts


@pytest.mark.distributed
@pytest.mark.parametrize(("objective", "groups", "recompute"), VARIANTS)
def test_packed_rows_equal_documents_alone(
    objective: str, groups: int, recompute: str, measured: Callable[[int], list[dict[str, Any]]], record_property: Any
) -> None:
    found = dict(measured(1)[0]["packed"][objective, groups, recompute])
    calls = found.pop("attention calls")
    assert calls == (2 if recompute == "none" else 4), "of two layers: recomputation runs attention once more"
    record_property("measured", (f"packed {objective} {'MHA' if groups == 4 else 'GQA'} recompute={recompute}", found))
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_dropout_follows_the_seed(ranks: int, measured: Callable[[int], list[dict[str, Any]]]) -> None:
    losses = measured(ranks)[0]["dropout"]
    assert losses["again"] == losses["first"]
    assert losses["selective"] == losses["first"], "recomputation must draw the same masks again"
    assert losses["full"] == losses["first"], "recomputation must draw the same masks again"
    assert abs(losses["other seed"][0] - losses["first"][0]) > 1e-4
    assert abs(losses["without"][0] - losses["first"][0]) > 1e-4
