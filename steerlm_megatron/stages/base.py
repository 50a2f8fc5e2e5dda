"""Models that commands start from: a checkpoint of ours, or a Hugging Face folder.

Owns: what of a Hugging Face folder stands for a checkpoint's metadata, tokenizer and template; the shape that a run
takes from its base. Does not own: weights and ``config.json`` (``model/hf``), checkpoints (``train/meta.py``).
Invariant: nobody repeats ``model.*``: a run that starts from a model has that model's shape.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from steerlm_megatron.config.schema import Config, ModelConfig
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.errors import UserError
from steerlm_megatron.model.hf import HFFolder, is_hf_folder
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.stages.prompt_tokens import difference
from steerlm_megatron.steer.jinja_template import JinjaTemplate, render_chat_template
from steerlm_megatron.steer.records import Message
from steerlm_megatron.steer.templates import AUTO, LABEL_AT, TEMPLATES, Template, join
from steerlm_megatron.train.checkpoint import resolve
from steerlm_megatron.train.meta import CheckpointMeta, read_meta

# A run chooses these for itself, whatever it starts from.
_OF_THE_RUN = ("dropout", "init_std", "vocab_multiple")
_MARK = "\x01system\x01"


@dataclass(frozen=True)
class Base:
    """What a run starts from.

    Args:
        folder: the checkpoint, or the Hugging Face folder.
        meta: of a checkpoint; for a Hugging Face folder, what stands for it.
        hf: the opened Hugging Face folder; None for a checkpoint.
    """

    folder: Path
    meta: CheckpointMeta
    hf: HFFolder | None = None


def open_base(path: str, key: str) -> Base:
    """Open the model that ``key=path`` names, without its weights.

    Raises:
        UserError: it is neither a checkpoint nor a Hugging Face folder that can be read.
    """
    if not is_hf_folder(path):
        folder = resolve(path, key)
        return Base(folder, read_meta(folder))
    hf = HFFolder.open(path, key)
    tokenizer = Tokenizer.from_path(hf.folder)
    if tokenizer.base_size > hf.vocab_size:
        raise UserError(
            f"{key}={path}: its tokenizer has {tokenizer.base_size} ids, and config.json says vocab_size="
            f"{hf.vocab_size}: they are not of one model"
        )
    meta = CheckpointMeta(
        step=0,
        task="lm",
        model=dataclasses.asdict(hf.model),
        vocab_size=max(hf.vocab_size, tokenizer.vocab_size),
        schema=None,
        template={},
        tokenizer_hash=tokenizer.model_hash,
        training_state=False,
    )
    return Base(hf.folder, meta, hf)


def adopt_shape(config: Config, overrides: Iterable[str]) -> None:
    """Give ``config.model`` the shape of ``init_from``, unless the user states one on the command line, which is then
    compared with it (``stages/resume.py``).
    """
    keys = {override.lstrip("+~").partition("=")[0] for override in overrides}
    if config.init_from is None or "model" in keys:
        return
    meta = open_base(config.init_from, "init_from").meta
    stated = {key.removeprefix("model.") for key in keys if key.startswith("model.")}
    adopted = {k: v for k, v in meta.model.items() if k not in stated and k not in _OF_THE_RUN}
    config.model = dataclasses.replace(config.model, **adopted)


def model_differences(config: Config, meta: CheckpointMeta, more_free: Iterable[str] = ()) -> list[str]:
    """Return ``model.key=value (checkpoint: value)`` for each key that makes another model; ``more_free`` do not."""
    ours, theirs = dataclasses.asdict(config.model), dataclasses.asdict(ModelConfig(**meta.model))
    free = {"name", "max_position", "dropout", "init_std", *more_free}
    return [f"model.{k}={ours[k]} (checkpoint: {theirs[k]})" for k in ours if k not in free and ours[k] != theirs[k]]


def chat_template_of(
    folder: Path, key: str, known: Iterable[str] = (), system: str = "", label_at: str = LABEL_AT[0]
) -> Template | None:
    """Return the template that renders conversations as the folder's own chat template does: one of ours where it is
    alike, else the chat template itself. A folder without one has None: its model continues text.

    The chat template is tried on a conversation with a system text, and on one without, which tells the system text
    that it puts there by itself.

    Args:
        known: the strings that the folder's tokenizer has one token for.
        system: the system text of conversations without one; empty: what the chat template puts there.
        label_at: as in ``config.schema.TemplateConfig``.

    Raises:
        UserError: the chat template cannot be used (``JinjaTemplate``).
    """
    source = _chat_template(folder)
    if source is None:
        return None
    tokens = _special_tokens(folder)
    if label_at == LABEL_AT[0] and (found := _like(source, tokens)) is not None:
        return dataclasses.replace(found, system=system) if system else found
    try:
        return JinjaTemplate.of(source, tokens, known, system, label_at)
    except UserError as error:
        raise UserError(f"{key}={folder}: {error}") from None


def _like(source: str, tokens: Mapping[str, str]) -> Template | None:
    """Return the template of ours that writes what a chat template does; None if there is none."""
    turns = (Message("user", "Hi."), Message("assistant", "Hello!"), Message("user", "Who are you?"))
    for kind in TEMPLATES.values():
        template = kind(system="")
        expected = join(template.prefix((Message("system", _MARK), *turns)))
        if _rendered(source, tokens, (Message("system", _MARK), *turns)) != expected:
            continue
        bare = _rendered(source, tokens, turns)
        before, _, after = expected.partition(_MARK)
        if bare == join(template.prefix(turns)):
            return template
        if bare is not None and bare.startswith(before) and bare.endswith(after):
            return kind(system=bare[len(before) : len(bare) - len(after)])
    return None


def configured_template(config: Config) -> Template:
    """Return the template that ``template.*`` names; ``template=auto`` is the chat template of ``tokenizer.path``.

    Raises:
        UserError: an unknown template; ``template=auto`` without a folder that has a chat template.
    """
    if config.template.name != AUTO:
        return Template.from_config(config.template)
    path = config.tokenizer.path
    if path is None or not Path(path).exists():
        raise UserError(f"template=auto takes the chat template of tokenizer.path, which is {path}; name a folder")
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    found = chat_template_of(
        folder, "tokenizer.path", _known_tokens(folder), config.template.system, config.template.label_at
    )
    if found is None:
        raise UserError(
            f"template=auto: tokenizer.path={path} has no chat template; choose a format (template=chatml, "
            "template=steerlm)"
        )
    return found


def _known_tokens(folder: Path) -> list[str]:
    """Return the strings that the folder's tokenizer has one token for, beyond its vocabulary of texts."""
    added = _json(folder / "tokenizer.json").get("added_tokens") or []
    named = [token["content"] for token in added if isinstance(token, dict) and isinstance(token.get("content"), str)]
    return [*named, *_special_tokens(folder).values()]


