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
from steerlm_megatron.data.text.hugging_face import prefix_rule
from steerlm_megatron.data.text.sentencepiece_json import converted, is_converted
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import read_json_object
from steerlm_megatron.model.hf import SECTION, HFFolder, PeftFolder, base_of, is_hf_folder, is_peft_folder
from steerlm_megatron.model.lora import Lora
from steerlm_megatron.observe.log import get_logger, warn_once
from steerlm_megatron.observe.runfolder import hub_source
from steerlm_megatron.stages import hub
from steerlm_megatron.stages.prompt_tokens import PROMPTS, difference, prompts_for
from steerlm_megatron.stages.published import TOKENIZER_CONFIG, kept_of, told_of_classifier, told_of_language_model
from steerlm_megatron.steer.jinja_sandbox import render_chat_template
from steerlm_megatron.steer.jinja_template import JinjaTemplate
from steerlm_megatron.steer.prefix_blanks import are_apart, with_blanks
from steerlm_megatron.steer.records import Conversation, Message
from steerlm_megatron.steer.templates import AUTO, LABEL_AT, TEMPLATES, Template, join
from steerlm_megatron.steer.thoughts import opened_thoughts, without_opened_thoughts
from steerlm_megatron.train.checkpoint import resolve
from steerlm_megatron.train.meta import CheckpointMeta, read_meta

# A run chooses these for itself, whatever it starts from.
_OF_THE_RUN = ("dropout", "init_std", "vocab_multiple")
_OF_A_NEW_HEAD = ("head_bias",)  # of a run, unless it goes on with a head that is there
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

    @property
    def lora(self) -> Lora | None:
        """The adapters that the model has beside its weights; None for none."""
        if isinstance(self.hf, PeftFolder):
            return self.hf.lora
        return None if self.meta.lora is None else Lora.from_dict(self.meta.lora)

    @property
    def adapted(self) -> str | None:
        """The Hugging Face model that the adapters are of, where there is one: a folder, or ``owner/name@commit``."""
        if isinstance(self.hf, PeftFolder):
            return told_of(self.hf.base.folder)
        return None if self.meta.lora is None else self.meta.lora.get("base")


def told_of(folder: Path) -> str:
    """Return what names a folder on other hosts as well, where there is such a name: ``owner/name@commit``."""
    source = hub_source(folder)
    return str(folder) if source is None else f"{source[0]}@{source[1]}"


def open_base(path: str, key: str, under: str | None = None) -> Base:
    """Open the model that ``key=path`` names, without its weights.

    Args:
        under: of an adapter of ``peft`` the base's folder; None for the one that its ``adapter_config.json`` says.

    Raises:
        UserError: it is neither a checkpoint nor a Hugging Face folder that can be read.
    """
    if is_peft_folder(path):
        hf: HFFolder = PeftFolder.open_adapter(path, key, _base_of_adapter(Path(path), key, under))
    elif not is_hf_folder(path):
        folder = resolve(path, key)
        return Base(folder, read_meta(folder))
    else:
        hf = HFFolder.open(path, key)
    tokenizer = Tokenizer.from_path(hf.folder)
    if tokenizer.base_size > hf.vocab_size:
        raise UserError(
            f"{key}={path}: its tokenizer has {tokenizer.base_size} ids, and config.json says vocab_size="
            f"{hf.vocab_size}: they are not of one model"
        )
    told = told_of_language_model(hf) if hf.head == "lm" else told_of_classifier(hf)
    meta = CheckpointMeta(
        step=0,
        task=told.get("task", "lm") if hf.head == "lm" else "ap_regression",
        model=dataclasses.asdict(hf.model),
        vocab_size=max(hf.vocab_size, tokenizer.vocab_size),
        schema=told.get("attributes"),
        template=told.get("template", {}),
        tokenizer_hash=tokenizer.model_hash,
        training_state=False,
        label_mean=told.get("label_mean", []),
        label_counts=told.get("label_counts", {}),
        base=kept_of(hf.folder, hf),
    )
    if hf.head == "lm" and meta.template:
        meta = _if_still_asked_so(meta, hf)
    return Base(hf.folder, meta, hf)


