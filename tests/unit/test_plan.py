"""The plan of a run: arithmetic against the modules, hardware, time, layouts that fit, recipes, the command."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch.utils.checkpoint import checkpoint

from steerlm_megatron.config import compose, load
from steerlm_megatron.config.schema import Config, EngineConfig, ModelConfig, ParallelConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.model import arithmetic
from steerlm_megatron.observe.metrics import peak_flops
from steerlm_megatron.plan import memory
from steerlm_megatron.plan.hardware import Hardware, hardware
from steerlm_megatron.plan.search import search
from steerlm_megatron.plan.timing import step_time
from steerlm_megatron.plan.trace import Held, batch_of, stages, trace, trace_deep
from steerlm_megatron.plan.tracker import Tracker, flash_on_meta
from steerlm_megatron.plan.workload import packed, stated
from steerlm_megatron.stages.plan import plan_of
from steerlm_megatron.train.objective import RegressionObjective, TokenObjective
from tests.helpers.dist import run_ranks
from tests.helpers.engines import MODEL, VOCAB, Case, make

LLAMA_13B = ModelConfig(num_layers=40, hidden_size=5120, num_heads=40, ffn_hidden_size=13824)
RECIPES = (("llama2_7b", 8), ("llama2_13b", 16), ("llama2_13b", 128), ("gpt_43b", 128), ("llama2_13b_zero3", 16))
GIB = 2**30


def config(model: ModelConfig = LLAMA_13B, command: str = "train_sft", **parallel: Any) -> Config:
    made = Config(command=command, model=replace(model), parallel=ParallelConfig(**parallel))
    made.engine = EngineConfig(precision="bf16")
    return made


# ---- bytes


EXACT = {
    "tensor 2, sequence": (2, Case("sft", ParallelConfig(tensor=2, sequence=True), precision="bf16")),
    "data 2": (2, Case("sft", ParallelConfig(), precision="bf16")),
    "pipeline 2, head": (2, Case("ap", ParallelConfig(pipeline=2))),
}


def really_held() -> list[Held]:
    """This rank's bytes of the engines in EXACT, one after the other. Collective over the world."""
    from steerlm_megatron.plan.trace import held_by

    return [held_by(make(case)) for _, case in EXACT.values()]


def said_to_be_held() -> list[tuple[Held, Held]]:
    """The plan's for the first and the last rank. In a process without groups."""
    out = []
    for ranks, case in EXACT.values():
        made = config(case.model)
        made.parallel, made.engine = case.layout, case.engine
        head = 3 if case.objective == "ap" else None
        objective = RegressionObjective(("a", "b", "c")) if head else TokenObjective()
        first, last = (trace(made, objective, VOCAB, head, [], "cpu", rank, ranks) for rank in (0, ranks - 1))
        out.append((first, last))
    return out


def test_weights_gradients_and_optimizer_are_exact_to_the_byte() -> None:
    real = run_ranks(2, really_held)
    (said,) = run_ranks(1, said_to_be_held)
    for number, name in enumerate(EXACT):
        for rank in (0, 1):
            assert said[number][rank] == real[rank][number], (name, rank)
            assert real[rank][number].weights and real[rank][number].gradients and real[rank][number].optimizer


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_attention_takes_the_memory_of_a_flash_kernel(again: bool) -> None:
    """All scores would be 4·512² numbers, and q, k, v, the output and their gradients are some 4·512·8 each."""
    q, k, v = (torch.empty(1, 4, 512, 8, device="meta", requires_grad=True) for _ in "qkv")

    def attend(*inputs: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*inputs, is_causal=True)

    with flash_on_meta(), Tracker([q, k, v]) as tracker:
        out = checkpoint(attend, q, k, v, use_reentrant=True) if again else attend(q, k, v)
        out.sum().backward()
    assert q.grad is not None and 0 < tracker.peak < 4 * 4 * 512 * 512 / 4
    real = torch.ones(1, 1, 2, 2)
    assert torch.equal(F.scaled_dot_product_attention(real, real, real), real), "torch's own is back"


TRACED = {
    "plain": ({}, {}),
    "wide vocabulary": ({}, {"vocab": 4000}),
    "tensor and sequence": ({"tensor": 2, "sequence": True}, {}),
    "pipeline": ({"pipeline": 2}, {"micro": 4}),
    "recompute": ({"tensor": 2}, {"recompute": "full"}),
    "selective": ({}, {"recompute": "selective"}),
}
WIDE = replace(MODEL, hidden_size=256, num_heads=8, num_query_groups=4, ffn_hidden_size=704, num_layers=6)


