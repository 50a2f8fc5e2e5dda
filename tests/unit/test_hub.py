"""Names of models on the hub become folders of its cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.observe.runfolder import fingerprint, hub_source
from steerlm_megatron.stages import hub
from steerlm_megatron.stages.hub import HubName
from tests.helpers.fake_hub import FakeHub, fake_hub


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with a model in two shards, its pickle and an adapter of it; the cache is empty."""
    with fake_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.delenv("STEERLM_HUB_COMMITS", raising=False)
        monkeypatch.setattr(hub, "_folders", {})
        monkeypatch.chdir(tmp_path)
        shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        files = {"config.json": '{"model_type": "llama"}', "tokenizer.json": "{}", "README.md": "# of the model"}
        files |= {"model.safetensors.index.json": json.dumps({"weight_map": shards})}
        files |= {file: f"weights of {file}" for file in shards.values()}
        unread = {"consolidated.safetensors": "once more", "pytorch_model.bin": "a pickle", "modeling_x.py": "code"}
        found.publish("owner/model", _made(tmp_path / "model", files | unread))
        found.publish("owner/pickles", _made(tmp_path / "pickles", {"config.json": "{}", "pytorch_model.bin": "x"}))
        found.publish("owner/gguf", _made(tmp_path / "gguf", {"model.gguf": "x"}))
        about = '{"peft_type": "LORA", "base_model_name_or_path": "owner/model"}'
        files = {"adapter_config.json": about, "adapter_model.safetensors": "w"}
        found.publish("owner/adapter", _made(tmp_path / "adapter", files))
        yield found


