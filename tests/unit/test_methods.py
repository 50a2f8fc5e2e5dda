"""SteerLM, DPO and PPO by count of passes, the time of scoring and drawing, and the plan of a run."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import yaml

from benchmarks.cost import PUBLISHED, helpsteer, published
from steerlm_megatron.config import compose, load
from steerlm_megatron.config.schema import EngineConfig, ModelConfig, ParallelConfig
from steerlm_megatron.model.arithmetic import stage_parameters
from steerlm_megatron.plan.hardware import hardware
from steerlm_megatron.plan.inference import drawing_time, replicas_of, scoring_seconds
from steerlm_megatron.plan.methods import Method, Net, Texts, dpo, drawn, ppo, scored, steerlm, table, trained
from steerlm_megatron.plan.report import Plan
from steerlm_megatron.plan.workload import packed, stated
from steerlm_megatron.stages.plan_run import add_costs

# Of a layer 160 weights; 40 of the output layer. Three sequences have 15 tokens and 75 squares (test_cost.py).
SMALL = ModelConfig(num_layers=1, hidden_size=4, num_heads=2, ffn_hidden_size=8)
POLICY, HEAD = Net("policy", SMALL, 10), Net("predictor", SMALL, 10, head=True)
TEXTS = Texts(3, 2, 3)
LLAMA_13B = ModelConfig(num_layers=40, hidden_size=5120, num_heads=40, ffn_hidden_size=13824)


def test_one_step_by_hand() -> None:
    assert (TEXTS.tokens, TEXTS.squares, Texts(3, 2, 3, 30.0).squares, TEXTS.times(2).count) == (15, 75, 90, 6)
    assert trained("", POLICY, TEXTS, 1, "").flops == 6 * 200 * 15 + 6 * 4 * 75 == 19800
    assert trained("", HEAD, TEXTS, 2, "").flops == 2 * (6 * 160 * 15 + 6 * 4 * 75) == 32400
    assert scored("", POLICY, TEXTS, "").flops == 2 * 160 * 15 + 2 * 4 * 75 + 2 * 40 * 9 == 6120
    assert scored("", HEAD, TEXTS, "").flops == 5400
    assert drawn("", POLICY, TEXTS, "").flops == 2 * 160 * 12 + 2 * 4 * 75 + 2 * 40 * 9 == 5160


def counts(method: Method) -> tuple[float, float, float]:
    return tuple(sum(getattr(one, name) for one in method.passes) for name in ("forward", "backward", "drawn"))  # type: ignore[return-value]


def test_methods_by_hand() -> None:
    ours = steerlm(POLICY, HEAD, TEXTS, TEXTS, TEXTS, predictor_epochs=2, epochs=1)
    theirs = dpo(POLICY, TEXTS, TEXTS, sft_epochs=1)
    learnt = ppo(POLICY, HEAD, HEAD, TEXTS, TEXTS, TEXTS, sft_epochs=1)
    assert ours.flops == 32400 + 5400 + 19800 + 5160 + 5400 + 19800 and counts(ours) == (18, 12, 3)
    assert theirs.flops == 19800 + 2 * 6120 + 2 * 19800 and counts(theirs) == (15, 9, 0)
    assert learnt.flops == 19800 + 32400 + 5160 + 5400 + 6120 + 5400 + 19800 + 16200 and counts(learnt) == (24, 15, 3)
    assert all(one.source.startswith("arXiv ") for method in (ours, theirs, learnt) for one in method.passes)
    header, rows = table([ours, theirs])
    assert len(rows) == 6 + 1 + 3 + 1 and len(header) == len(rows[0])
    assert rows[6][:2] == ("SteerLM", "all") and rows[-1][-1] == f"{theirs.flops / ours.flops:.2f} x SteerLM"
    assert ours.to_dict()["passes"][0]["flops"] == 32400 and ours.to_dict()["flops"] == ours.flops


def test_rounds_filters_and_a_blend_change_bootstrapping_alone() -> None:
    once = steerlm(POLICY, HEAD, TEXTS, TEXTS, TEXTS, predictor_epochs=1, epochs=1, rounds=0)
    assert len(once.passes) == 3
    twice = steerlm(POLICY, HEAD, TEXTS, TEXTS, TEXTS, predictor_epochs=1, epochs=1, rounds=2, kept=2 / 3, mix=0.5)
    assert len(twice.passes) == 3 + 2 * 4 and twice.passes[3].step == "bootstrapping 1: sampling"
    sampled, beside = twice.passes[5], twice.passes[6]
    assert sampled.forward == pytest.approx(2) and beside.tokens == pytest.approx(sampled.tokens) == pytest.approx(10)


def test_published_runs_stand_in_the_order_of_their_passes() -> None:
    """The hours of arXiv 2311.09528 have other things in them than passes; the order and DPO's factor are alike."""
    found = {method.name: method.flops for method in helpsteer()}
    assert sorted(found, key=found.__getitem__) == sorted(PUBLISHED, key=PUBLISHED.__getitem__)
    assert found["DPO"] / found["SFT"] == pytest.approx(PUBLISHED["DPO"] / PUBLISHED["SFT"], rel=0.1)
    assert found["SteerLM"] / found["SFT"] == pytest.approx(PUBLISHED["SteerLM"] / PUBLISHED["SFT"], rel=0.25)
    assert 1.5 < PUBLISHED["PPO"] / PUBLISHED["SFT"] / (found["PPO"] / found["SFT"]) < 2, "sampling takes the rest"
    assert published().count("\n") == 2 + len(found)


