"""A real published model in and out: SmolLM2-135M-Instruct.

The model is not in the repository. ``python scripts/fetch_smollm2.py runs/SmolLM2-135M-Instruct`` makes it in a minute,
and ``STEERLM_SMOLLM2`` names another place; without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from steerlm_megatron.config.schema import EngineConfig, ParallelConfig
from steerlm_megatron.model.gpt import build_model
from steerlm_megatron.model.hf import HFFolder
from steerlm_megatron.model.predict import predict_values
from steerlm_megatron.model.weights import fill
from steerlm_megatron.plan.trace import batch_of
from steerlm_megatron.runtime import parallel
from steerlm_megatron.steer.records import read_records
from tests.helpers.cli import run_here

SMOLLM2 = Path(os.environ.get("STEERLM_SMOLLM2", Path(__file__).parents[2] / "runs" / "SmolLM2-135M-Instruct"))
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        not (SMOLLM2 / "config.json").exists(),
        reason=f"no {SMOLLM2}: python scripts/fetch_smollm2.py makes it, STEERLM_SMOLLM2 names another place",
    ),
]
QUESTIONS = ("What is the capital of France?", "Why is the sky blue? Answer in one sentence.", "Name three fruits.")


def test_logits_are_those_of_transformers() -> None:
    """Of texts that are packed into one row, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    texts = [" ".join(QUESTIONS[: number + 1]) + " The sky is blue." * (20 * number + 1) for number in range(3)]
    ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    parallel.initialize(ParallelConfig(), 1)
    folder = HFFolder.open(SMOLLM2, "init_from")
    model = build_model(folder.model, ParallelConfig(), EngineConfig(), folder.vocab_size)
    fill(folder.weights(model, folder.vocab_size))
    lengths = [len(one) for one in ids]
    batch = batch_of(lengths, 1, sum(lengths), attributes=1)
    batch.tokens_T = torch.cat(ids)
    batch.pool_P = torch.arange(sum(lengths))
    ours = predict_values(model.eval(), batch)
    assert ours is not None
    theirs = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.cat([theirs(one[None]).logits[0] for one in ids])
    assert expected.std() > 1
    torch.testing.assert_close(ours[:, : expected.shape[1]], expected, rtol=0, atol=1e-3)


def test_it_leaves_as_it_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_here("export", f"checkpoint={SMOLLM2}", "output=out", "export.format=hf", "run_dir=exported") == 0
    came, left = (
        {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
        for folder in (SMOLLM2, tmp_path / "out")
    )
    assert came.keys() == left.keys()
    for name, value in came.items():
        assert value.dtype == left[name].dtype and torch.equal(value.view(torch.uint8), left[name].view(torch.uint8))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (SMOLLM2, tmp_path / "out")]
    assert {k: v for k, v in configs[1].items() if k != "steerlm"} == configs[0]
    said = [AutoTokenizer.from_pretrained(folder) for folder in (SMOLLM2, tmp_path / "out")]
    for question in QUESTIONS:
        one, two = (
            tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
            for tokenizer in said
        )
        assert one == two


def test_greedy_responses_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open("prompts.jsonl", "w") as file:
        for number, question in enumerate(QUESTIONS):
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": ""}]
            print(json.dumps({"id": str(number), "messages": messages}), file=file)
    assert (
        run_here(
            "generate", f"checkpoint={SMOLLM2}", "input=prompts.jsonl", "output=out.jsonl", "run_dir=drawn",
            "sampling.temperature=0", "sampling.max_tokens=24", "engine.precision=fp32",
            "generation.max_sequence_tokens=256",
        ) == 0
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    for record, question in zip(read_records("out.jsonl"), QUESTIONS, strict=True):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            whole = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
        expected = tokenizer.decode(whole[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert record.messages[-1].content == expected and len(expected) > 5
