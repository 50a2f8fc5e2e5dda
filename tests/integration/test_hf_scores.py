"""Attribute-prediction models leave as classifiers that anyone can load, and classifiers of others score records."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from steerlm_megatron.steer.records import read_records
from steerlm_megatron.train.meta import read_meta
from tests.helpers.cli import run_here as run

pytestmark = pytest.mark.integration
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = ["Tell me about the red fox.", "The fox is red.\n\n1. Yes.", "Hello, who are you?", "I am a model of language."]
TINY = ("engine.precision=fp32",)


def make_folder(path: Path, values: int = 0) -> Path:
    """A random model of ``transformers`` with a byte-level tokenizer and a chat template: a Llama, or a classifier."""
    import tokenizers
    import transformers

    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    raw.train_from_iterator(WORDS * 20, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<pad>",
        chat_template=CHATML, model_max_length=321,
    )  # fmt: skip
    tokenizer.save_pretrained(path)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
        intermediate_size=80, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=0, eos_token_id=2, pad_token_id=3, num_labels=values or 2,
    )  # fmt: skip
    kind = transformers.LlamaForSequenceClassification if values else transformers.LlamaForCausalLM
    model = kind(config)
    if values:  # above 0 for most texts
        asked = [{"role": "user", "content": WORDS[0]}, {"role": "assistant", "content": WORDS[1]}]
        inputs = tokenizer.apply_chat_template(asked, return_tensors="pt", return_dict=True)
        model.score.weight.data *= model.eval()(**inputs).logits.sign().T
    model.save_pretrained(path)
    change(path / "config.json", lambda c: {**c, "somebodys_key": {"a": [1]}})
    (path / "README.md").write_text("---\nlicense: other\nlicense_name: fox-1\n---\n# A base\n")
    return path


def change(path: Path, how: Any) -> None:
    path.write_text(json.dumps(how(json.loads(path.read_text()))))


def conversations() -> list[dict[str, Any]]:
    """Conversations of 1 to 7 responses, some with a system text, one ending with a question, one with odd texts."""
    out = []
    for turns in range(1, 8):
        messages = [{"role": "system", "content": "Be kind."}] if turns % 2 else []
        for turn in range(turns):
            messages.append({"role": "user", "content": f"{turns}: {WORDS[turn % 4]}"})
            reply = {"role": "assistant", "content": WORDS[(turn + 1) % 4]}
            messages.append({**reply, "attributes": {"helpfulness": float((turn + turns) % 5)}})
        out.append({"id": f"t{turns}", "messages": messages})
    out.append({"id": "open", "messages": [*out[2]["messages"], {"role": "user", "content": "And then?"}]})
    odd = {"role": "assistant", "content": "\n", "attributes": {"helpfulness": 1.0}}
    out.append({"id": "odd", "messages": [{"role": "user", "content": " \u00e9\u4f60 \n"}, odd, *out[1]["messages"]]})
    return out


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    Path("records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in conversations()))
    yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and attribute-prediction models that were trained from it: with each template, and without a bias."""
    root = tmp_path_factory.mktemp("ap")
    base = make_folder(root / "fox")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        Path("train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in conversations()))
        for name, more in (("chatml", ()), ("steerlm", ("model.head_bias=false",))):
            data = ("data.source=messages", "data.valid_fraction=0.3", f"template={name}", "attributes=demo")
            out = f"data.output_dir={name}"
            assert run("preprocess", *data, "data.input=train.jsonl", out, f"tokenizer.path={base}") == 0
            train = (*data[2:], f"data.train={name}", f"init_from={base}", "train.row_tokens=512", "train.steps=4",
                     "train.global_batch_samples=8", "optim.lr=1e-2", f"run_dir=run-{name}", *more)  # fmt: skip
            assert run("train_ap", *train, *TINY) == 0
            assert run("export", f"checkpoint=run-{name}", f"output=out-{name}", "export.format=hf") == 0
    return root


def annotated(checkpoint: Path | str, *more: str) -> list[dict[str, float]]:
    """What ``annotate`` says of every response with a text."""
    shutil.rmtree("scores", ignore_errors=True)
    given = ("input=records.jsonl", "output=scored.jsonl", "overwrite=true", "run_dir=scores")
    assert run("annotate", f"checkpoint={checkpoint}", *given, *TINY, *more) == 0
    messages = (message for record in read_records("scored.jsonl") for message in record.messages)
    return [dict(m.attributes or {}) for m in messages if m.role == "assistant" and m.content.strip()]


def theirs(folder: Path) -> list[dict[str, float]]:
    """What ``transformers`` alone says of every response, several conversations in a batch."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, told = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told.values())
    cut = []
    for record in conversations():
        for at, message in enumerate(record["messages"]):
            if message["role"] == "assistant" and message["content"].strip():
                cut.append([{"role": m["role"], "content": m["content"]} for m in record["messages"][: at + 1]])
    out: list[dict[str, float]] = []
    for start in range(0, len(cut), 8):
        inputs = tokenizer.apply_chat_template(
            cut[start : start + 8], return_tensors="pt", return_dict=True, padding=True
        )
        with torch.no_grad():
            values = model(**inputs).logits
        values = values + torch.tensor(getattr(model.config, "steerlm", {}).get("head_bias", 0.0))
        out += [{model.config.id2label[i]: v for i, v in enumerate(row)} for row in values.tolist()]
    return out


def same(ours: list[dict[str, float]], others: list[dict[str, float]], top: float = 4.0) -> None:
    """The values are equal to the four digits that ``annotate`` writes, on the schema's scale."""
    for a, b in zip(ours, others, strict=True):
        assert a
        for name, value in a.items():
            assert value == pytest.approx(min(max(b[name], 0.0), top), abs=1.01e-4)


@pytest.mark.parametrize("template", ["chatml", "steerlm"])
def test_values_in_transformers_are_those_of_annotate(trained: Path, template: str) -> None:
    folder = trained / f"out-{template}"
    ours = annotated(trained / f"run-{template}")
    seen = {round(values["helpfulness"], 3) for values in ours}
    assert len(seen) > 15, "values that could differ"
    found = theirs(folder)
    same(ours, found)
    config = json.loads((folder / "config.json").read_text())
    assert ("head_bias" in config["steerlm"]) == (template == "chatml")
    assert annotated(folder) == ours  # it comes back


def test_it_comes_back_and_leaves_again_bit_equal(trained: Path) -> None:
    folder = trained / "out-chatml"
    assert run("export", f"checkpoint={folder}", "output=again", "export.format=hf", "run_dir=again-run") == 0
    assert {path.name for path in Path("again").iterdir()} == {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        assert (Path("again") / path.name).read_bytes() == path.read_bytes() or path.name == "config.json", path.name
    old, new = (json.loads((path / "config.json").read_text()) for path in (folder, Path("again")))
    assert old == new
    # A run goes on from it, with the head that is there.
    data = ("template=chatml", "attributes=demo", "data.train=shards")
    train = (*data, f"init_from={folder}", "train.row_tokens=512", "train.steps=1", "optim.lr=1e-9", "optim.min_lr=0")
    shards = ("data.source=messages", "data.valid_fraction=0.3", *data[:2], f"data.input={trained}/train.jsonl")
    assert run("preprocess", *shards, "data.output_dir=shards", f"tokenizer.path={folder}") == 0
    assert run("train_ap", *train, "run_dir=more", *TINY) == 0
    meta = read_meta(next(Path("more/checkpoints").glob("step_*")))
    before = read_meta(next((trained / "run-chatml/checkpoints").glob("step_*")))
    assert meta.model["head_bias"] and meta.base["trained_from"] == "fox"
    assert meta.label_counts["helpfulness"] == 2 * before.label_counts["helpfulness"]
    same(annotated("more"), theirs(folder))


def test_what_the_base_said_is_kept(trained: Path) -> None:
    base, folder = trained / "fox", trained / "out-chatml"
    old, new = (json.loads((path / "config.json").read_text()) for path in (base, folder))
    gone = {key for key in old if key not in new}
    changed = {key for key in new if old.get(key) != new[key]}
    assert not gone and new["somebodys_key"] == {"a": [1]} and (new["bos_token_id"], new["pad_token_id"]) == (0, 3)
    assert changed == {"architectures", "problem_type", "id2label", "label2id", "steerlm", "vocab_size"}
    old, new = (json.loads((path / "tokenizer_config.json").read_text()) for path in (base, folder))
    assert (new["model_max_length"], new["pad_token"], new["bos_token"]) == (321, "<pad>", "<|endoftext|>")


def test_a_trained_language_model_keeps_it_too(trained: Path) -> None:
    from safetensors import safe_open

    base = shutil.copytree(trained / "fox", Path("base"))
    (base / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 7, "eos_token_id": 9}))
    data = ("template=chatml", "attributes=demo", "data.train=shards")
    shards = ("data.source=messages", "data.valid_fraction=0.3", *data[:2], f"data.input={trained}/train.jsonl")
    assert run("preprocess", *shards, "data.output_dir=shards", f"tokenizer.path={base}") == 0
    train = (*data, f"init_from={base}", "train.row_tokens=512", "train.steps=1", "run_dir=sft")
    assert run("train_sft", *train, *TINY) == 0
    assert run("export", "checkpoint=sft", "output=model", "export.format=hf", "run_dir=export") == 0
    generation = json.loads(Path("model/generation_config.json").read_text())
    assert generation == {"do_sample": True, "top_k": 7, "eos_token_id": 2}
    config = json.loads(Path("model/config.json").read_text())
    assert config["somebodys_key"] == {"a": [1]} and config["architectures"] == ["LlamaForCausalLM"]
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 2, 3)
    with safe_open("model/model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    card = Path("model/README.md").read_text()
    assert "| base | base (llama) |" in card and "license_name: fox-1" in card and "loss per token" in card
    assert "apply_chat_template(" in card and str(Path.cwd()) not in card


def test_the_model_card_says_what_is_known_and_its_code_runs(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for template in ("chatml", "steerlm"):
        card = (trained / f"out-{template}" / "README.md").read_text()
        assert card.startswith("---\nlicense: other\nlicense_name: fox-1\nlibrary_name: transformers\n")
        assert "pipeline_tag: text-classification" in card and "4 steps" in card and "fox (llama)" in card
        assert re.search(r"\| `helpfulness` \| 0–4 \| \d\.\d\d \| \d+ \| how helpful", card)
        assert "mean squared error" in card and str(trained) not in card
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        monkeypatch.chdir(trained)
        exec(code, {})
        assert "'helpfulness'" in capsys.readouterr().out
        assert ("head_bias" in code) == (template == "chatml")


def test_somebody_elses_classifier_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "reward", values=2)
    asked = ("annotate", f"checkpoint={folder}", "input=records.jsonl", "output=scored.jsonl", *TINY)
    assert run(*asked, "run_dir=a") == 2
    assert "is a classifier of 2 values (LABEL_0 LABEL_1), and says nothing of their scale" in capsys.readouterr().err
    assert run(*asked, "run_dir=b", "attributes=oasst") == 2
    assert "choose a schema with its names, in order" in capsys.readouterr().err
    schema = ("attributes.names=[helpfulness,humor]", "attributes.max_level=4", "attributes.quality=helpfulness")
    ours = annotated(folder, *schema)
    found = [dict(zip(("helpfulness", "humor"), row.values(), strict=True)) for row in theirs(folder)]
    same(ours, found)
    assert len({values["humor"] for values in ours}) > 10
    change(folder / "config.json", lambda c: {**c, "id2label": {"0": "humor", "1": "helpfulness"}})
    assert run(*asked, "run_dir=c", *schema) == 2
    assert "(humor helpfulness)" in capsys.readouterr().err
    # Named in its own config.json, it needs no attributes: and other commands take it.
    told = {"attributes": {"names": ["humor", "helpfulness"], "max_level": 4, "quality": "helpfulness"}}
    change(folder / "config.json", lambda c: {**c, "steerlm": told})
    again = annotated(folder)
    assert list(again[0]) == ["humor", "helpfulness"]
    same(again, [dict(zip(("humor", "helpfulness"), row.values(), strict=True)) for row in theirs(folder)])
    # Its own format need not be one of ours, and may write something after what closes a response.
    own = CHATML.replace("+ '\n' + m", "+ ': ' + m").replace("assistant\n", "assistant: ")
    (folder / "chat_template.jinja").write_text(own.replace("'\n' }}{% end", "' #\n' }}{% end"))
    other = annotated(folder)
    assert other != again
    same(other, [dict(zip(("humor", "helpfulness"), row.values(), strict=True)) for row in theirs(folder)])
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert run(*asked, "run_dir=d") == 2
    assert f"checkpoint={folder}: " in capsys.readouterr().err
    (folder / "chat_template.jinja").unlink()
    assert run(*asked, "run_dir=e") == 2
    assert "has no chat template: nothing says how a conversation is written for it" in capsys.readouterr().err