def _made(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def config_of(*overrides: str, command: str = "train_sft") -> Config:
    config = Config(command=command)
    for key, _, value in (override.partition("=") for override in overrides):
        section, _, leaf = key.rpartition(".")
        setattr(getattr(config, section) if section else config, leaf, value)
    return config


def said(*overrides: str, command: str = "train_sft") -> str:
    with pytest.raises(UserError) as error:
        hub.resolve(config_of(*overrides, command=command))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    names = {
        "owner/model": HubName("owner/model"),
        "owner/model@v1.0": HubName("owner/model", "v1.0"),
        "owner/model@refs/pr/1": HubName("owner/model", "refs/pr/1"),
        "runs/missing@main": HubName("runs/missing", "main"),
    }
    places = ("runs/sft", "runs/missing", "model", "a/b/c", "/owner/model", "../model", "./model", "bytes", None)
    places += ("other/tokenizer.model", "other/tokenizer.json", "owner/", "owner/model@")
    assert {value: HubName.of(value) for value in names} == names
    assert [HubName.of(value) for value in places] == [None] * len(places)
    assert HubName("a/b", "0" * 40).is_pinned and not HubName("a/b", "v1").is_pinned and not HubName("a/b").is_pinned


def test_a_name_becomes_a_folder_with_the_files_that_are_read(there: FakeHub) -> None:
    config = config_of("init_from=owner/model", "tokenizer.path=owner/model")
    hub.resolve(config)
    folder = Path(str(config.init_from))
    commit = there.branches["owner/model", "main"]
    assert hub_source(folder) == ("owner/model", commit) and config.tokenizer.path == str(folder)
    assert sorted(there.fetched()) == sorted(file.name for file in folder.iterdir()) == [
        "README.md", "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.json",
    ]  # fmt: skip
    again = config_of("init_from=owner/model")
    hub.resolve(again)
    assert again.init_from == config.init_from and there.fetched() == []


def test_a_tokenizer_needs_no_weights_and_other_keys_are_left_alone(there: FakeHub) -> None:
    config = config_of("tokenizer.path=owner/model", command="preprocess")
    config.init_from = "owner/model"  # which preprocess does not read
    hub.resolve(config)
    assert config.init_from == "owner/model"
    fetched = there.fetched()
    assert "tokenizer.json" in fetched and not [file for file in fetched if file.endswith(".safetensors")]


def test_an_adapter_brings_its_base(there: FakeHub) -> None:
    config = config_of("checkpoint=owner/adapter", command="serve")
    hub.resolve(config)
    base = hub.fetched("owner/model")
    assert base is not None and (base / "model-00002-of-00002.safetensors").is_file()
    assert (Path(str(config.checkpoint)) / "adapter_model.safetensors").is_file()
    assert hub.fetched("owner/other") is None


def test_a_run_goes_on_with_its_commit(there: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = there.branches["owner/model", "main"]
    hub.resolve(config_of("init_from=owner/model"))
    (tmp_path / "run").mkdir()
    hub.record(tmp_path / "run")
    told = hub.environment()
    shutil.copytree(tmp_path / "model", tmp_path / "newer")
    second = there.publish("owner/model", tmp_path / "newer")

    def commit(*more: str) -> str:
        monkeypatch.setattr(hub, "_folders", {})
        config = config_of("init_from=owner/model", *more)
        hub.resolve(config)
        return Path(str(config.init_from)).name

    assert first != second == commit()
    assert commit(f"run_dir={tmp_path / 'run'}") == first
    assert commit(f"run_dir={tmp_path / 'run'}", "overwrite=yes") == second
    assert commit(f"init_from=owner/model@{first}") == first  # the last of two is meant
    monkeypatch.setenv(*next(iter(told.items())))  # what a process that starts ranks tells them
    assert commit() == first
    (tmp_path / "run" / hub.RECORD).write_text("{")
    assert said("init_from=owner/model", f"run_dir={tmp_path / 'run'}").endswith("delete it to take the newest commits")


def test_without_a_network_the_cache_is_taken(there: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.resolve(config_of("init_from=owner/model"))
    hub.resolve(config_of("tokenizer.path=owner/adapter", command="preprocess"))
    for offline, url in ((True, there.url), (False, "http://127.0.0.1:9")):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        why = "HF_HUB_OFFLINE forbids to ask the hub" if offline else f"the hub ({url}) cannot be asked (ConnectError: "
        config = config_of("init_from=owner/model")
        hub.resolve(config)
        assert hub_source(str(config.init_from)) == ("owner/model", there.branches["owner/model", "main"])
        text = said("init_from=owner/other")
        assert text.startswith(f"init_from=owner/other: no such folder here, and {why}"), text
        assert text.endswith(f"and the hub's cache on this host ({constants.HF_HUB_CACHE}) has no owner/other"), text
        assert " without adapter_model.safetensors" in said("checkpoint=owner/adapter", command="serve")
        assert f"{why}" in said("init_from=owner/model@v2") and "no such folder" not in said("init_from=owner/model@v2")


def test_what_the_hub_refuses_is_one_line(there: FakeHub) -> None:
    there.gated.add("owner/model")
    assert said("init_from=owner/model").startswith(
        f"init_from=owner/model: the hub ({there.url}) gives owner/model to those alone who accepted its conditions: "
    )
    assert said("init_from=owner/none").startswith(
        f"init_from=owner/none: no such folder here, and the hub ({there.url}) has no model owner/none, or not for "
    )
    assert "owner/model has no branch, tag or commit v9 on the hub" in said("init_from=owner/model@v9")
    assert "are pickles (pytorch_model.bin), which may run code" in said("init_from=owner/pickles")
    assert "has no config.json" in said("init_from=owner/gguf")


def test_a_folder_of_the_cache_counts_by_its_commit(tmp_path: Path) -> None:
    def made(cache: str, commit: str) -> Path:
        folder = tmp_path / cache / "models--owner--a--b" / "snapshots" / commit
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(cache)
        return folder

    one, same, other = made("x", "0" * 40), made("yy", "0" * 40), made("x", "1" * 40)
    assert hub_source(one) == ("owner/a--b", "0" * 40) and hub_source(tmp_path) is None
    assert fingerprint({}, [one]) == fingerprint({}, [same]) != fingerprint({}, [other])