def test_scoring_takes_a_third_of_training_and_grows_with_rows() -> None:
    gpu, work = hardware("h100"), packed(np.array([800] * 500), 4096, 0.5, 500, "here")
    engine = EngineConfig(precision="bf16")

    def seconds(parallel: ParallelConfig, ranks: int, rows: float = 100) -> float:
        return scoring_seconds(LLAMA_13B, parallel, engine, work, gpu, ranks, 32000, rows)

    one = seconds(ParallelConfig(), 1)
    flops = scored("", Net("", LLAMA_13B, 32000, True), Texts(100 * work.samples, 400, 400), "").flops
    assert 0.3 < flops / one / gpu.peak("bf16") < gpu.matmul_share
    assert seconds(ParallelConfig(), 1, 200) == pytest.approx(2 * one)
    assert seconds(ParallelConfig(context=2), 4) == pytest.approx(one / 4), "rows are not split, all ranks are copies"
    assert seconds(ParallelConfig(pipeline=2), 2) == pytest.approx(one, rel=0.1), "one stage waits for the other"
    assert replicas_of(ParallelConfig(tensor=2, pipeline=4, context=2), 16) == 2


def test_drawing_reads_weights_once_a_token() -> None:
    gpu, engine = hardware("h100"), EngineConfig(precision="bf16")

    def time(sequences: float = 1, response: float = 100, most: int = 64, ranks: int = 1, prompt: float = 1):  # type: ignore[no-untyped-def]
        return drawing_time(
            LLAMA_13B, ParallelConfig(), engine, gpu, ranks, 32000, sequences, prompt, response, most
        )  # fmt: skip

    weights = 2 * stage_parameters(LLAMA_13B, ParallelConfig(), 0, 32000)
    reading = weights / (1e9 * gpu.memory_gb_per_sec * gpu.memory_share)
    alone = time()
    assert alone.batch == 1 and alone.token_seconds == pytest.approx(reading, rel=0.01)
    assert alone.seconds == pytest.approx(100 * reading, rel=0.01)
    many = time(sequences=640)
    assert many.batch == 64 and many.seconds < 640 * alone.seconds / 30, "64 sequences share the reading of weights"
    assert time(sequences=640, ranks=4).seconds == pytest.approx(many.seconds / 4)
    assert time(sequences=640, prompt=3000, response=1000).batch < 64, "the cache of so many has no room"


def test_the_plan_of_a_run_counts_its_steps() -> None:
    recipe = yaml.safe_load((compose.conf_dir() / "experiment" / "llama2_13b.yaml").read_text(encoding="utf-8"))
    config = load.from_container(
        {
            "command": "run", "model": asdict(LLAMA_13B), "sampling": {"max_tokens": 100},
            "attributes": {"names": ["quality", "humor"], "max_level": 4},
            **{section: recipe[section] for section in ("parallel", "engine", "train")},
            "plan": {**recipe["plan"], "pairs": 1000, "rollouts": 500},
        }
    )  # fmt: skip
    load.finalize(config, 16, alone=True)
    gpu, work = hardware("h100"), stated(config)
    made = Plan("run", "", 16, gpu, [])
    add_costs(made, config, work, gpu, 16, 32128)
    steps = {one.step: one for one in made.steps_of_run}
    assert list(steps) == [
        "base", "train_ap", "annotate", "sft", "acsft", "bootstrap: draw", "bootstrap: score", "bootstrapped"
    ]  # fmt: skip
    corpus = Texts(1, work.tokens / work.samples, 0)
    assert steps["annotate"].tokens == pytest.approx(90_000 * corpus.tokens, rel=0.01)
    assert steps["acsft"].tokens == pytest.approx(2 * steps["annotate"].tokens, rel=0.01), "train.epochs=2"
    assert steps["bootstrap: draw"].tokens < steps["annotate"].tokens, "responses end at sampling.max_tokens"
    assert steps["train_ap"].flops < steps["acsft"].flops and all(one.seconds > 0 for one in made.steps_of_run)
    ours, theirs, learnt = made.methods
    assert (ours.name, theirs.name, learnt.name) == ("SteerLM", "DPO", "PPO")
    assert theirs.passes[1].forward == 2000 and learnt.passes[2].drawn == 500
    acsft = next(one for one in ours.passes if one.step == "attribute-conditioned SFT")
    assert acsft.flops == pytest.approx(steps["acsft"].flops, rel=0.01), "two ways to the same count"
    unknown = Plan("run", "", 16, gpu, [])
    add_costs(unknown, config, replace(work, rows=None), gpu, 16, 32128)
    assert not unknown.steps_of_run and "plan.samples" in unknown.notes[0]
    config.steerlm2.iterations, config.steerlm2.responses = 1, 3
    weighed = Plan("run", "", 16, gpu, [])
    add_costs(weighed, config, work, gpu, 16, 32128)
    more = {one.step: one for one in weighed.steps_of_run if one.step not in steps}
    assert [name.partition(":")[0] for name in more] == [
        "steerlm2_samples", "steerlm2_samples", "steerlm2_weights", "steerlm2_weights", "steerlm2"
    ]  # fmt: skip
    assert more["steerlm2_weights: base"].tokens == pytest.approx(3 * steps["bootstrap: draw"].tokens)
    config.steerlm2.iterations = 0
    config.init_from = "Llama-2-13b-hf"
    on_a_base = Plan("run", "", 16, gpu, made.stages)
    add_costs(on_a_base, config, work, gpu, 16, 32128)
    assert "base" not in {one.step for one in on_a_base.steps_of_run}
