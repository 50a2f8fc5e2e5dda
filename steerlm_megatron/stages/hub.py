"""Names of models on the Hugging Face hub, where a key of the configuration may name a folder: ``owner/name`` or
``owner/name@revision``.

Owns: which values are such names, which files of a model are fetched, which process fetches them, and which commit a
run stays with. Does not own: the cache and the transfer (the library ``huggingface_hub``, which obeys ``HF_HOME``,
``HF_HUB_CACHE``, ``HF_TOKEN``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE``), what a folder means (``base.py``). Invariants:
what exists on this host is never asked for on the hub; all ranks read the same commit; and pickles are not fetched.

A name becomes the folder of its commit in the hub's cache before a command reads its configuration, so that nothing
else knows of the hub.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steerlm_megatron.config.commands import COMMANDS
from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import write_json_atomic
from steerlm_megatron.runtime import launcher

RECORD = "hub.json"  # in a run folder: which commit each name stood for
KEYS = ("init_from", "checkpoint", "ap_checkpoint", "lora.base", "tokenizer.path")
_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w.-][\w./-]*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTS, _ADAPTER = "adapter_config.json", "adapter_model.safetensors"
# Everything that is read of a folder but the weights, whose files are named by their index.
_SMALL = (
    "config.json",
    "generation_config.json",
    _INDEX,
    _ADAPTS,
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY.md",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_COMMITS = "STEERLM_HUB_COMMITS"
_ASK_SEC = 10.0  # for an answer of the hub, before what is in the cache is taken
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

_folders: dict[str, Path] = {}  # of this process: what was asked for → the folder in the cache


@dataclass(frozen=True)
class HubName:
    """A model on the hub.

    Args:
        repo: ``owner/name``.
        revision: a branch, a tag or a commit; None for the main branch.
    """

    repo: str
    revision: str | None = None

    @classmethod
    def of(cls, value: str | None) -> HubName | None:
        """Return the name that ``value`` is; None for whatever is, or was meant to be, a place on this host.

        A folder ``owner`` on this host makes ``owner/name`` a place in it, unless a revision is said.
        """
        found = _NAME.fullmatch(value or "")
        if found is None or Path(str(value)).exists() or str(value).endswith((".json", ".model")):
            return None
        if found["revision"] is None and Path(found["repo"]).parent.is_dir():
            return None
        return cls(found["repo"], found["revision"])

    @property
    def is_pinned(self) -> bool:
        """Whether it names a commit, which is the same for good."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def fetched(value: str) -> Path | None:
    """Return the folder of a name that this process has fetched; None for anything else."""
    return _folders.get(value)


def resolve(config: Config) -> None:
    """Put the folder in the hub's cache in the place of every name that a command reads, and fetch what is lacking.

    A run that goes on (``run_dir`` has a record) takes the commits that it began with. Where this process is one of
    several ranks, rank 0 chooses the commits, and the first rank of each host fetches.

    Raises:
        UserError: with ``key=value`` first, and why there is no such folder.
    """
    command = COMMANDS[config.command]
    began_with = _recorded(config) | json.loads(os.environ.get(_COMMITS, "{}"))
    keys = [key for key in KEYS if command.reads_key(key)]
    for key in keys:
        value = _get(config, key)
        name = HubName.of(value)
        if name is None:
            continue
        folder = _fetched(name, began_with, f"{key}={value}", config, weights=key != "tokenizer.path")
        _set(config, key, str(folder))
    for key in (key for key in keys if key in KEYS[:3]):
        value = _get(config, key)
        if value is not None and (base := _base_of_adapter(Path(value))) is not None:
            said, name = base
            if not (key == "init_from" and "lora.base" in keys and config.lora.base):
                folder = _fetched(name, began_with, f"{key}={value}: its base {name}", config, weights=True)
                _folders[said] = folder


