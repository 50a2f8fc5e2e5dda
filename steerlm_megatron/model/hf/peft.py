"""Adapters in the format of the ``peft`` package: ``adapter_config.json`` and ``adapter_model.safetensors``.

Owns: reading such a folder together with its base, as one model or as base and adapter; writing one. Does not own: the
layers that train adapters (``model/lora.py``), the base's files (``folder.py``).
Invariant: what comes in computes what ``peft`` computes, and what cannot is refused by its key before any work.

Theirs are adapters of q_proj, k_proj and v_proj, ours is one of the fused layer. Ours leaves as copies of A for the
three, with the rows of B that are theirs. Theirs come in with A's one above the other, as many as differ, and each B in
the columns of its A: the rank grows, and the product is the same.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from safetensors import safe_open
from safetensors.torch import save_file

from steerlm_megatron.config.schema import ModelConfig
from steerlm_megatron.config.training import LORA_TARGETS
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import move_into_place, write_json_atomic
from steerlm_megatron.model.gpt import PackedGPTModel
from steerlm_megatron.model.hf.files import Damaged, header_of
from steerlm_megatron.model.hf.folder import HFFolder
from steerlm_megatron.model.hf.tables import EMBEDDING, OUTPUT, Family, pieces, their_tensors
from steerlm_megatron.model.lora import Lora, initial_std
from steerlm_megatron.model.weights import global_names, tensor_parallel_part

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_A, _B, _TOKENS = ".lora_A.weight", ".lora_B.weight", ".token_adapter.trainable_tokens_delta"
# What changes the product of A and B, or the weights that it is added to: key, and the values that we can represent.
_NEEDS: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "use_qalora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "megatron_config": (None, {}),
}
_CHANGES_THE_BASE = ("pissa", "olora", "loftq", "corda")


def is_peft_folder(path: str | Path) -> bool:
    """Whether a folder holds an adapter of ``peft``."""
    try:
        return "peft_type" in json.loads((Path(path) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def base_of(path: Path) -> str | None:
    """What ``adapter_config.json`` says that the adapter's base is."""
    said = json.loads((path / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    return said if isinstance(said, str) and said else None


@dataclass(frozen=True)
class PeftFolder(HFFolder):
    """An adapter's folder and its base's. As an ``HFFolder`` it is the model with the adapter merged.

    Attributes:
        base: the base's folder.
        lora: what our adapters have to be like to hold these.
        in_one_piece: whether all that differs from the base is what ``lora`` trains.
        modules: of our modules the adapters of theirs, by their number in the family's rule: (A [r, in], B [out, r]).
        tables: of embedding and output layer the rows that the adapter's folder has, and their ids.
    """

    base: HFFolder = field(kw_only=True)
    lora: Lora = field(kw_only=True)
    in_one_piece: bool = field(kw_only=True)
    modules: dict[str, dict[int, tuple[torch.Tensor, torch.Tensor]]] = field(kw_only=True, repr=False)
    tables: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(kw_only=True, repr=False)

    @classmethod
    def open_adapter(cls, path: str | Path, key: str, base: HFFolder) -> PeftFolder:
        """Read an adapter of ``base``, whose matrices are small enough to be held.

        Raises:
            UserError: with ``key=path`` first, and everything that is wrong.
        """
        path = Path(path)
        told = f"{key}={path}"
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        rank, scale, problems = _scale(config)
        try:
            stored = _tensors(path)
        except Damaged as error:
            raise UserError(f"{told}: {error}") from None
        modules, tables, more = _sorted(stored, base, config)
        if problems := [*problems, *more]:
            raise UserError(f"{told}: {'; '.join(problems)}")
        rank *= max((len(_distinct(found)) for found in modules.values()), default=1)
        targets = tuple(name for name in LORA_TARGETS if any(module.endswith(f".{name}") for module in modules))
        rows, in_one_piece = _rows(tables, base.vocab_size)
        lora = Lora(rank, scale * rank, targets or LORA_TARGETS, float(config.get("lora_dropout") or 0.0), rows)
        vocab_size = max([base.vocab_size, *(int(ids.max()) + 1 for ids, _ in tables.values())])
        folder = path if (path / "tokenizer.json").is_file() else base.folder
        return cls(
            key, folder, base.config, base.model, base.family, vocab_size, base.precision, base.head, base.tensors,
            base=base, lora=lora, in_one_piece=in_one_piece, modules=modules, tables=tables,
        )  # fmt: skip

    def weights(
        self, gpt: PackedGPTModel, vocab_size: int, added: tuple[int, int] = (0, 0)
    ) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        """As :meth:`HFFolder.weights`, with the adapter added in float32."""
        names = {id(parameter): name for name, parameter in global_names(gpt)}
        for parameter, value in self._base_weights(gpt, vocab_size, added):
            module = names[id(parameter)].removesuffix(".weight")
            if module in self.modules and parameter.dim() > 1:
                a, b = self.factors(module)
                axis = getattr(parameter, "partition_dim", 0)
                a, b = (a, tensor_parallel_part(b, parameter)) if axis == 0 else (tensor_parallel_part(a, parameter), b)
                value = value.float() + self.lora.scale * (b @ a)
            yield parameter, value

    def apart(
        self, gpt: PackedGPTModel, vocab_size: int, added: tuple[int, int] = (0, 0)
    ) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        """The base's weights, and the adapter's for the adapters of ``gpt``, which are those of :attr:`lora`."""
        halves = []
        for name, parameter in global_names(gpt):
            module, _, leaf = name.rpartition(".")
            if module in self.modules and leaf in ("lora_a", "lora_b"):
                halves.append((parameter, module, leaf == "lora_b"))
        yield from self._base_weights(gpt, vocab_size, added)
        for parameter, module, is_b in halves:
            yield parameter, tensor_parallel_part(self.factors(module)[is_b], parameter)

    def factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, in] and B [out, rank] of one of our modules, in float32, of the unsplit model. What their rank falls
        short of ours starts as new adapters do.
        """
        found = self.modules[module]
        distinct = _distinct(found)
        rank = self.lora.rank
        a = torch.cat([distinct[number].float() for number in range(len(distinct))])
        if len(a) < rank:
            more = torch.empty(rank - len(a), a.shape[1])
            generator = torch.Generator().manual_seed(zlib.crc32(module.encode()))
            a = torch.cat([a, more.normal_(0.0, initial_std(a.shape), generator=generator)])
        rule, number = self.family.rule(module)
        names = [f"{theirs.replace('{}', number)}.weight" for theirs in rule.theirs]
        shapes = their_tensors(self.family, self.model, 1)
        b = torch.zeros(sum(shapes[name][0] for name in names), rank)
        at = 0
        for piece in pieces(self.family, self.model, f"{module}.weight", len(b)):
            which, stop = names.index(piece.tensor), at + piece.stop - piece.start
            if which in found:
                theirs_a, theirs_b = found[which]
                block = next(i for i, known in enumerate(distinct) if torch.equal(known, theirs_a))
                columns = slice(block * len(theirs_a), (block + 1) * len(theirs_a))
                b[at:stop, columns] = theirs_b[piece.start : piece.stop].float()
            at = stop
        return a, b

    def _base_weights(
        self, gpt: PackedGPTModel, vocab_size: int, added: tuple[int, int]
    ) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        """The base's, with the rows that the adapter's folder has."""
        names = {id(parameter): name for name, parameter in global_names(gpt)}
        rank = parallel_state.get_tensor_model_parallel_rank()
        for parameter, value in self.base.weights(gpt, vocab_size, added):
            name = names[id(parameter)]
            name = EMBEDDING if name == OUTPUT and self.model.tie_embeddings else name
            if name in self.tables:
                ids, rows = self.tables[name]
                start = rank * len(value)
                here = (ids >= start) & (ids < start + len(value))
                value = value.to(torch.promote_types(value.dtype, rows.dtype), copy=True)
                value[ids[here] - start] = rows[here].to(value.dtype)
            yield parameter, value


def _distinct(found: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """The A's of a module that differ, in the order of theirs."""
    out: list[torch.Tensor] = []
    for _, (a, _) in sorted(found.items()):
        if not any(torch.equal(a, known) for known in out):
            out.append(a)
    return out


def _scale(config: Mapping[str, Any]) -> tuple[int, float, list[str]]:
    """Their rank, what A and B are multiplied by, and what of the configuration cannot be represented."""
    kind = config.get("peft_type")
    if kind != "LORA":
        return 1, 1.0, [f"{CONFIG}: peft_type={kind} is not read; read is LORA"]
    problems = [
        f"{CONFIG}: {key}={json.dumps(config[key])} is not one that can be read: {json.dumps(legal[0])}"
        for key, legal in _NEEDS.items()
        if key in config and config[key] not in legal
    ]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        problems.append(
            f"{CONFIG}: init_lora_weights={start} has changed the base's weights; convert it with peft first"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        return 1, 1.0, [*problems, f"{CONFIG}: r={rank} and lora_alpha={alpha} are not the numbers of an adapter"]
    return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank), problems


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    if not (path / WEIGHTS).is_file():
        pickled = (path / "adapter_model.bin").is_file()
        raise Damaged(
            f"there is no {WEIGHTS}"
            + ("; adapter_model.bin is a pickle, which may run code when it is read" if pickled else "")
        )
    names = header_of(path / WEIGHTS)
    with safe_open(path / WEIGHTS, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}


def _sorted(
    stored: Mapping[str, torch.Tensor], base: HFFolder, config: Mapping[str, Any]
) -> tuple[
    dict[str, dict[int, tuple[torch.Tensor, torch.Tensor]]], dict[str, tuple[torch.Tensor, torch.Tensor]], list[str]
]:
    """Tensors of an adapter by our modules, rows of tables, and what is wrong."""
    shapes = their_tensors(base.family, base.model, base.vocab_size)
    places = _places(base.family, base.model)
    modules: dict[str, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}
    tables: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    problems, strange = [], []
    for name, tensor in stored.items():
        module = name.removeprefix(_PREFIX)
        if module.endswith(_A):
            module = module.removesuffix(_A)
            other = stored.get(f"{_PREFIX}{module}{_B}")
            ours, number = places.get(module, ("", 0))
            if not ours.endswith(LORA_TARGETS):
                strange.append(name)
                continue
            rows, columns = shapes[f"{module}.weight"]
            rank = config.get("r")
            if other is None or tensor.shape != (rank, columns) or other.shape != (rows, rank):
                problems.append(f"{module} has no A [{rank}, {columns}] with a B [{rows}, {rank}]")
                continue
            modules.setdefault(ours, {})[number] = (tensor, other)
        elif module.endswith(_TOKENS):
            ours = places.get(module.removesuffix(_TOKENS), ("", 0))[0]
            ids = _token_ids(config, module.removesuffix(_TOKENS))
            if f"{ours}.weight" not in (EMBEDDING, OUTPUT) or tensor.shape != (len(ids), base.model.hidden_size):
                problems.append(f"{name} {list(tensor.shape)} is not of trainable_token_indices in {CONFIG}")
                continue
            tables[f"{ours}.weight"] = (torch.tensor(ids, dtype=torch.long), tensor)
        elif module.endswith(".weight") and f"{places.get(module.removesuffix('.weight'), ('', 0))[0]}.weight" in (
            EMBEDDING,
            OUTPUT,
        ):
            ours = places[module.removesuffix(".weight")][0]
            tables[f"{ours}.weight"] = (torch.arange(len(tensor)), tensor)
        elif not (module.endswith(_B) and f"{_PREFIX}{module.removesuffix(_B)}{_A}" in stored):
            strange.append(name)
    if strange:
        linear = sorted(
            {theirs.rpartition(".")[2] for theirs, (ours, _) in places.items() if ours.endswith(LORA_TARGETS)}
        )
        problems.append(
            f"{WEIGHTS} has {' '.join(sorted(strange)[:5])}{' …' if len(strange) > 5 else ''}; read are adapters of "
            f"{' '.join(linear)}, trained tokens, and the tables of embedding and output layer"
        )
    if base.model.tie_embeddings and OUTPUT in tables:
        table = tables.pop(OUTPUT)
        if EMBEDDING not in tables or not torch.equal(table[1], tables[EMBEDDING][1]):
            problems.append("the base's output layer is its embedding, and the adapter has another one for it")
    return modules, tables, problems


def _places(family: Family, model: ModelConfig) -> dict[str, tuple[str, int]]:
    """Their modules: ours that each is a part of, and the part's number in the rule."""
    out = {}
    for rule in family.rules:
        for layer in range(model.num_layers) if "{}" in rule.ours else (0,):
            for number, theirs in enumerate(rule.theirs):
                out[theirs.replace("{}", str(layer))] = (rule.ours.replace("{}", str(layer)), number)
    return out | {theirs: out[name] for name, theirs in family.in_memory.items()}


def _token_ids(config: Mapping[str, Any], module: str) -> list[int]:
    said = config.get("trainable_token_indices") or []
    if isinstance(said, Mapping):
        said = next((ids for name, ids in said.items() if module == name or module.endswith(f".{name}")), [])
    return [int(number) for number in said]


def _rows(tables: Mapping[str, tuple[torch.Tensor, torch.Tensor]], vocab_size: int) -> tuple[tuple[int, int], bool]:
    """The range of rows that an adapter trained, and whether it is all that it changed in tables."""
    if not tables:
        return (0, 0), True
    first, last = (end([int(end(ids.tolist())) for ids, _ in tables.values()]) for end in (min, max))
    whole = all(ids.tolist() == list(range(first, last + 1)) for ids, _ in tables.values())
    return ((first, last + 1), True) if whole and first > 0 else ((0, 0), False)


# ---- out


def adapter_tensors(
    family: Family, model: ModelConfig, adapters: Mapping[str, torch.Tensor], tables: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What ``adapter_model.safetensors`` holds.

    Args:
        adapters: A and B of every layer by our names, of the unsplit model.
        tables: by our names of embedding and output layer the rows that are trained, as the model has them.
    """
    out: dict[str, torch.Tensor] = {}
    for name, value in adapters.items():
        module, _, leaf = name.rpartition(".")
        rule, number = family.rule(module)
        names = [theirs.replace("{}", number) for theirs in rule.theirs]
        if leaf == "lora_a":
            out |= {f"{_PREFIX}{theirs}{_A}": value.clone() for theirs in names}
            continue
        parts: dict[str, list[torch.Tensor]] = {}
        at = 0
        for piece in pieces(family, model, f"{module}.weight", len(value)):
            parts.setdefault(piece.tensor, []).append(value[at : at + piece.stop - piece.start])
            at += piece.stop - piece.start
        out |= {f"{_PREFIX}{tensor.removesuffix('.weight')}{_B}": torch.cat(rows) for tensor, rows in parts.items()}
    for name, rows in tables.items():
        out[f"{_PREFIX}{_module(family, name)}{_TOKENS}"] = rows.clone()
    return out


def _module(family: Family, table: str) -> str:
    """The name of a table's module in memory."""
    name = family.rule(table.removesuffix(".weight"))[0].theirs[0]
    return family.in_memory.get(name, name)


def adapter_config(
    family: Family, lora: Lora, base: str, tables: Sequence[str], ids: tuple[int, int], revision: str | None = None
) -> dict[str, Any]:
    """``adapter_config.json`` of what :func:`adapter_tensors` gives."""
    rules = [rule for rule in family.rules if rule.ours.endswith(tuple(f".{name}" for name in lora.targets))]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": sorted({name.rpartition(".")[2] for rule in rules for name in rule.theirs}),
        "modules_to_save": None,
        "trainable_token_indices": {_module(family, name).rpartition(".")[2]: list(range(*ids)) for name in tables}
        or None,
    }


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write an adapter into an existing folder, its configuration last."""
    temporary = folder / f".{WEIGHTS}.tmp"
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata={"format": "pt"})
        move_into_place(temporary, folder / WEIGHTS)
    finally:
        temporary.unlink(missing_ok=True)
    write_json_atomic(folder / CONFIG, dict(config))