def prompts_of(folder: Path, key: str) -> tuple[Template | None, Tokenizer]:
    """Return the template of :func:`chat_template_of` and the folder's tokenizer, which gives the folder's own tokens.

    Raises:
        UserError: as :func:`chat_template_of`; or the tokenizer lacks the format's tokens, or other tokens come out.
    """
    template = chat_template_of(folder, key, _known_tokens(folder))
    if template is None:
        return None, Tokenizer.from_path(folder)
    wanted = [text for text in template.control_strings if text != template.label_marker]
    tokenizer = Tokenizer.from_path(folder, wanted)
    if lacking := [text for text in wanted if text in tokenizer.added]:
        raise UserError(
            f"{key}={folder}: its chat template writes {' '.join(lacking)}, which its tokenizer has no tokens for"
        )
    if tokenizer.model_kind == "huggingface":
        if said := difference(tokenizer, template, None, json.loads(tokenizer.model_data)):
            raise UserError(
                f"{key}={folder}: its tokenizer makes other tokens of a prompt than ours would ({said}): the model "
                "would be asked in a way that it does not know; train it first (init_from=), with a format of your own"
            )
    return template, tokenizer


def _chat_template(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    try:
        if file.is_file():
            return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    found = _json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # of several, by name
        named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
        found = named[0].get("template") if named else None
    return found if isinstance(found, str) else None


def _special_tokens(folder: Path) -> dict[str, str]:
    """Return ``bos_token`` and the like, which chat templates write."""
    out = {}
    for key, value in _json(folder / "tokenizer_config.json").items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            out[key] = text
    return out


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def _rendered(source: str, tokens: Mapping[str, str], messages: Iterable[Message]) -> str | None:
    """Return what a chat template makes of a conversation; None where it refuses it."""
    plain = [{"role": m.role, "content": m.content} for m in messages]
    try:
        return render_chat_template(source, plain, tokens, True, date.today())
    except UserError as error:
        get_logger(__name__).debug("%s", error)
        return None