def record(run_dir: Path) -> None:
    """Write into a run folder which commits this process has fetched, for :func:`resolve` when the run goes on."""
    if _folders:
        write_json_atomic(run_dir / RECORD, _commits())


def environment() -> dict[str, str]:
    """Return the environment variables by which processes that this one starts take the commits that it took."""
    return {_COMMITS: json.dumps(_commits())} if _folders else {}


def _commits() -> dict[str, str]:
    return {asked: folder.name for asked, folder in _folders.items()}


def _recorded(config: Config) -> dict[str, str]:
    """Return the commits that a run began with, by the names that stood for them."""
    path = None if config.run_dir is None or config.overwrite else Path(config.run_dir) / RECORD
    if path is None or not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it to take the newest commits") from None
    return {str(name): str(commit) for name, commit in found.items()} if isinstance(found, dict) else {}


def _base_of_adapter(folder: Path) -> tuple[str, HubName] | None:
    """Return what an adapter's folder says that its base is, and the name on the hub that this is; None where the base
    is a folder on this host, and of a folder without an adapter.
    """
    try:
        said = json.loads((folder / _ADAPTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # whoever reads the folder says what is wrong with it
    base = said.get("base_model_name_or_path") if isinstance(said, dict) else None
    name = HubName.of(base) if isinstance(base, str) and not (folder / base).exists() else None
    if name is None:
        return None
    revision = said.get("revision")
    return str(base), replace(name, revision=name.revision or (revision if isinstance(revision, str) else None))


def _get(config: Config, key: str) -> str | None:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value if isinstance(value, str) else None


def _set(config: Config, key: str, value: str) -> None:
    section, _, leaf = key.rpartition(".")
    setattr(getattr(config, section) if section else config, leaf, value)


def _fetched(name: HubName, began_with: dict[str, str], told: str, config: Config, weights: bool) -> Path:
    """Return the folder of a name in the cache of this host. Collective over the world, where there are ranks."""
    asked = name
    if not name.is_pinned and str(name) in began_with:
        name = replace(name, revision=began_with[str(name)])
    if COMMANDS[config.command].ranks and launcher.is_rank() and launcher.world_size() > 1:
        from steerlm_megatron.runtime import parallel
        from steerlm_megatron.runtime.collectives import broadcast_object, on_each_host, on_main

        parallel.connect(config.engine.timeout_sec)
        first = on_main(lambda: fetch(name, told, weights))
        commit = broadcast_object(None if first is None else first.name)
        name = replace(name, revision=commit)
        on_each_host(lambda: fetch(name, told, weights))
        folder = _whole_from_cache(name, weights, told, "another rank of this host fetched it")
    else:
        folder = fetch(name, told, weights)
    if weights or str(asked) not in _folders:
        _folders[str(asked)] = folder
    return folder


def fetch(name: HubName, told: str, weights: bool = True) -> Path:
    """Return the folder of a model in the hub's cache on this host, after fetching what it lacks.

    Where the hub cannot be asked, the folder is what the cache has.

    Args:
        told: what names it, for messages.
        weights: whether the weights are needed as well.

    Raises:
        UserError: there is no such model, it cannot be had, or its weights are pickles.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    here = "no such folder here, and " if name.revision is None else ""
    hub = f"the hub ({constants.ENDPOINT})"
    try:
        huggingface_hub.HfApi().model_info(name.repo, revision=name.revision, timeout=_ASK_SEC)
    except errors.OfflineModeIsEnabled:
        return _whole_from_cache(name, weights, told, here + "HF_HUB_OFFLINE forbids to ask the hub")
    except Exception as error:  # of the library's HTTP client, which is another one in other versions
        if said := _refusal(error, name):
            raise UserError(f"{told}: {here}{said}") from None
        return _whole_from_cache(name, weights, told, f"{here}{hub} cannot be asked ({_reason(error)})")
    folder = _download(name, _SMALL, told)  # by the revision, so that the cache knows which commit it is
    pinned = replace(name, revision=folder.name)
    if not weights:
        return folder
    if not (folder / "config.json").is_file() and not (folder / _ADAPTS).is_file():
        raise UserError(f"{told}: {name.repo} has no config.json on {hub}: it is no model of transformers")
    wanted = _weights_of(folder)
    folder = _download(pinned, wanted, told)
    if not any((folder / file).is_file() for file in wanted):
        _refuse_other_weights(pinned, told)
    return folder


def _refusal(error: Exception, name: HubName) -> str | None:
    """Return what the hub's answer means, and what to do; None for no answer, or one that says nothing of the model."""
    from huggingface_hub import constants, errors

    hub = f"the hub ({constants.ENDPOINT})"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{hub} gives {name.repo} to those alone who accepted its conditions: accept them at "
            f"{constants.ENDPOINT}/{name.repo}, and set HF_TOKEN to a token of yours (or: hf auth login)"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{hub} has no model {name.repo}, or not for everybody: a private one needs HF_TOKEN (or: hf auth login)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name.repo} has no branch, tag or commit {name.revision} on {hub}"
    return None


def _weights_of(folder: Path) -> tuple[str, ...]:
    """Return the names of the files with a model's weights, as its small files tell them."""
    if (folder / _ADAPTS).is_file():
        return (_ADAPTER,)
    try:
        places = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        return tuple(sorted({str(place) for place in places}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return (_SINGLE,)  # of an index that cannot be read, HFFolder says what is wrong with it


def _download(name: HubName, patterns: Iterable[str], told: str) -> Path:
    """Return the folder of a commit after fetching the files of ``patterns``, of which there may be none."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name.repo, revision=name.revision, allow_patterns=list(patterns)))
    except Exception as error:  # as in fetch()
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise
        said = _refusal(error, name) or (
            f"{name.repo} could not be fetched from the hub ({_reason(error)}); start the same command again, which "
            "goes on with what is there"
        )
        raise UserError(f"{told}: {said}") from None


def _whole_from_cache(name: HubName, weights: bool, told: str, why: str) -> Path:
    """Return the folder of a name in the cache. ``UserError`` if the cache lacks it, or files of it.

    Args:
        why: why the hub is not asked.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    cache = f"the hub's cache on this host ({constants.HF_HUB_CACHE})"
    try:
        found = huggingface_hub.snapshot_download(
            name.repo, revision=name.revision, allow_patterns=list(_SMALL), local_files_only=True
        )
    except errors.LocalEntryNotFoundError as error:
        part = " a part alone of" if getattr(error, "snapshot_path", None) else " no"
        raise UserError(f"{told}: {why}, and {cache} has{part} {name}") from None
    folder = Path(found)
    if lacking := [file for file in (_weights_of(folder) if weights else ()) if not (folder / file).is_file()]:
        more = f" and {len(lacking) - 3} more files" if len(lacking) > 3 else ""
        raise UserError(f"{told}: {why}, and {cache} has {name} without {' '.join(lacking[:3])}{more}")
    return folder


def _refuse_other_weights(name: HubName, told: str) -> None:
    """Say of a model without safetensors what it has instead, and what to do."""
    import huggingface_hub

    files = huggingface_hub.HfApi().list_repo_files(name.repo, revision=name.revision)
    pickles = sorted(file for file in files if file.endswith(_PICKLES) and "/" not in file)
    if not pickles:
        raise UserError(f"{told}: {name.repo} has neither {_SINGLE} nor {_INDEX} on the hub")
    raise UserError(
        f"{told}: the weights of {name.repo} are pickles ({' '.join(pickles[:3])}), which may run code when they are "
        'read; make safetensors of them where you trust them: python -c "from transformers import AutoModelForCausalLM '
        f"as M, AutoTokenizer as T; [C.from_pretrained('{name.repo}').save_pretrained('NEW_FOLDER') for C in (M, T)]\""
    )


def _reason(error: Exception) -> str:
    """Return what an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
