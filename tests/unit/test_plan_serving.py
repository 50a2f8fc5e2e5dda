"""The plan of commands that draw or score: memory against the engine's, layouts that fit, the command."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steerlm_megatron.config.inference import GenerationConfig
from steerlm_megatron.config.schema import EngineConfig, ModelConfig, ParallelConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.generate import cache_size
from steerlm_megatron.generate.group import LocalGroup
from steerlm_megatron.model.arithmetic import stage_parameters
from steerlm_megatron.model.gpt import build_model
from steerlm_megatron.model.packed_tokens import CacheShape
from steerlm_megatron.model.predict import predict_values, sum_log_probabilities
from steerlm_megatron.plan.hardware import Hardware, hardware
from steerlm_megatron.plan.memory import RESERVED
from steerlm_megatron.plan.serving import Net, ServingPlan, Task, layouts, propose, serving_plan
from steerlm_megatron.plan.trace import batch_of, forward_peak
from steerlm_megatron.plan.tracker import Tracker
from steerlm_megatron.runtime import parallel
from steerlm_megatron.stages.plan import plan_of
from tests.helpers.dist import run_ranks

LLAMA_13B = ModelConfig(num_layers=40, hidden_size=5120, num_heads=40, ffn_hidden_size=13824, max_position=4096)
SMALL = ModelConfig(num_layers=4, hidden_size=256, num_heads=8, ffn_hidden_size=704, num_query_groups=4)
BF16 = EngineConfig(precision="bf16")
LENGTHS = (600, 400)
PASSES: tuple[tuple[int | None, int], ...] = ((None, 500), (None, 16000), (3, 500))  # values of the head, vocabulary
RECIPE = ("experiment=llama2_13b", "parallel.virtual_pipeline=null", "parallel.context=1")


def drawing(**keys: Any) -> Task:
    limits = GenerationConfig(**keys)
    return Task("generate", True, 1000, 500.0, 500.0, 2048 + limits.max_batch, limits.max_batch, limits)


def planned(task: Task, gpus: int = 1, gpu: Hardware | None = None, **layout: int) -> ServingPlan:
    net = Net(LLAMA_13B, 32000)
    return serving_plan(net, task, ParallelConfig(**layout), BF16, gpu or hardware("h100"), gpus, lambda t, last: 10**8)


# ---- memory


def really_taken() -> list[int]:
    """The peaks of real forward passes. In a process with groups."""
    parallel.initialize(ParallelConfig(), seed=0)
    out = []
    for head, vocab in PASSES:
        shape = replace(SMALL, max_position=1024)
        model = build_model(shape, ParallelConfig(), EngineConfig(), vocab, head).eval()
        batch = batch_of(LENGTHS, 1, 1000, head or 0, 0.5)
        with Tracker(model.parameters()) as tracker:
            (sum_log_probabilities if head is None else predict_values)(model, batch)
        out.append(tracker.peak)
    return out


def said_to_be_taken() -> list[int]:
    return [
        forward_peak(
            SMALL, 1, EngineConfig(), vocab, head, batch_of(LENGTHS, 1, 1000, head or 0, 0.5), "cpu", labels=True
        )
        for head, vocab in PASSES
    ]


def test_a_pass_takes_what_the_model_takes() -> None:
    (real,), (said,) = run_ranks(1, really_taken), run_ranks(1, said_to_be_taken)
    assert said == pytest.approx(real, rel=0.05)
    assert real[1] > 1.3 * real[0], "a wide vocabulary is what takes most"


def test_the_cache_is_as_large_as_the_engine_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU that has the weights and what a process takes beside tensors."""
    gpu = hardware("h100")
    for tensor, keys in ((1, {}), (2, {"max_batch": 8}), (4, {"block_tokens": 64}), (2, {"max_cache_tokens": 10_000})):
        made = planned(drawing(**keys), tensor, tensor=tensor)
        weights = 2 * stage_parameters(LLAMA_13B, ParallelConfig(tensor=tensor), 0, 32000)
        free = gpu.memory - RESERVED - weights
        monkeypatch.setattr(cache_size, "free_memory", lambda device, free=free: free)
        shape = CacheShape(tuple(range(1, 41)), 40 // tensor, 128, torch.bfloat16)
        limits = cache_size.limits_for(
            GenerationConfig(**keys), LLAMA_13B.max_position, shape, torch.device("cuda"), LocalGroup()
        )
        assert made.blocks == limits.blocks and made.sequence == limits.max_sequence_tokens
        assert made.stages[0].cache == limits.max_cache_tokens * shape.token_bytes
        assert made.stages[0].weights == weights and made.fits


def test_less_memory_holds_fewer_sequences_and_none_does_not_fit() -> None:
    gpu = hardware("h100")
    room = [planned(drawing(), gpu=replace(gpu, memory_gb=size)) for size in (140, 80, 40, 28, 24)]
    assert [one.holds for one in room] == sorted((one.holds for one in room), reverse=True)
    assert [one.fits for one in room] == [True, True, True, False, False]
    assert room[-1].seconds is None and "DOES NOT FIT" in room[-1].text() and room[-1].lacking == "26.2 GiB of 22.4"
    nothing = planned(drawing(memory_fraction=0.0))
    assert not nothing.fits and "memory_fraction=0 of what is left beside the model holds no seq" in str(
        nothing.lacking
    )
    whole = planned(drawing(memory_fraction=1.0))
    assert whole.holds and not whole.fits, "the cache leaves a pass no room, which the engine finds out later"
    split = planned(drawing(), 2, replace(gpu, memory_gb=28), tensor=2)
    assert split.fits and split.replicas == 1 and split.stages[0].weights < 0.51 * room[0].stages[0].weights
    staged = planned(drawing(), 2, gpu, pipeline=2)
    assert len(staged.stages) == 2 and sum(s.parameters for s in staged.stages) == room[0].stages[0].parameters


# ---- time and layouts


def test_more_gpus_draw_more_and_the_work_takes_as_much_less() -> None:
    one, eight = planned(drawing()), planned(drawing(), 8)
    assert eight.replicas == 8 and eight.tokens_per_sec > 5 * one.tokens_per_sec
    assert one.seconds is not None and one.seconds == pytest.approx(1000 * 500 / one.tokens_per_sec)
    assert planned(replace(drawing(), sequences=None)).seconds is None
    assert planned(drawing(max_batch=1)).tokens_per_sec < one.tokens_per_sec / 5, "a batch reads the weights once"


def test_a_search_names_what_fits_fewest_messages_first_among_equals() -> None:
    net, gpu, task = Net(LLAMA_13B, 32000), hardware("h100"), drawing()
    made = planned(task, 8, tensor=8)
    found = list(layouts(net, task, ParallelConfig(), BF16, gpu, 8, lambda t, last: 10**8))
    pairs = [(p.tensor, p.pipeline) for p, _ in found]
    assert (8, 1) in pairs and (1, 8) in pairs and len(set(pairs)) == len(pairs)
    assert all(40 % t == 0 and 8 % (t * p) == 0 and 40 % p == 0 for t, p in pairs)
    propose(made, found, 3, asked=True)
    rates = [one["tokens_per_sec"] for one in made.proposals]
    assert len(rates) == 3 and all(rate > 0.97 * later for rate, later in itertools.pairwise(rates)), "fastest first"
    assert not made.notes, "a plan that fits needs no other layout"
    small = replace(gpu, memory_gb=20)
    wrong = planned(task, 8, small)
    propose(wrong, layouts(net, task, ParallelConfig(), BF16, small, 8, lambda t, last: 10**8), 3, asked=False)
    assert not wrong.fits and wrong.notes[0].startswith("this fits: parallel.tensor=") and not wrong.proposals
    tiny = planned(task, 1, small)
    propose(tiny, layouts(net, task, ParallelConfig(), BF16, small, 1, lambda t, last: 10**8), 3, asked=False)
    assert tiny.notes == ["no layout of 1 GPUs fits"]


# ---- the command


def plans_of_commands() -> list[tuple[str, dict[str, Any]]]:
    """What ``steerlm plan`` says. In a process without groups."""
    out = []
    for arguments in (
        ("serve", *RECIPE, "plan.vocab_size=32000", "parallel.pipeline=1", "plan.gpus=2"),
        ("bootstrap", *RECIPE, "plan.vocab_size=32000", "parallel.pipeline=1", "plan.gpus=2", "plan.samples=100",
         "plan.lengths=[800]", "plan.loss_share=0.5", "bootstrap.responses_per_prompt=3"),
        ("annotate", *RECIPE, "plan.vocab_size=32000", "plan.gpus=8", "plan.samples=100"),
        ("weigh", *RECIPE, "plan.vocab_size=32000", "plan.gpus=8", "plan.samples=100", "plan.lengths=[800]"),
        ("generate", *RECIPE, "plan.vocab_size=32000", "plan.gpus=8", "plan.search=true", "parallel.pipeline=5"),
    ):  # fmt: skip
        made = plan_of([*arguments, "plan.output=plan.json"])
        assert isinstance(made, ServingPlan)
        out.append((made.text(), json.loads(Path("plan.json").read_text())))
    with pytest.raises(UserError, match="plan.output=plan.json/x cannot be written"):  # a file is no folder
        plan_of(["serve", *RECIPE, "plan.vocab_size=32000", "plan.output=plan.json/x"])
    return out


def test_commands_that_draw_or_score_have_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the process that plans starts in this folder
    (found,) = run_ranks(1, plans_of_commands)
    serve, bootstrap, annotate, weigh, generate = found
    for words in ("serve on 2 x h100", "tensor 2, pipeline 1, 1 replica", "key/value cache", "lower bounds", "fits: "):
        assert words in serve[0]
    assert "responses of" not in serve[0], "a server has no end"
    assert "300 responses of 400 tokens to prompts of 400: " in bootstrap[0]
    assert "steerlm plan annotate" in bootstrap[0]
    assert annotate[1]["replicas"] == 1 and len(annotate[1]["stages"]) == 4 and "a pass: " in annotate[0]
    assert annotate[1]["stages"][3]["parameters"] < weigh[1]["stages"][3]["parameters"], "a head of a few values"
    assert weigh[1]["seconds"] > 0 and "100 conversations of 800 tokens" in weigh[0]
    assert generate[1]["command"] == "generate" and len(generate[1]["proposals"]) == 5
    assert generate[1]["fits"] and "fastest layouts that fit" in generate[0]


def test_what_cannot_be_planned_is_told() -> None:
    with pytest.raises(UserError, match="set checkpoint, or an experiment"):
        plan_of(["generate"])
    with pytest.raises(UserError, match=r"optim.lr: serve does not read it"):
        plan_of(["serve", *RECIPE, "optim.lr=1"])
    with pytest.raises(UserError, match=r"parallel.tensor=3 must divide .*=40 of the model in the configuration"):
        plan_of(
            [
                "serve",
                *RECIPE,
                "plan.vocab_size=32000",
                "parallel.tensor=3",
                "parallel.sequence=false",
                "parallel.pipeline=1",
                "plan.gpus=3",
            ]
        )
    with pytest.raises(UserError, match=r"plan.lengths=\[800, 0\] has 0, which must be at least 1"):
        plan_of(["annotate", *RECIPE, "plan.vocab_size=32000", "plan.lengths=[800,0]"])
    with pytest.raises(UserError, match="nowhere"):
        plan_of(["serve", "checkpoint=nowhere/at/all"])
