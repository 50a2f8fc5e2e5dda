"""Commands train adapters, go on with them, and make of them what each needs: merged models, or an adapter alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from steerlm_megatron.steer.records import read_records
from steerlm_megatron.train.meta import read_meta
from tests.helpers.cli import run_here as run
from tests.integration.test_hf_base import folder as folder
from tests.integration.test_hf_base import in_folder as in_folder

pytestmark = pytest.mark.integration
DATA = ("data.source=messages", "data.valid_fraction=0", "template=steerlm", "attributes=demo")
LORA = ("train.trainable=lora", "lora.rank=4", "lora.alpha=8")
RATES = ("optim.lr=3e-2", "optim.min_lr=3e-2", "train.row_tokens=256", "train.global_batch_samples=8")
GREEDY = ("sampling=greedy", "sampling.max_tokens=10", "attributes.best.helpfulness=3")


def answers(checkpoint: str, name: str) -> list[str]:
    asked = ("input=prompts.jsonl", f"output={name}.jsonl", *GREEDY, f"run_dir={name}")
    assert run("generate", f"checkpoint={checkpoint}", *asked) == 0
    return [record.messages[-1].content for record in read_records(f"{name}.jsonl")]


def test_adapters_from_a_folder_to_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained in two halves, asked, exported merged and alone, loaded by ``peft``, and trained on from there."""
    import transformers

    shards = ("data.input=records.jsonl", "data.output_dir=shards", f"tokenizer.path={folder}")
    assert run("preprocess", *DATA, *shards) == 0
    train = (*DATA[2:], "data.train=shards/train", *RATES, "engine.precision=fp32")
    sft = ("train_sft", *train, f"init_from={folder}", "run_dir=out")
    assert run(*sft, *LORA, "train.steps=3") == 0
    summary = Path("out/summary.json")
    stopped = json.dumps({**json.loads(summary.read_text()), "status": "running"})
    summary.write_text(stopped)
    other = ("lora.rank=8", "lora.alpha=4", "lora.targets=[linear_qkv]", "lora.train_rows=none")
    assert run(*sft, *LORA[:1], *other, "train.steps=5") == 2
    said = capsys.readouterr().err
    assert all(words in said for words in ("lora.rank=8 (checkpoint: 4)", "lora.alpha=4", "lora.targets=", "rows"))
    summary.write_text(stopped)
    assert run(*sft, *LORA, "train.steps=6") == 0
    meta = read_meta(Path("out/checkpoints/step_00000006"))
    first, last = meta.lora["rows"]
    assert (meta.lora["rank"], meta.lora["base"], last) == (4, str(folder), meta.vocab_size) and first < last
    expected = answers("out", "asked")
    assert len(expected) == 4
    assert run("export", "checkpoint=out", "output=plain", "run_dir=export1") == 0
    assert read_meta(Path("plain")).lora is None and answers("plain", "asked_plain") == expected
    assert run("export", "checkpoint=out", "output=merged", "export.format=hf", "run_dir=export2") == 0
    alone = ("output=adapter", "export.format=hf", "export.adapter=true", "run_dir=export3")
    assert run("export", "checkpoint=out", *alone) == 0
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    assert config["trainable_token_indices"] == {"embed_tokens": list(range(first, last))}
    assert run("export", f"checkpoint={folder}", "output=no", *alone[1:3], "run_dir=export4") == 2
    assert "has no adapter" in capsys.readouterr().err

    # Both folders take attributes as the checkpoint does.
    assert answers("merged", "asked_merged") == answers("adapter", "asked_adapter") == expected
    ids, logits = _what_peft_loads_is_the_merged_model(first)

    # The adapter comes in again: as a model, merged; to be trained on, whose shape nobody repeats.
    assert run("export", "checkpoint=adapter", "output=again", "export.format=hf", "run_dir=export5") == 0
    again = transformers.AutoModelForCausalLM.from_pretrained("again", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(**ids).logits, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
    assert run("preprocess", *DATA, *shards[:1], "data.output_dir=shards2", "tokenizer.path=adapter") == 0
    more = ("train_sft", *train, "data.train=shards2/train", "init_from=adapter", "train.steps=1")
    assert run(*more, "train.trainable=lora", "run_dir=more") == 0
    on = read_meta(Path("more/checkpoints/step_00000001")).lora
    assert (on["rank"], on["alpha"], on["rows"], on["base"]) == (4, 8, [first, last], str(folder))
    assert run(*more, "train.trainable=lora", "lora.rank=8", "run_dir=more2") == 2
    assert "lora.rank=8 (there: 4)" in capsys.readouterr().err

    # And so does a checkpoint with adapters.
    sft = ("train_sft", *train, "init_from=out", "train.steps=1")
    assert run(*sft, "train.trainable=lora", "run_dir=on") == 0
    assert read_meta(Path("on/checkpoints/step_00000001")).lora["base"] == str(folder)
    assert run(*sft, "train.trainable=lora", "lora.merge=true", "lora.rank=2", "run_dir=fresh") == 0
    fresh = read_meta(Path("fresh/checkpoints/step_00000001")).lora
    assert (fresh["rank"], fresh["base"]) == (2, None)
    assert run("export", "checkpoint=fresh", "output=adapter2", *alone[1:3], "run_dir=export6") == 2
    assert "export.base" in capsys.readouterr().err


def _what_peft_loads_is_the_merged_model(first: int) -> tuple[Any, torch.Tensor]:
    """Compare the folders ``merged`` and ``adapter``; return a prompt's inputs, and its logits."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained("adapter")
    asked = [{"role": "user", "content": "Tell me about the red fox."}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert int(ids["input_ids"].max()) >= first, "the prompt has control tokens whose rows were trained"
    merged = transformers.AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    with torch.no_grad():
        logits = merged(**ids).logits

    # What peft loads is the same model: the tokenizer beside the adapter tells it how many rows there are.
    peft = pytest.importorskip("peft", reason="peft is not installed (setup.py[dev])")
    model = peft.AutoPeftModelForCausalLM.from_pretrained("adapter", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**ids).logits, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
    return ids, logits


def test_an_attribute_prediction_model_is_adapted(folder: Path) -> None:
    shards = ("data.input=records.jsonl", "data.output_dir=shards", f"tokenizer.path={folder}")
    assert run("preprocess", *DATA, *shards) == 0
    train = (*DATA[2:], "data.train=shards/train", *RATES, "engine.precision=fp32", f"init_from={folder}")
    assert (
        run("train_ap", *train, *LORA, "optim.head_lr=5e-2", "train.steps=3", "train.log_every_steps=1", "run_dir=ap")
        == 0
    )
    first = json.loads(Path("ap/metrics.jsonl").read_text().splitlines()[0])
    assert first["head_lr"] == pytest.approx(first["lr"] * 5 / 3)
    assert run("annotate", "checkpoint=ap", "input=records.jsonl", "output=scored.jsonl", "run_dir=scored") == 0
    assert len(list(read_records("scored.jsonl"))) == 24
