"""What the model card of an exported model says.

Owns: which facts of a checkpoint, its run and an evaluation are told, and in which words. Does not own: the card's
structure (``report/model_card.py``). Invariant: nothing is told that is not known: a number that was not measured, a
licence that nobody named and a path of the machine are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from steerlm_megatron.errors import UserError
from steerlm_megatron.model.hf import Family, Labels
from steerlm_megatron.observe.runfolder import read_summary
from steerlm_megatron.report.model_card import render_card
from steerlm_megatron.stages.report_lineage import CORPORA
from steerlm_megatron.stages.session import OpenedCheckpoint
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.chat_template import variable

# OpenAssistant (arXiv 2304.07327 appendix) and HelpSteer (arXiv 2311.09528 §2): what people were asked to rate.
_MEANINGS = {
    "quality": "how good the response is on the whole",
    "toxicity": "rude, hurtful or offensive content",
    "humor": "how funny the response is, against serious",
    "creativity": "how original or imaginative the response is",
    "helpfulness": "how helpful the response is for what was asked",
    "correctness": "facts are right and complete, without errors",
    "coherence": "clear, and consistent with itself",
    "complexity": "the depth of knowledge that writing the response takes",
    "verbosity": "how much detail there is, for what the prompt asks",
    "violence": "content that is violent or calls for violence",
    "not_appropriate": "content that is not fit for a customer assistant",
    "hate_speech": "content against a group of people",
    "sexual_content": "sexual content",
    "fails_task": "the response does not do what was asked",
    "political_content": "political content",
    "moral_judgement": "the response judges morally",
    "lang_mismatch": "the response is in another language than asked",
}
_VIEWS = {
    "ap_regression": "labelled responses, as a regression on the attributes' values",
    "acsft": "responses with a label line before each",
    "sft": "responses, without attributes",
    "lm": "whole texts",
}


@dataclass(frozen=True)
class RunFacts:
    """What the run of a checkpoint left beside it; nothing where the checkpoint was exported or moved.

    Args:
        counts: the summary's counts.
        valid: the validation at the checkpoint's step: name → number.
        evaluation: the content of an ``evaluation.json``.
    """

    counts: Mapping[str, Any] = field(default_factory=dict)
    valid: Mapping[str, float] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(checkpoint: Path, step: int, evaluation: str | None = None) -> RunFacts:
        """Read what there is.

        Raises:
            UserError: ``evaluation`` is neither an ``evaluation.json`` nor a folder with one.
        """
        run = checkpoint.resolve().parent.parent
        summary = (read_summary(run) or {}) if checkpoint.parent.name == "checkpoints" else {}
        found = summary.get("counts")
        return RunFacts(
            found if isinstance(found, Mapping) else {},
            _validation(run / "metrics.jsonl", step) if summary else {},
            {} if evaluation is None else read_evaluation(evaluation),
        )


def read_evaluation(path: str) -> dict[str, Any]:
    """Return the content of the ``evaluation.json`` that ``export.evaluation`` names. ``UserError`` if it is none."""
    file = Path(path) / "evaluation.json" if Path(path).is_dir() else Path(path)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"export.evaluation={path}: {file} cannot be read as an evaluation ({error})") from None
    if not isinstance(found, dict) or not found.keys() & {"ap", "steering", "quality_detail"}:
        raise UserError(f"export.evaluation={path}: {file} is no evaluation: name the run folder of steerlm evaluate")
    return found


def _validation(path: Path, step: int) -> dict[str, float]:
    """Return the numbers of the validation at a step, as ``metrics.jsonl`` has them."""
    out: dict[str, float] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a torn last line
        if isinstance(row, dict) and row.get("step") == step:
            out |= {k.removeprefix("valid/"): v for k, v in row.items() if k.startswith("valid/") and _known(v)}
    return out


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def model_card(opened: OpenedCheckpoint, name: str, family: Family, labels: Labels | None, run: RunFacts) -> str:
    """Return the ``README.md`` of a model that leaves as a folder called ``name``.

    Args:
        labels: of an attribute-prediction model; None for a language model.
        run: what is known of its training beside the checkpoint.
    """
    meta, schema = opened.meta, opened.schema
    base = meta.base.get("trained_from") or meta.base.get("name")
    scores = labels is not None
    shown = schema if scores else opened.conditioned_on
    kind = "attribute-prediction model" if scores else "language model"
    trained = "conditioned on attributes (SteerLM)" if meta.conditioned else "fine-tuned"
    card = {
        "header": _header(meta.base.get("licence", {}), base, scores),
        "name": name,
        "summary": (
            f"An {kind} for SteerLM (arXiv 2310.05344): it predicts {len(shown.names) if shown else 0} attributes of "
            "an assistant's response."
            if scores
            else f"A {kind}, {trained}, made with steerlm_megatron."
        ),
        "facts": [
            ("class in transformers", f"`{family.classifier if scores else family.architecture}`"),
            ("base", f"{f'{base}{_commit(opened, base)}' if base else 'none: trained from scratch'} ({family.name})"),
            ("training", f"{_steps(meta.step)} on {_VIEWS[meta.task]}"),
            ("longest sequence", f"{opened.model_config.max_position} tokens"),
            ("prompt format", f"{opened.template.name}, in the tokenizer's chat template"),
        ],
        "scores": scores,
        "max_level": shown.max_level if shown else 0,
        "attributes": [] if shown is None else _attributes(opened, shown, scores),
        "attributes_are": _attributes_are(scores),
        "code": _score_code(name, labels) if labels is not None else _chat_code(name, shown),
        "usage": _usage(labels, shown),
        "tables": list(_tables(run, scores)),
        "training": list(_training(opened, run)),
        "licences": list(_licences(opened, base)),
        "limits": list(_limits(opened, scores)),
    }
    return render_card(card)


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count:,} steps"


def _commit(opened: OpenedCheckpoint, base: str) -> str:
    """Return which commit of the hub the base was."""
    kept = opened.meta.base
    return f" at {kept['revision'][:12]}" if kept.get("revision") and kept.get("name") == base else ""


def _header(licence: Mapping[str, str], base: str | None, scores: bool) -> str:
    """Return the YAML by which the hub finds a model."""
    out: dict[str, Any] = dict(licence)
    if base and "/" in base:
        out["base_model"] = base
    out |= {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if scores else "text-generation",
        "tags": ["steerlm", "reward-model" if scores else "attribute-conditioned"],
    }
    return yaml.safe_dump(out, sort_keys=False, allow_unicode=True)


def _attributes(opened: OpenedCheckpoint, schema: AttributeSchema, scores: bool) -> list[dict[str, Any]]:
    asked = schema.complete({})
    mean = dict(zip(schema.names, opened.meta.label_mean, strict=False))
    out = []
    for name in schema.names:
        known = mean.get(name)
        level = "" if known is None else f"{known:.2f}"
        if not scores:
            level = str(asked[name]) if name in asked else "left out"
        count = opened.meta.label_counts.get(name)
        nothing = "none: its value means nothing" if scores else "none: it cannot be asked for"
        labels = nothing if name in schema.unseen else f"{count:,}" if count else "unknown"
        meaning = _MEANINGS.get(name.lower().replace("-", "_"), "as in the training data")
        out.append({"name": name, "level": level, "labels": labels, "meaning": meaning})
    return out


def _attributes_are(scores: bool) -> str:
    if scores:
        return "The values are predictions of what the people (or the model) who labelled the training data would say."
    return (
        "An attribute that is not named in `apply_chat_template` has its default, and one that is `None` is not asked "
        "for. The values are whole numbers."
    )


def _score_code(name: str, labels: Labels) -> str:
    added = '\nvalues = values + torch.tensor(model.config.steerlm["head_bias"])' if labels.bias is not None else ""
    return f"""\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForSequenceClassification.from_pretrained("{name}", dtype=torch.float32).eval()