def _if_still_asked_so(meta: CheckpointMeta, hf: HFFolder) -> CheckpointMeta:
    """Return ``meta`` of a language model that was exported here; without what it says of attributes and format where
    the folder's chat template writes other prompts, and is then all that says how to ask the model.
    """
    template, schema = Template.from_dict(meta.template), meta.attributes()
    levels = None if schema is None else schema.complete({})
    source, tokens = _chat_template(hf.folder) or "", _special_tokens(hf.folder)
    prompts = prompts_for(template)
    if prompts and all(
        _rendered(source, tokens, messages) == join(template.prefix(messages, schema, levels)) for messages in prompts
    ):
        return meta
    warn_once(
        __name__,
        f"{hf.key}={hf.folder}: its chat template is not the one that its model was exported with, and is taken as it "
        f"stands: attributes and format that {TOKENIZER_CONFIG} names under {SECTION} are left out",
    )
    return dataclasses.replace(meta, task="lm", schema=None, template={}, label_counts={})


def _base_of_adapter(path: Path, key: str, under: str | None) -> HFFolder:
    """The model that an adapter is of: a folder, also relative to the adapter's."""
    said = under or base_of(path)
    if said is None:
        raise UserError(f"{key}={path}: adapter_config.json does not say base_model_name_or_path; put it there")
    for folder in (Path(said), path / said, hub.fetched(said)):
        if folder is not None and is_hf_folder(folder):
            return HFFolder.open(folder, key)
    remedy = "" if under else "; put the folder's place there, or, in training, set lora.base"
    raise UserError(f"{key}={path} is an adapter of {said}, which is no folder of a Hugging Face model here{remedy}")


def adopt_shape(config: Config, overrides: Iterable[str]) -> None:
    """Give ``config.model`` the shape of ``init_from``, and ``config.lora`` that of its adapters if these are trained
    on, unless the user states one on the command line, which is then compared with it (``stages/resume.py``).
    """
    keys = {override.lstrip("+~").partition("=")[0] for override in overrides}
    if config.init_from is None:
        return
    base = open_base(config.init_from, "init_from", config.lora.base)
    if config.train.trainable == "lora" and base.lora is not None and not config.lora.merge:
        for name in ("rank", "alpha", "targets", "dropout"):
            if f"lora.{name}" not in keys:
                value = getattr(base.lora, name)
                setattr(config.lora, name, list(value) if name == "targets" else value)
    if "model" in keys:
        return
    meta = base.meta
    stated = {key.removeprefix("model.") for key in keys if key.startswith("model.")} | {*_OF_THE_RUN}
    if meta.head == "lm":
        stated |= {*_OF_A_NEW_HEAD}
    adopted = {k: v for k, v in meta.model.items() if k not in stated}
    config.model = dataclasses.replace(config.model, **adopted)


def model_differences(config: Config, meta: CheckpointMeta, more_free: Iterable[str] = ()) -> list[str]:
    """Return ``model.key=value (checkpoint: value)`` for each key that makes another model; ``more_free`` do not."""
    ours, theirs = dataclasses.asdict(config.model), dataclasses.asdict(ModelConfig(**meta.model))
    free = {"name", "max_position", "dropout", "init_std", *more_free, *(_OF_A_NEW_HEAD if meta.head == "lm" else ())}
    return [f"model.{k}={ours[k]} (checkpoint: {theirs[k]})" for k in ours if k not in free and ours[k] != theirs[k]]


def chat_template_of(
    folder: Path,
    key: str,
    known: Iterable[str] = (),
    system: str = "",
    label_at: str = LABEL_AT[0],
    trained: bool = False,
) -> Template | None:
    """Return the template that renders conversations as the folder's own chat template does: one of ours where it is
    alike, else the chat template itself. A folder without one has None: its model continues text.

    The chat template is tried on a conversation with a system text, and on one without, which tells the system text
    that it puts there by itself.

    Args:
        known: the strings that the folder's tokenizer has one token for.
        system: the system text of conversations without one; empty: what the chat template puts there.
        label_at: as in ``config.schema.TemplateConfig``.
        trained: whether a model is to be trained with it, which is then asked without thoughts in any case.

    Raises:
        UserError: the chat template cannot be used (``JinjaTemplate``).
    """
    source = _chat_template(folder)
    if source is None:
        return None
    tokens = _special_tokens(folder)
    if trained and (opened := opened_thoughts(_rendered(source, tokens, PROMPTS[0]) or "")):
        get_logger(__name__).info(
            "%s=%s: its chat template opens thoughts (%r) before a response; the model is trained, and asked, without",
            key, folder, opened,
        )  # fmt: skip
        source = without_opened_thoughts(source, opened)
    try:
        blanks = _with_blanks(source, tokens, known, prefix_rule(_tokenizer_json(folder)))
        if blanks is not None:
            return JinjaTemplate.of(blanks, tokens, known, system, label_at)
        if label_at == LABEL_AT[0] and (found := _like(source, tokens)) is not None:
            return dataclasses.replace(found, system=system) if system else found
        return JinjaTemplate.of(source, tokens, known, system, label_at)
    except UserError as error:
        raise UserError(f"{key}={folder}: {error}") from None