def traces() -> list[list[tuple[Held, Held]]]:
    """For every case, each stage traced whole, and traced shallow. In a process without groups."""
    out = []
    for parallel, more in TRACED.values():
        made = config(WIDE, **parallel)
        made.engine.recompute = more.get("recompute", "none")
        vocab, micro, ranks = more.get("vocab", 500), more.get("micro", 1), load.world_of(made)
        batch = batch_of((600, 424), 1, 1024, share=0.5)
        rest = TokenObjective(), vocab, None
        out.append(
            [
                (
                    trace(made, *rest, [batch] * micro, "cuda", rank, ranks),
                    trace_deep(made, *rest, batch, micro, "cuda", rank, ranks),
                )
                for rank in stages(made, ranks)
            ]
        )
    return out


def test_formulas_and_shallow_traces_agree_with_the_real_schedule() -> None:
    (found,) = run_ranks(1, traces)
    for (name, (parallel, more)), of_stages in zip(TRACED.items(), found, strict=True):
        made = config(WIDE, **parallel)
        made.engine.recompute = more.get("recompute", "none")
        vocab, micro = more.get("vocab", 500), more.get("micro", 1)
        rows = arithmetic.Rows(1024, 512)
        for stage, (whole, shallow) in enumerate(of_stages):
            parameters = arithmetic.stage_parameters(made.model, made.parallel, stage, vocab)
            assert (whole.parameters, whole.trainable) == (parameters, parameters), name
            state = arithmetic.state_bytes(made.engine, parameters, parameters, 1)
            assert whole.weights == pytest.approx(state.weights, abs=4096), name  # padding of the buffers
            assert whole.gradients == pytest.approx(state.gradients, abs=8192), name
            assert whole.optimizer == pytest.approx(state.optimizer, abs=8192), name
            assert (shallow.weights, shallow.gradients) == (whole.weights, whole.gradients), name
            assert shallow.activations == pytest.approx(whole.activations, rel=0.04), (name, stage)
            formula = arithmetic.peak_activations(made.model, made.parallel, made.engine, rows, stage, micro, vocab)
            assert formula == pytest.approx(whole.activations, rel=0.15), (name, stage)
    moved = found[list(TRACED).index("tensor and sequence")][0][0].moved
    assert {operation for operation, ranks in moved if ranks == (0, 1)} >= {"allgather_base", "reduce_scatter_base"}


def test_state_bytes_of_zero_and_offloading_by_hand() -> None:
    def state(**engine: Any) -> arithmetic.State:
        return arithmetic.state_bytes(EngineConfig(precision="bf16", **engine), 1000, 1000, 4)

    assert state() == arithmetic.State(2000, 4000, 3000)
    assert state(name="deepspeed", zero_stage=1) == arithmetic.State(2000, 2000, 3000)
    assert state(name="deepspeed", zero_stage=2) == arithmetic.State(2000, 1000, 3000)
    assert state(name="deepspeed", zero_stage=3) == arithmetic.State(500, 1000, 3000)
    assert state(name="deepspeed", zero_stage=2, offload="optimizer") == arithmetic.State(2000, 0, 0, 4000)
    assert state(name="deepspeed", zero_stage=3, offload="all") == arithmetic.State(0, 0, 0, 4000, 500)


def test_counts_of_published_models() -> None:
    """13,015,864,320 parameters is what the model card's weights sum to."""
    assert arithmetic.model_parameters(LLAMA_13B, 32000) == 13_015_864_320
    layout = ParallelConfig(tensor=2, pipeline=4)
    assert arithmetic.kv_cache_bytes(LLAMA_13B, layout, 10, "bf16") == 2 * 10 * 20 * 128 * 10 * 2
    assert arithmetic.checkpoint_bytes(LLAMA_13B, 32000, "bf16") == 14 * 13_015_864_320
    assert [arithmetic.in_flight(4, 1, stage, 9) for stage in range(4)] == [4, 3, 2, 1]
    assert arithmetic.in_flight(4, 5, 0, 8) == 2 * 3 + 4 * 4 + 1 and arithmetic.in_flight(1, 1, 0, 9) == 1
    assert arithmetic.bubble(4, 2, 6) == 3 / 12 and arithmetic.squares([3, 4]) == 25
    assert arithmetic.adam_bytes("bf16", 4) == 3 and arithmetic.adam_bytes("fp32", 1) == 8


# ---- hardware and time


