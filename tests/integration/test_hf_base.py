"""Commands start from a Hugging Face folder: its shape, tokenizer and format come from it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from steerlm_megatron.errors import UserError
from steerlm_megatron.stages.base import chat_template_of
from steerlm_megatron.steer.records import read_records
from steerlm_megatron.train.meta import read_meta
from tests.helpers.cli import run_here as run
from tests.helpers.commands import ENVIRONMENT

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.integration
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A format that none of ours is like: it takes blanks away from texts, and has no system text.
OTHER = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<|endoftext|>' + m.role + ': ' + m.content | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|endoftext|>assistant: ' }}{% endif %}"
)
# A blank stands before a response, and not where one is asked for: the model begins with it.
BLANK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}"
    "{{ ' ' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)
WORDS = ["Tell me about the red fox.", "The fox is red.", "Hello, who are you?", "I am a model of language."]
SHARDS = ("data.input=records.jsonl", "data.output_dir=shards")
TINY = ("engine.precision=fp32", "run_dir=out")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of ``transformers`` with a byte-level tokenizer and a chat template."""
    import tokenizers
    import transformers

    path = tmp_path_factory.mktemp("llama")
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    raw.train_from_iterator(WORDS * 20, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=CHATML
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
        intermediate_size=80, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.2,
        eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    records = []
    for i in range(24):
        reply = {"role": "assistant", "content": WORDS[(i + 1) % 4], "attributes": {"helpfulness": i % 5}}
        records.append({"id": f"{i}", "messages": [{"role": "user", "content": WORDS[i % 4]}, reply]})
    Path("records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    Path("prompts.jsonl").write_text(
        "".join(json.dumps({**r, "messages": r["messages"][:1]}) + "\n" for r in records[:4])
    )
    yield


@pytest.mark.parametrize("source", [CHATML, OTHER, BLANK], ids=["chatml", "other", "blank"])
def test_greedy_responses_are_those_of_transformers(folder: Path, source: str) -> None:
    import transformers

    folder = folder if source == CHATML else with_format(folder, source)

    sampling = ("sampling=greedy", "sampling.max_tokens=12", "data.on_error=skip")
    assert run("generate", f"checkpoint={folder}", "input=prompts.jsonl", "output=answers.jsonl", *sampling, *TINY) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = list(read_records("answers.jsonl"))
    assert len(answers) == 4
    for answer in answers:
        asked = [{"role": "user", "content": answer.messages[0].content}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        drawn = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[
            0, ids["input_ids"].shape[1] :
        ]
        expected = tokenizer.decode(drawn, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert answer.messages[-1].content == (expected.removeprefix(" ") if source == BLANK else expected)


@pytest.mark.parametrize("command", ["train_ap", "train_sft"])
@pytest.mark.parametrize("template", ["chatml", "steerlm"])
def test_training_starts_from_the_folder(folder: Path, command: str, template: str) -> None:
    data = ("data.source=messages", "data.valid_fraction=0", f"template={template}", "attributes=demo")
    assert (
        run("preprocess", *data, "data.input=records.jsonl", "data.output_dir=shards", f"tokenizer.path={folder}") == 0
    )
    train = (*data[2:], "data.train=shards/train", f"init_from={folder}", "train.row_tokens=256", "train.steps=2",
             "train.global_batch_samples=8", "optim.lr=1e-4")  # fmt: skip
    assert run(command, *train, *TINY) == 0
    meta = read_meta(next(Path("out/checkpoints").glob("step_*")))
    assert (meta.model["num_layers"], meta.model["hidden_size"], meta.model["num_query_groups"]) == (3, 48, 3)
    assert meta.vocab_size > 300 - 1
    first = json.loads(Path("out/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] > 0
    # The run's checkpoint is a model like any other.
    more = ("train.steps=1", "run_dir=more", "init_from=out")
    assert run(command, *train, *TINY, *more) == 0


def test_out_again_it_is_bit_equal(folder: Path) -> None:
    from safetensors.torch import load_file

    assert run("export", f"checkpoint={folder}", "output=again", "export.format=hf", "run_dir=export") == 0
    before, after = (load_file(path / "model.safetensors") for path in (folder, Path("again")))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert {path.name for path in Path("again").iterdir()} == {path.name for path in folder.iterdir()}
    old, new = (json.loads((path / "config.json").read_text()) for path in (folder, Path("again")))
    assert old == new
    assert run("export", f"checkpoint={folder}", "output=again", "export.format=hf", "run_dir=second") == 2
    Path(".again.steerlm").mkdir()  # as a kill between the last two renames of an overwrite leaves it
    Path("again").rename(".again.steerlm/old")
    assert run("export", f"checkpoint={folder}", "output=again", "export.format=hf", "run_dir=second") == 2
    assert Path("again/config.json").is_file()
    more = ("export.format=hf", "run_dir=third", "overwrite=true")
    assert run("export", f"checkpoint={folder}", "output=again", *more) == 0 and not list(Path().glob(".again*"))


@pytest.mark.parametrize("template", ["chatml", "steerlm", "auto", "blank"])
def test_a_trained_model_leaves_with_its_chat_template(
    folder: Path, template: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without our code, ``transformers`` writes our prompts and draws our responses."""
    import transformers

    place: tuple[str, ...] = ()
    if template == "auto":
        folder, place = with_format(folder, OTHER), ("template.label_at=user",)
    prefix = " " if template == "blank" else ""  # of a response, and none of its text
    if prefix:
        folder, template = with_format(folder, BLANK), "auto"
    data = ("data.source=messages", "data.valid_fraction=0", f"template={template}", "attributes=demo")
    made = ("data.input=records.jsonl", "data.output_dir=shards", f"tokenizer.path={folder}", *place)
    assert run("preprocess", *data, *made) == 0
    train = (*data[2:], "data.train=shards/train", f"init_from={folder}", "train.row_tokens=256", "train.steps=3",
             "train.global_batch_samples=8", "optim.lr=1e-2")  # fmt: skip
    assert run("train_sft", *train, *TINY) == 0
    assert run("export", "checkpoint=out", "output=model", "export.format=hf", "run_dir=export") == 0
    assert not list(Path().glob(".model*"))
    sampling = ("sampling=greedy", "sampling.max_tokens=10", "attributes.best.helpfulness=3")
    assert (
        run("generate", "checkpoint=out", "input=prompts.jsonl", "output=answers.jsonl", *sampling, "run_dir=gen") == 0
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained("model")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        "model", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for answer in read_records("answers.jsonl"):
        asked = [{"role": "user", "content": answer.messages[0].content}]
        ids = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_tensors="pt", return_dict=True, helpfulness=3
        )
        drawn = model.generate(**ids, max_new_tokens=10, do_sample=False)[0, ids["input_ids"].shape[1] :]
        text = tokenizer.decode(drawn, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if template == "steerlm" and drawn[-1] == model.generation_config.eos_token_id:
            text = text.removesuffix("\n")  # the template's, and not the response's
        assert answer.messages[-1].content == text.removeprefix(prefix)
    if template == "auto":
        asked = ("model", "--attribute", "helpfulness", "--levels", "3", "--max-tokens", "10", "--prompt", WORDS[0])
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / "steer_with_transformers.py"), *asked],
            env=ENVIRONMENT, text=True, capture_output=True, check=True,
        )  # fmt: skip
        first = next(iter(read_records("answers.jsonl"))).messages[-1].content
        assert done.stdout.replace(f": {prefix}", ": ", 1) == f"helpfulness=3: {first}\n"
    _it_comes_back(template, sampling, capsys)


def _it_comes_back(template: str, sampling: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """The folder ``model`` takes attributes as the checkpoint does, and leaves once more as it is."""
    asked = ("input=prompts.jsonl", *sampling)
    assert run("generate", "checkpoint=model", *asked, "output=again.jsonl", "run_dir=gen2") == 0
    assert Path("again.jsonl").read_text() == Path("answers.jsonl").read_text()
    assert run("generate", "checkpoint=model", *asked, "attributes.best.fun=3", "output=no.jsonl", "run_dir=gen3") == 2
    assert run("export", "checkpoint=model", "output=model2", "export.format=hf", "run_dir=export2") == 0
    names = sorted(path.name for path in Path("model").iterdir())
    assert names == sorted(path.name for path in Path("model2").iterdir())
    assert [n for n in names if Path("model", n).read_bytes() != Path("model2", n).read_bytes()] == []
    # Somebody trains it on with another tool, which writes a chat template without attributes.
    path = Path("model2/tokenizer_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": CHATML}))
    capsys.readouterr()
    plain = ("generate", "checkpoint=model2", "input=prompts.jsonl", *sampling[:2], "output=plain.jsonl")
    assert run(*plain, sampling[2], "run_dir=gen4") == 2
    said = capsys.readouterr().err
    if template == "chatml":
        assert "is not the one that its model was exported with" in said and "has no attributes" in said
        assert said.count("is not the one that its model was exported with") == 1
        assert run(*plain, "run_dir=gen5") == 0 and "requested" not in Path("plain.jsonl").read_text()
        # So it is where the section describes a format that writes no prompt at all.
        content = json.loads(path.read_text())
        content["steerlm"]["template"] = {"name": "jinja", "source": "{% for", "tokens": {}, "controls": [],
                                          "day": "2026-01-01", "label_at": "response"}  # fmt: skip
        path.write_text(json.dumps(content))
        assert run(*plain, "run_dir=gen6") == 0
        assert "is not the one that its model was exported with" in capsys.readouterr().err


def test_a_shape_that_a_user_states_is_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("data.source=messages", "data.valid_fraction=0", "attributes=none")
    assert (
        run("preprocess", *data, "data.input=records.jsonl", "data.output_dir=shards", f"tokenizer.path={folder}") == 0
    )
    train = (
        "train_sft",
        "attributes=none",
        "data.train=shards/train",
        f"init_from={folder}",
        "train.steps=1",
        "train.row_tokens=256",
        *TINY,
    )
    assert run(*train, "model.ffn_hidden_size=96") == 2
    assert "model.ffn_hidden_size=96 (checkpoint: 80)" in capsys.readouterr().err


def test_another_tokenizer_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("data.source=messages", "data.valid_fraction=0", "attributes=none")
    assert run("preprocess", *data, *SHARDS, "tokenizer.path=bytes") == 0
    train = (
        "train_sft",
        "attributes=none",
        "data.train=shards/train",
        f"init_from={folder}",
        "train.steps=1",
        "train.row_tokens=256",
        *TINY,
    )
    assert run(*train) == 2
    assert f"preprocess with tokenizer.path={folder}" in capsys.readouterr().err


def test_a_chat_template_is_known_by_what_it_writes(folder: Path, tmp_path: Path) -> None:
    template = chat_template_of(folder, "checkpoint")
    assert (template.name, template.system) == ("chatml", "Be kind.")

    def with_template(source: str | None, **tokens: Any) -> Path:
        path = tmp_path / "other"
        path.mkdir(exist_ok=True)
        (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source, **tokens}))
        return path

    plain = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    ask = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    assert chat_template_of(with_template(plain + ask), "checkpoint").to_dict()["system"] == ""
    with pytest.raises(UserError, match="no token that ends it"):
        chat_template_of(with_template("{% for m in messages %}{{ m.content }}{% endfor %}"), "checkpoint")
    assert chat_template_of(with_template(None), "checkpoint") is None
    broken = "{{ 1 / 0 }}"
    with pytest.raises(UserError, match="refuses the conversation"):
        chat_template_of(with_template(broken), "checkpoint")


def with_format(folder: Path, source: str) -> Path:
    """A copy of the folder with another chat template."""
    copy = Path("own")
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").write_text(source)
    return copy


def test_a_format_of_a_folder_says_what_it_refuses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = with_format(folder, OTHER)
    asked = {"id": "s", "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}
    with Path("prompts.jsonl").open("a") as file:
        file.write(json.dumps(asked) + "\n")
    ask = ("generate", "input=prompts.jsonl", "output=answers.jsonl", "sampling.max_tokens=2", *TINY)
    assert run(*ask, f"checkpoint={copy}") == 2
    assert "prompts.jsonl:5: the chat template refuses the conversation: no system" in capsys.readouterr().err
    with Path("records.jsonl").open("a") as file:
        reply = {"role": "assistant", "content": "z"}
        file.write(json.dumps({**asked, "messages": [*asked["messages"], reply]}) + "\n")
    make = ("preprocess", "data.source=messages", "template=auto", "attributes=demo", "data.valid_fraction=0", *SHARDS)
    assert run(*make, f"tokenizer.path={copy}") == 2
    assert "records.jsonl:25: the chat template refuses the conversation: no system" in capsys.readouterr().err
    assert run(*make, f"tokenizer.path={copy}", "data.on_error=skip") == 0
    listed = [json.loads(line) for line in Path("shards/rejected.jsonl").read_text().splitlines()]
    assert [entry["where"].rpartition(":")[2] for entry in listed] == ["25"]
    assert run(*make, "tokenizer.path=bytes") == 2
    assert "template=auto takes the chat template of tokenizer.path" in capsys.readouterr().err


def changed(folder: Path, name: str, change: Any) -> Path:
    """A copy of the folder in which ``change`` has changed the content of a JSON file."""
    copy = Path("changed")
    shutil.copytree(folder, copy)
    (copy / name).write_text(json.dumps(change(json.loads((copy / name).read_text()))))
    return copy


def test_a_folder_that_cannot_be_asked_says_why(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("generate", "input=prompts.jsonl", "output=answers.jsonl", *TINY)

    def without_tokens(content: dict[str, Any]) -> dict[str, Any]:
        content["added_tokens"] = [t for t in content["added_tokens"] if "im_" not in t["content"]]
        return content

    copy = changed(folder, "tokenizer.json", without_tokens)
    assert run(*asked, f"checkpoint={copy}") == 2
    assert "which its tokenizer has no tokens for" in capsys.readouterr().err
    shutil.rmtree(copy)
    copy = changed(folder, "tokenizer.json", lambda c: {**c, "normalizer": {"type": "Prepend", "prepend": "x"}})
    assert run(*asked, f"checkpoint={copy}") == 2
    assert "its tokenizer makes other tokens of a prompt" in capsys.readouterr().err
    shutil.rmtree(copy)
    copy = changed(folder, "config.json", lambda c: c)
    (copy / "chat_template.jinja").unlink()
    assert run(*asked, f"checkpoint={copy}") == 2
    assert "has no chat template" in capsys.readouterr().err
    assert run("export", f"checkpoint={copy}", "output=again", "export.format=hf", "run_dir=export") == 0
    shutil.rmtree(copy)

    def more_tokens(content: dict[str, Any]) -> dict[str, Any]:
        new = {**content["added_tokens"][-1], "id": 300, "content": "<more>"}
        return {**content, "added_tokens": [*content["added_tokens"], new]}

    copy = changed(folder, "tokenizer.json", more_tokens)
    assert run(*asked, f"checkpoint={copy}") == 2
    assert "they are not of one model" in capsys.readouterr().err


def test_vllm_draws_what_the_generator_draws(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a checkpoint, which is written as a folder first; and from a folder, on two ranks."""
    stand_in = str(Path(__file__).parents[1] / "helpers" / "vllm_stand_in")
    monkeypatch.syspath_prepend(stand_in)
    repository = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([stand_in, repository]))
    data = ("data.source=messages", "data.valid_fraction=0", "template=chatml", "attributes=demo")
    run("preprocess", *data, "data.input=records.jsonl", "data.output_dir=shards", f"tokenizer.path={folder}")
    train = (*data[2:], "data.train=shards/train", f"init_from={folder}", "train.row_tokens=256", "train.steps=1",
             "train.global_batch_samples=8", "run_dir=trained", "engine.precision=fp32")  # fmt: skip
    assert run("train_sft", *train) == 0
    asked = ("input=prompts.jsonl", "sampling=greedy", "sampling.max_tokens=12", "engine.precision=fp32")
    for name, checkpoint, *more in (
        ("written", "trained", "generation.engine=vllm"), ("own", "trained"), ("megatron", str(folder))
    ):  # fmt: skip
        output = (f"output={name}.jsonl", f"run_dir=run-{name}")
        assert run("generate", f"checkpoint={checkpoint}", *output, *asked, *more) == 0
    assert Path("written.jsonl").read_text() == Path("own.jsonl").read_text()
    assert not Path("run-written/vllm").exists(), "what was written for vLLM is not needed any more"
    two = ("generation.engine=vllm", "parallel.tensor=2", "output=two.jsonl", "run_dir=run-two")
    command = [sys.executable, "-m", "steerlm_megatron", "generate", f"checkpoint={folder}", *asked, *two]
    # A process of its own: the server from which commands are forked has no stand-in on its path.
    environment = {**ENVIRONMENT, "PYTHONPATH": os.environ["PYTHONPATH"]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert Path("two.jsonl").read_text() == Path("megatron.jsonl").read_text()
    # A model without such a form is refused before anything is drawn.
    assert run("generate", "checkpoint=trained", "output=no.jsonl", *asked, "generation.engine=vlm", "run_dir=no") == 2