def _with_blanks(source: str, tokens: Mapping[str, str], known: Iterable[str], rule: str | None) -> str | None:
    """Return a chat template with the blanks that the folder's tokenizer puts before texts; None where it puts none
    into prompts.
    """
    known = list(known)
    if rule is None or not known:
        return None
    controls = JinjaTemplate.of(source, tokens, known).controls
    if not are_apart(controls):
        return None  # prompts_of() says that the tokens are other ones, if they are
    blanks = with_blanks(source, controls, rule)
    written = [[_rendered(text, tokens, messages) for messages in PROMPTS] for text in (source, blanks)]
    return None if written[0] == written[1] else blanks


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
        folder,
        "tokenizer.path",
        _known_tokens(folder),
        config.template.system,
        config.template.label_at,
        trained=True,
    )
    if found is None:
        raise UserError(
            f"template=auto: tokenizer.path={path} has no chat template; choose a format (template=chatml, "
            "template=steerlm)"
        )
    return found


def _known_tokens(folder: Path) -> list[str]:
    """Return the strings that the folder's tokenizer has one token for, beyond its vocabulary of texts."""
    added = _tokenizer_json(folder).get("added_tokens") or []
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
        source, tokens = _chat_template(folder) or "", _special_tokens(folder)
        theirs = json.loads(tokenizer.model_data)
        if said := difference(tokenizer, template, None, theirs, lambda told: _rendered(source, tokens, told)):
            raise UserError(
                f"{key}={folder}: its tokenizer makes other tokens of a prompt than ours would ({said}): the model "
                "would be asked in a way that it does not know; train it first (init_from=), with a format of your own"
            )
    return template, tokenizer


def scored_by(folder: Path, key: str) -> tuple[Template, Tokenizer, str]:
    """Return the template and the tokenizer of a classifier, whose values are read at the last token of a conversation
    that its chat template closes; and what that chat template writes there after the template's end.

    Raises:
        UserError: as :func:`prompts_of`; or the folder has no chat template, or it closes a conversation otherwise than
            the template that renders its prompts.
    """
    template, tokenizer = prompts_of(folder, key)
    source = template.source if isinstance(template, JinjaTemplate) else _chat_template(folder)
    if template is None or source is None:
        raise UserError(f"{key}={folder} has no chat template: nothing says how a conversation is written for it")
    turns = (Message("user", "Hi."), Message("assistant", "Hello!"))
    after = set()
    for messages in (turns, (*turns, *turns), (Message("system", "Be brief."), *turns)):
        if template.refusal(messages) is None:
            found = _rendered(source, _special_tokens(folder), messages, ask=False) or ""
            ours = join(template.render(Conversation("", messages)))
            after.add(found.removeprefix(ours) if found.startswith(ours) else None)
    (end,) = after if len(after) == 1 else (None,)
    if end is None or any(text in end for text in tokenizer.controls):
        raise UserError(
            f"{key}={folder}: its chat template writes a conversation that ends with a response in another way than "
            "one that goes on: where its values are read is not known"
        )
    return template, tokenizer, end


def _chat_template(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    try:
        if file.is_file():
            return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    found = read_json_object(folder / TOKENIZER_CONFIG).get("chat_template")
    if isinstance(found, list):  # of several, by name
        named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
        found = named[0].get("template") if named else None
    return found if isinstance(found, str) else None


def _special_tokens(folder: Path) -> dict[str, str]:
    """Return ``bos_token`` and the like, which chat templates write."""
    out = {}
    for key, value in read_json_object(folder / TOKENIZER_CONFIG).items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            out[key] = text
    return out


def _tokenizer_json(folder: Path) -> dict[str, Any]:
    """Return the content of the folder's ``tokenizer.json``, or what its SentencePiece model makes of one."""
    if not (folder / "tokenizer.json").is_file() and is_converted(folder):
        return converted(folder)
    return read_json_object(folder / "tokenizer.json")


def _rendered(source: str, tokens: Mapping[str, str], messages: Iterable[Message], ask: bool = True) -> str | None:
    """Return what a chat template makes of a conversation; None where it refuses it."""
    plain = [{"role": m.role, "content": m.content} for m in messages]
    try:
        return render_chat_template(source, plain, tokens, ask, date.today())
    except UserError as error:
        get_logger(__name__).debug("%s", error)
        return None
