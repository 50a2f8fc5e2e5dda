"""A Hugging Face folder as the source of a model's weights.

Owns: whether a folder can be read at all, and which bytes of it a rank needs. Does not own: what its names mean
(``tables.py``, ``config_json.py``). Invariant: all that can be wrong is said when the folder is opened, before any
tensor is read; and a rank reads the bytes of its own part, one parameter after the other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from safetensors import safe_open

from steerlm_megatron.config.schema import ModelConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.model.gpt import PackedGPTModel
from steerlm_megatron.model.hf.config_json import model_of
from steerlm_megatron.model.hf.files import Damaged, Stored, tensors_of
from steerlm_megatron.model.hf.labels import Labels, labels_of
from steerlm_megatron.model.hf.multimodal import TEXT_PARTS, text_config, text_tensors
from steerlm_megatron.model.hf.tables import (
    CUSTOM_CLASSIFIERS,
    EMBEDDING,
    FAMILIES,
    HEAD_BIAS,
    HEAD_WEIGHT,
    OUTPUT,
    CustomClassifier,
    Family,
    parameters,
    pieces,
    their_tensors,
)
from steerlm_megatron.model.lora import is_adapter
from steerlm_megatron.model.weights import global_names
from steerlm_megatron.observe.log import get_logger

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCK_BYTES = 64 << 20


def is_hf_folder(path: str | Path) -> bool:
    """Whether a folder holds a model of ``transformers`` (and not a checkpoint of ours, which has a meta.json)."""
    path = Path(path)
    if (path / "meta.json").exists():
        return False
    try:
        return "model_type" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


@dataclass(frozen=True)
class _Part:
    """A rank's part of one parameter: rows of theirs, one below the other, and which columns of them."""

    parameter: torch.nn.Parameter
    rows: tuple[tuple[str, int, int], ...]  # (tensor of theirs, first row, row after the last)
    columns: tuple[int, int] | None
    table: tuple[str, int, int] | None  # embedding or output layer: the same with rows that a file may not have