def test_every_figure_of_hardware_has_a_source(tmp_path: Path) -> None:
    for name in compose.options("hardware"):
        found = hardware(name)
        content = yaml.safe_load((compose.conf_dir() / "hardware" / f"{name}.yaml").read_text("utf-8"))
        assert all(len(figure["source"]) > 20 for figure in content.values())
        assert found.peak("bf16") == peak_flops(f"NVIDIA {name.upper()}", "bf16"), "training's MFU has the same peak"
    assert hardware("h100").product_rate("fp8") == pytest.approx(1979e12 * 0.5)
    with pytest.raises(UserError, match=r"plan.hardware=h10: no such hardware; legal: a100 b200 h100 h200"):
        hardware("h10")
    with pytest.raises(UserError, match="a100 has no fp8"):
        hardware("a100").peak("fp8")
    own = tmp_path / "own.yaml"
    own.write_text("memory_gb: {value: 24}\nspeed: {value: 1, source: x}\n")
    with pytest.raises(UserError) as error:
        hardware(str(own))
    assert "speed: no such figure" in str(error.value) and "memory_gb has no source" in str(error.value)
    assert "bf16_tflops must be {value: a positive number" in str(error.value)


def seconds(made: Config, ranks: int = 16, gpu: Hardware | None = None, **more: Any) -> float:
    work = stated(made)
    rows = work.rows_per_step(made.train.global_batch_samples)
    gpu = gpu or hardware("h100")
    return step_time(made.model, made.parallel, made.engine, work, gpu, ranks, 32000, rows, **more).seconds


def test_time_grows_with_what_costs_time() -> None:
    plain = config(tensor=2, sequence=True)
    base = seconds(plain)
    again = replace(plain, engine=replace(plain.engine, recompute="full"))
    assert base < seconds(again) < 1.45 * base
    assert seconds(plain, ranks=32) < 0.6 * base
    assert seconds(config(tensor=4, sequence=True)) > base and seconds(plain, gpu=hardware("a100")) > 2 * base
    few = config(pipeline=8)
    few.train.global_batch_samples = 16
    work, gpu = stated(few), hardware("h100")
    time = step_time(few.model, few.parallel, few.engine, work, gpu, 16, 32000, 16)
    assert time.micro_batches == 8
    busy = time.products + time.attention + time.memory + time.communication
    assert time.idle == pytest.approx(7 / 8 * busy)
    assert {name: link.over for name, link in time.links.items()} == {"pipeline": "NVLink", "data": "NVLink"}
    wide = step_time(few.model, few.parallel, few.engine, work, gpu, 128, 32000, 16)
    assert {name: link.over for name, link in wide.links.items()} == {"pipeline": "network", "data": "network"}
    zero = replace(plain, engine=EngineConfig(name="deepspeed", zero_stage=3, precision="bf16"))
    offloaded = replace(zero, engine=replace(zero.engine, offload="optimizer"))
    assert seconds(plain) < seconds(zero) < seconds(offloaded)


def test_a_workload_is_packed_as_training_packs() -> None:
    made = config()
    made.plan.lengths, made.plan.samples, made.plan.loss_share = [1024, 2048], 1000, 0.25
    work = stated(made)
    assert work.fill == pytest.approx(1.0) and sum(work.lengths) == 4096
    assert work.samples == pytest.approx(8 / 3, rel=0.01) and work.rows == pytest.approx(375, abs=1)
    assert work.targets == pytest.approx(1024) and work.squares == pytest.approx(4096 * 5 / 3 * 1024, rel=0.01)
    assert work.rows_per_step(128) == 48 and work.rows_per_step(10**6) == work.rows
    made.plan.lengths = []
    assert stated(made).lengths == (4096,) and stated(made).squares == 4096**2
    import numpy as np

    assert packed(np.array([9000 % 4096, 4096]), 4096, 1.0, None, "x").rows is None


# ---- what fits