messages = [
    {{"role": "user", "content": "What is the capital of France?"}},
    {{"role": "assistant", "content": "The capital of France is Paris."}},
]
inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
with torch.no_grad():
    values = model(**inputs).logits[0]{added}
print({{model.config.id2label[i]: round(value, 2) for i, value in enumerate(values.tolist())}})
"""


def _chat_code(name: str, schema: AttributeSchema | None) -> str:
    asked = "" if schema is None else "".join(f", {variable(n)}={v}" for n, v in list(schema.complete({}).items())[:2])
    return f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
messages = [{{"role": "user", "content": "What is the capital of France?"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True{asked}
)
out = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def _usage(labels: Labels | None, schema: AttributeSchema | None) -> str:
    if labels is None:
        if schema is None:
            return "In vLLM and SGLang the chat template is found by itself."
        return "vLLM and SGLang take the attributes as `chat_template_kwargs` of a request."
    added = (
        " The class has no place for the head's bias, so it stands in `config.json` and is added in the last line but "
        "one; whoever reads the values elsewhere (vLLM's `/classify`) has to add it there."
        if labels.bias is not None
        else " vLLM gives the same values: `vllm serve FOLDER --runner pooling`, then `/classify`."
    )
    return (
        "The chat template ends with the token at which the values are read, so the last message must be the "
        "assistant's; what follows it is not seen. Values may lie somewhat outside the scale: clamp them to it." + added
    )


def _tables(run: RunFacts, scores: bool) -> Iterable[dict[str, Any]]:
    evaluation = run.evaluation
    if scores and evaluation.get("ap"):
        by_length = any("length_mse" in row for row in evaluation["ap"].values())
        columns = [("mse", "mean squared error"), ("constant_mse", "of the constant")]
        columns += [("length_mse", "of the length")] if by_length else []
        columns += [("pearson", "Pearson"), ("spearman", "Spearman")]
        yield {
            "title": "Evaluation",
            "words": "Against labels that were held out; the constant is the mean of the training labels"
            + (", and the length a predictor that knows a response's length alone." if by_length else "."),
            "columns": ["attribute", *(words for _, words in columns), "labels"],
            "rows": [
                [name, *(_number(row.get(key)) for key, _ in columns), row.get("n", "")]
                for name, row in evaluation["ap"].items()
            ],
        }
    elif scores and (names := [key.removeprefix("mse/") for key in run.valid if key.startswith("mse/")]):
        yield {
            "title": "Evaluation",
            "words": "On the validation set of the training run; the constant is the mean of the training labels.",
            "columns": ["attribute", "mean squared error", "of the constant"],
            "rows": [
                [name, _number(run.valid[f"mse/{name}"]), _number(run.valid.get(f"constant_mse/{name}"))]
                for name in names
            ],
        }
    elif not scores and evaluation.get("steering"):
        yield {
            "title": "Evaluation",
            "words": f"Mean level of the responses that {evaluation.get('judge') or 'a judge'} measured, by the level "
            "that was asked for.",
            "columns": ["attribute", "asked for", "measured", "rank correlation"],
            "rows": [
                [name, _list(row.get("requested")), _list(row.get("measured")), _number(row.get("spearman"))]
                for name, row in evaluation["steering"].items()
            ],
        }
    elif not scores and "loss" in run.valid:
        yield {
            "title": "Evaluation",
            "words": "On the validation set of the training run.",
            "columns": ["measure", "value"],
            "rows": [["loss per token", _number(run.valid["loss"])]],
        }


def _number(value: Any) -> str:
    return f"{value:.3g}" if _known(value) else "not measured"


def _list(values: Any) -> str:
    return ", ".join(map(_number, values)) if isinstance(values, list) else "not measured"


def _training(opened: OpenedCheckpoint, run: RunFacts) -> Iterable[str]:
    meta = opened.meta
    config = meta.config
    data, train, optim = (config.get(key) or {} for key in ("data", "train", "optim"))
    if data.get("input") and data.get("source") in CORPORA:
        yield f"Data: {CORPORA[data['source']][0]}."
    elif data.get("train"):
        paths = data["train"] if isinstance(data["train"], list) else [data["train"]]
        yield f"Data: {', '.join(Path(str(path)).name for path in paths)}."
    else:
        yield "Data: not recorded in this checkpoint."
    counts = run.counts
    if counts.get("samples"):
        yield f"{counts['samples']:,} conversations" + (
            f", {counts['tokens']:,} tokens seen in training." if counts.get("tokens") else "."
        )
    if meta.label_counts:
        yield f"{sum(meta.label_counts.values()):,} labels."
    size = [
        _steps(meta.step),
        f"of {train['global_batch_samples']} conversations" if train.get("global_batch_samples") else "",
        f"learning rate {optim['lr']:g}" if _known(optim.get("lr")) else "",
        f"trained: {train['trainable']}" if train.get("trainable") else "",
        f"precision {config['engine']['precision']}" if (config.get("engine") or {}).get("precision") else "",
    ]
    yield ", ".join(part for part in size if part) + "."
    if package := meta.versions.get("megatron-core"):
        yield f"Made with steerlm_megatron on megatron-core {package}."


def _licences(opened: OpenedCheckpoint, base: str | None) -> Iterable[str]:
    licence, data = opened.meta.base.get("licence", {}), opened.meta.config.get("data") or {}
    if base is None:
        yield "The model was trained from scratch; whoever publishes it says under which licence."
    elif licence.get("license"):
        named = licence.get("license_name") or licence["license"]
        link = f" ({licence['license_link']})" if licence.get("license_link") else ""
        yield f"Base: {base}, under {named}{link}, which holds for this model as well."
    else:
        yield f"Base: {base}, whose licence its folder does not name; it holds for this model as well."
    if data.get("input") and data.get("source") in CORPORA:
        title, name = CORPORA[data["source"]]
        yield f"Data: {title} is published under {name}."
    else:
        yield "Data: its licence is not known here; whoever publishes the model has to find out."


def _limits(opened: OpenedCheckpoint, scores: bool) -> Iterable[str]:
    yield (
        "A label is the opinion of few people (or of a model) on one response. It says nothing of whether facts are "
        "true, and other people would have labelled otherwise."
    )
    if scores:
        yield (
            "Predictions follow what goes along with labels in the training data, such as length or form: compare "
            "them with a predictor that knows the length alone before relying on them."
        )
        yield "A low value of toxicity or of a like attribute is no proof that a response is harmless."
    else:
        yield (
            "A level that is asked for makes such responses more likely, and does not make sure of them. Some "
            "attributes go together in the data, so asking for one moves others."
        )
        yield "Asking for low toxicity, or high correctness, is no filter and no check: test the model for your use."
    if opened.schema is not None and opened.schema.unseen:
        unseen = ", ".join(opened.schema.unseen)
        yield f"No response in training had a label of {unseen}: the model knows nothing of it."
    yield "In languages and on subjects that the training data lacks, labels were never compared with anybody's."