@dataclass(frozen=True)
class HFFolder:
    """A folder whose model ours can be.

    Attributes:
        key: the configuration key that named it, for messages.
        folder: where it is.
        config: its ``config.json``.
        model: the shape that this describes.
        family: the table of its names.
        vocab_size: rows of its embedding, which may be more than its tokenizer has.
        precision: "bf16", or "fp32" where any matrix is in float32 or float16 (which bf16 would round).
        head: what its output layer is: "lm", a language model's, or "regression", a classifier's.
        labels: a classifier's values; None for a language model.
        custom: the class of a classifier that is none of ``transformers``.
    """

    key: str
    folder: Path
    config: dict[str, Any]
    model: ModelConfig
    family: Family
    vocab_size: int
    precision: str
    head: str
    tensors: dict[str, Stored] = field(repr=False)
    labels: Labels | None = None
    custom: CustomClassifier | None = None
    _means: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: str | Path, key: str) -> HFFolder:
        """Read ``config.json`` and the headers of the weights, and check all that they say.

        Raises:
            UserError: with ``key=path`` first, and everything that is wrong.
        """
        path = Path(path)
        told = f"{key}={path}"
        config, family, head, of_text = _family_of(path, told)
        custom = head if isinstance(head, CustomClassifier) else None
        model, problems = model_of(config, family)
        if head != "lm" and custom is None:
            problems += labels_of(config)[1]
        if problems:
            raise UserError(f"{told}: config.json: {'; '.join(problems)}")
        try:
            tensors = tensors_of(path)
        except Damaged as error:
            raise UserError(f"{told}: {error}") from None
        if of_text:
            tensors, left = text_tensors(tensors)
            kinds = sorted({name.removeprefix("model.").partition(".")[0] for name in left})
            get_logger(__name__).warning(
                "%s: the model sees images as well; %d tensors of %s are left out", told, len(left), " ".join(kinds)
            )
        rows = config.get("vocab_size")
        if not isinstance(rows, int) or rows < 1:
            raise UserError(f"{told}: config.json: vocab_size={rows!r} is not a whole number above 0")
        labels = None if head == "lm" else _labels(config, custom, tensors)
        tensors = _checked(tensors, family, model, rows, told, labels, custom)
        matrices = {stored.dtype for name, stored in tensors.items() if len(stored.shape) > 1}
        precision = "bf16" if matrices == {"BF16"} else "fp32"
        if labels is None:
            out = cls(key, path, config, model, family, rows, precision, "lm", tensors)
            out._check_tie()
            return out
        model = replace(model, head_bias=labels.bias is not None)
        return cls(key, path, config, model, family, rows, precision, "regression", tensors, labels, custom)

    def _check_tie(self) -> None:
        """An output layer beside a tie is fine if it is the embedding once more, and then not read."""
        (output,) = {piece.tensor for piece in pieces(self.family, self.model, OUTPUT, 1)}
        if not self.model.tie_embeddings or output not in self.tensors:
            return
        (embedding,) = {piece.tensor for piece in pieces(self.family, self.model, EMBEDDING, 1)}
        for start, stop in self._blocks(embedding):
            ours, theirs = (self._read(name, start, stop) for name in (embedding, output))
            if ours.dtype != theirs.dtype or not torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)):
                raise UserError(
                    f"{self.key}={self.folder}: config.json says tie_word_embeddings=true, and the files hold a "
                    f"{output} that is not {embedding}; set it to false where the output layer was trained by itself, "
                    f"or leave {output} out"
                )

    def weights(
        self, gpt: PackedGPTModel, vocab_size: int, added: tuple[int, int] = (0, 0)
    ) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        """This rank's part of every parameter in the file's dtype, read when it is asked for.

        Rows of the embedding and of the output layer that the file lacks, those of added control tokens, start as the
        mean of all its rows, and rows beyond ``vocab_size`` are zero. A file with more rows than ``vocab_size`` (tables
        are often padded) keeps them, but for the ids from ``added[0]`` up to ``added[1]``, those of control tokens that
        the tokenizer had not: they start as the mean as well. Parameters of a regression head are left out where the
        folder holds a language model.

        Shapes are read at the call: make it before an engine cuts parameters into partitions.

        Raises:
            UserError: where ``gpt`` is not the model of this folder, or its table is too small for the file's rows.
        """
        parts, problems, constants = [], [], []
        known = self._parameters()
        for name, parameter in global_names(gpt):
            if (name in (HEAD_WEIGHT, HEAD_BIAS) and self.labels is None) or is_adapter(name):
                continue
            name = EMBEDDING if name == OUTPUT and self.model.tie_embeddings else name
            axis, ranges, whole = _split(parameter)
            expected = known.get(name)
            if name in (EMBEDDING, OUTPUT) and expected is not None:
                if whole[0] < self.vocab_size:
                    problems.append(
                        f"{name} has {whole[0]} rows, the file's {self.vocab_size} do not fit; give the model a "
                        f"vocabulary of at least {self.vocab_size}"
                    )
                    continue
                expected = (whole[0], *expected[1:])
            if whole != expected:
                words = "is not in it" if expected is None else f"is {_shape(expected)} in it"
                problems.append(f"{name} {_shape(whole)} {words}")
                continue
            if name == HEAD_BIAS:
                assert self.labels is not None
                constants.append((parameter, torch.tensor(self.labels.bias, dtype=torch.float32)))
                continue
            parts.append(self._part(name, parameter, axis, ranges, whole))
        if problems:
            raise UserError(f"{self.key}={self.folder} is not of the model to be filled: {'; '.join(problems)}")
        return chain(self._values(parts, vocab_size, added), constants)

    def _parameters(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of our unsplit model's parameters that the folder has values for."""
        if self.labels is None:
            return parameters(self.model, self.vocab_size)
        head = {HEAD_WEIGHT: (len(self.labels.names), self.model.hidden_size), HEAD_BIAS: (len(self.labels.names),)}
        if self.labels.bias is None:
            del head[HEAD_BIAS]
        return parameters(replace(self.model, tie_embeddings=True), self.vocab_size) | head

    def _part(
        self,
        name: str,
        parameter: torch.nn.Parameter,
        axis: int,
        ranges: list[tuple[int, int]],
        whole: tuple[int, ...],
    ) -> _Part:
        """Which rows and columns of theirs are ``ranges`` of ``axis`` of the whole parameter."""
        is_table = name in (EMBEDDING, OUTPUT)
        columns, wanted = (ranges[0], [(0, whole[0])]) if axis else (None, ranges)
        rows, at, tensor = [], 0, ""
        for tensor, start, stop in pieces(self.family, self.model, name, self.vocab_size if is_table else whole[0]):
            if name == HEAD_WEIGHT and self.custom is not None:
                tensor = f"{self.custom.head}.weight"
            for low, high in wanted:
                first, last = max(low, at), min(high, at + stop - start)
                if first < last:
                    rows.append((first, tensor, start + first - at, start + last - at))
            at += stop - start
        # Ranges of a rank ascend, so its rows stand in the order of the whole parameter's.
        ordered = tuple((tensor, start, stop) for _, tensor, start, stop in sorted(rows))
        return _Part(parameter, ordered, columns, (tensor, *wanted[0]) if is_table else None)

    def _values(
        self, parts: list[_Part], vocab_size: int, added: tuple[int, int]
    ) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        for part in parts:
            found = [self._read(tensor, start, stop, part.columns) for tensor, start, stop in part.rows]
            if part.table is not None:
                tensor, start, last = part.table
                first = max(start, min(self.vocab_size, last))
                means = max(0, min(last, vocab_size) - first)
                if means:
                    found.append(self._mean(tensor).expand(means, -1))
                if last > first + means:
                    found.append(self._mean(tensor).new_zeros(1).expand(last - first - means, self.model.hidden_size))
            value = found[0] if len(found) == 1 else torch.cat(found)
            if part.table is not None:
                low, high = max(start, added[0]), min(last, added[1])
                if low < high:
                    value = value.clone()
                    value[low - start : high - start] = self._mean(tensor)
            yield part.parameter, value

    def _read(self, tensor: str, start: int, stop: int, columns: tuple[int, int] | None = None) -> torch.Tensor:
        """Rows of a tensor of the file. What is returned is the file, mapped into memory: opened anew each time, it
        counts as this process's memory only as long as it is used.
        """
        with safe_open(self.tensors[tensor].file, framework="pt") as file:
            rows = file.get_slice(self.tensors[tensor].name)
            found: torch.Tensor = rows[start:stop] if columns is None else rows[start:stop, columns[0] : columns[1]]
        return found

    def _blocks(self, tensor: str) -> Iterator[tuple[int, int]]:
        """All rows of a matrix, some megabytes at a time."""
        rows, width = self.tensors[tensor].shape
        step = max(1, _BLOCK_BYTES // (4 * width))
        yield from ((start, min(rows, start + step)) for start in range(0, rows, step))

    def _mean(self, tensor: str) -> torch.Tensor:
        """The mean [1, D] of all rows, summed in float32 and over blocks in float64; read once."""
        if tensor not in self._means:
            total_D = torch.zeros(self.tensors[tensor].shape[1], dtype=torch.float64)
            for start, stop in self._blocks(tensor):
                total_D += self._read(tensor, start, stop).float().sum(0)
            mean_D = total_D / self.tensors[tensor].shape[0]
            self._means[tensor] = mean_D.to(_DTYPES[self.tensors[tensor].dtype])[None]
        return self._means[tensor]


def _split(parameter: torch.nn.Parameter) -> tuple[int, list[tuple[int, int]], tuple[int, ...]]:
    """(axis, this rank's ranges of it, shape of the whole parameter); a parameter that is not split is all of its rows.

    As :func:`steerlm_megatron.model.weights.tensor_parallel_part` cuts it: with a stride, each of so many equal blocks
    (gate, up) on its own.
    """
    shape = list(parameter.shape)
    world, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    if world == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return 0, [(0, shape[0])], tuple(shape)
    axis, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    size = shape[axis] // stride
    ranges = [((rank + world * block) * size, (rank + world * block + 1) * size) for block in range(stride)]
    shape[axis] *= world
    assert axis == 0 or stride == 1
    return axis, ranges, tuple(shape)


def _family_of(path: Path, told: str) -> tuple[dict[str, Any], Family, CustomClassifier | str, bool]:
    """``config.json``, the family that it names, the kind of its output layer (as ``HFFolder.head`` says it, or a class
    that is not one of ``transformers``), and whether they are of a part of the folder's model, its text part; unless it
    is of a kind that we do not read.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{told}: config.json cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{told}: config.json is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{told}: config.json is not an object")
    text = text_config(config, told)
    config = config if text is None else text
    supported = " ".join(family.architecture for family in FAMILIES.values())
    supported += f" (and …ForSequenceClassification of each), {' '.join(CUSTOM_CLASSIFIERS)}"
    supported += f", and the text part of {' '.join(TEXT_PARTS)}"
    names = config.get("architectures")
    custom = CUSTOM_CLASSIFIERS.get(str(names[0])) if isinstance(names, list) and len(names) == 1 else None
    if custom is not None and config.get("model_type") != custom.family:
        custom = None
    if "auto_map" in config and custom is None:
        raise UserError(
            f"{told}: config.json has auto_map: the model is code of its own, which is not run; supported: {supported}"
        )
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            kind = config[key].get("quant_method", "?") if isinstance(config[key], dict) else "?"
            raise UserError(
                f"{told}: config.json has {key} ({kind}): quantised weights are not read; take the folder that they "
                "were made from"
            )
    family = FAMILIES.get(str(config.get("model_type")))
    if family is not None and custom is not None:
        return config, family, custom, False
    names = names or [family.architecture if family else f"model_type={config.get('model_type')}"]
    if family is None or names not in ([family.architecture], [family.classifier]):
        said = " ".join(map(str, names)) if isinstance(names, list) else str(names)
        raise UserError(f"{told}: {said} is not supported; supported: {supported}")
    return config, family, "lm" if names == [family.architecture] else "regression", text is not None


def _labels(config: dict[str, Any], custom: CustomClassifier | None, tensors: dict[str, Stored]) -> Labels:
    """The values of a classifier. Of a class that is not one of ``transformers`` the head's rows say how many."""
    if custom is None:
        return labels_of(config)[0]
    head = tensors.get(f"{custom.head}.weight")
    return labels_of({**config, "problem_type": None}, head.shape[0] if head and head.shape else 1)[0]


def _checked(
    tensors: dict[str, Stored],
    family: Family,
    model: ModelConfig,
    rows: int,
    told: str,
    labels: Labels | None,
    custom: CustomClassifier | None,
) -> dict[str, Stored]:
    """The tensors that the model is made of. ``UserError`` if they are not those that ``config.json`` implies."""
    if labels is not None:  # whatever was an output layer for tokens is not read
        model = replace(model, tie_embeddings=True)
    expected = their_tensors(family, model, rows)
    unread = () if custom is None else custom.beside
    if labels is not None:
        (head,) = {piece.tensor for piece in pieces(family, model, HEAD_WEIGHT, 1)}
        head = head if custom is None else f"{custom.head}.weight"
        expected[head] = (len(labels.names), model.hidden_size)
    tensors = {name: s for name, s in tensors.items() if not any(re.search(pattern, name) for pattern in unread)}
    output = (
        set() if OUTPUT in parameters(model, rows) else {piece.tensor for piece in pieces(family, model, OUTPUT, 1)}
    )
    problems = []
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected and name not in output and not family.unused(name)]
    if missing:
        problems.append(f"tensors that config.json implies are missing: {' '.join(missing)}")
    if extra:
        problems.append(f"tensors that config.json does not imply are there: {' '.join(sorted(extra))}")
    kept = {name: stored for name, stored in tensors.items() if name in expected or name in output}
    for name, stored in kept.items():
        shape = expected.get(name, (rows, model.hidden_size))
        if stored.shape != shape:
            problems.append(f"{name} is {_shape(stored.shape)}, config.json implies {_shape(shape)}")
        if stored.dtype not in _DTYPES:
            problems.append(f"{name} is of type {stored.dtype}; read are {' '.join(_DTYPES)}")
    if problems:
        raise UserError(f"{told}: {'; '.join(problems)}")
    return kept


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