def test_what_cannot_fit_is_refused_with_a_layout_that_does() -> None:
    made = config()
    run = memory.layout_of(made, 16, 32000)
    with pytest.raises(UserError) as error:
        memory.refuse_what_cannot_fit(made, run, 80 * 10**9, "NVIDIA H100")
    said = str(error.value)
    assert "NVIDIA H100 has 74.5 GiB" in said and "weights 24.2, gradients 48.5, optimizer" in said
    remedy = said.split("this fits: ")[1].split(" (plan.check")[0]
    overrides = load.with_overrides(made, yaml.safe_load("{}"))
    for word in remedy.split():
        key, _, value = word.partition("=")
        section, name = key.split(".")
        setattr(getattr(overrides, section), name, yaml.safe_load(value))
    memory.refuse_what_cannot_fit(overrides, memory.layout_of(overrides, 16, 32000), 80 * 10**9, "NVIDIA H100")
    with pytest.raises(UserError, match="no layout of 1 rank fits"):
        memory.refuse_what_cannot_fit(made, memory.layout_of(made, 1, 32000), 80 * 10**9, "NVIDIA H100")
    with pytest.raises(UserError, match="plan.hardware=h100 has 74.5 GiB"):
        memory.check_before_launch(made, 16)
    memory.check_before_launch(replace(made, command="annotate"), 16)
    memory.check_before_launch(replace(made, plan=replace(made.plan, check=False)), 16)
    offloaded = replace(made, engine=EngineConfig(name="deepspeed", zero_stage=2, offload="optimizer"))
    offloaded.engine.precision, offloaded.engine.recompute = "bf16", "full"
    with pytest.raises(UserError, match="engine.offload=optimizer puts .* GiB a rank into a host's memory"):
        memory.refuse_what_cannot_fit(
            offloaded, memory.layout_of(offloaded, 8, 32000), 200 * 10**9, "a GPU", host_memory=10**10
        )


def test_the_check_counts_of_zero_what_is_certain() -> None:
    """By hand: 13e9 parameters are more than the bucket of 5e8, and than the 1e9 of which DeepSpeed keeps gathered."""
    bucket = 500_000_000
    for stage, planned, certain in ((2, 2 * 2 * bucket, 2 * bucket), (3, 4 * bucket + 2 * 1_050_000_000, 4 * bucket)):
        made = config(data=16)
        made.engine = EngineConfig(name="deepspeed", zero_stage=stage, precision="bf16")
        for least, expected in ((False, planned), (True, certain)):
            assert memory.largest(made, memory.layout_of(made, 16, 32000, least=least)).buffers == expected
    made.model = replace(MODEL)
    small = memory.largest(made, memory.layout_of(made, 16, 500, least=True))
    assert small.buffers == 4 * small.trainable, "no bucket is larger than what is trained"


def test_search_says_what_is_fast_and_why_others_fall() -> None:
    made = config()
    made.train.global_batch_samples = 8
    gpu = hardware("h100")
    found = search(made, gpu, stated(made), 16, 32000, None)
    times = [one.time.seconds for one in found.proposals]
    assert times == sorted(times) and len(times) == made.plan.top
    for one in found.proposals:
        assert one.memory.total + memory.RESERVED <= gpu.memory and not memory.why_illegal(one.config, 16)
    reasons = " ".join(found.fallen)
    assert "more replicas than the 8 rows of a step" in reasons and "take more than" in reasons
    assert sum(found.fallen.values()) + len(times) == found.tried
    assert memory.differences(made, config(tensor=2, sequence=True)) == [
        "parallel.tensor=2", "parallel.sequence=true",
    ]  # fmt: skip


# ---- the command


def recipe_plans() -> list[tuple[bool, int, str]]:
    from steerlm_megatron.plan.report import text

    out = []
    for name, gpus in RECIPES:
        made = plan_of(["train_sft", f"experiment={name}", f"plan.gpus={gpus}"])
        out.append((made.fits, made.ranks, text(made)))
        assert made.to_dict()["fits"] == made.fits
    return out


@pytest.fixture(scope="module")
def plans() -> list[tuple[bool, int, str]]:
    (found,) = run_ranks(1, recipe_plans)
    return found


@pytest.mark.parametrize("number", range(len(RECIPES)), ids=[f"{name}-{gpus}" for name, gpus in RECIPES])
def test_recipes_fit(number: int, plans: list[tuple[bool, int, str]]) -> None:
    (name, gpus), (fits, ranks, said) = RECIPES[number], plans[number]
    assert fits and ranks == gpus, said
    for words in ("memory of a rank", "checkpoint:", "tokens/s", "MFU", "GPU-hours"):
        assert words in said
    lines = (compose.conf_dir() / "experiment" / f"{name}.yaml").read_text("utf-8").splitlines()
    assert len(lines) <= 40
    made = load.from_container(compose.composed("run", [f"experiment={name}", "data.input=x", "tokenizer.path=x"]))
    load.finalize(made, gpus)


def test_what_cannot_be_planned_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="name the command first; legal: train_ap train_sft run"):
        plan_of([])
    with pytest.raises(UserError, match=r"plan.gpu: no such key; did you mean plan.gpus\?"):
        plan_of(["train_sft", "plan.gpu=3"])
    with pytest.raises(UserError, match="plan.vocab_size is not set"):
        plan_of(["train_sft", "model=llama2_7b"])


def test_the_check_needs_no_torch() -> None:
    import subprocess

    code = "import sys, steerlm_megatron.plan.memory, steerlm_megatron.plan.search; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
