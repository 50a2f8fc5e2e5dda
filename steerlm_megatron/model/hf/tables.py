"""The families of models that come in and go out: for each one table, read in both directions.

Owns: their names of tensors and of ``config.json`` keys, and how their tensors lie in ours. Does not own: reading and
writing them. Invariant: nothing else in the package knows these names; docs/models.md shows how a family is added.

A rule speaks of modules, so that it holds for weights and for biases: a bias is split and fused as its weight's rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from steerlm_megatron.config.schema import ModelConfig


class Rows(NamedTuple):
    """Rows ``start`` to ``stop`` of the tensor with this number among those that a parameter of ours is made of."""

    tensor: int
    start: int
    stop: int


# From a model and the rows of a parameter of ours: what these rows are, from the first to the last.
Layout = Callable[[ModelConfig, int], list[Rows]]


def whole(model: ModelConfig, rows: int) -> list[Rows]:
    """One tensor, as it is."""
    return [Rows(0, 0, rows)]


def stacked(model: ModelConfig, rows: int) -> list[Rows]:
    """Two tensors one above the other: [gate; up]."""
    return [Rows(0, 0, rows // 2), Rows(1, 0, rows // 2)]


def by_group(model: ModelConfig, rows: int) -> list[Rows]:
    """Queries, keys and values, fused as Megatron-Core has them: of each key/value group its query heads, its key, its
    value.
    """
    _, groups, head, per_group = heads(model)
    out = []
    for group in range(groups):
        out.append(Rows(0, group * per_group * head, (group + 1) * per_group * head))
        out += [Rows(tensor, group * head, (group + 1) * head) for tensor in (1, 2)]
    return out


def heads(model: ModelConfig) -> tuple[int, int, int, int]:
    """(query heads, key/value heads, width of a head, query heads of a key/value head)."""
    groups = model.num_query_groups or model.num_heads
    return model.num_heads, groups, model.head_dim or model.hidden_size // model.num_heads, model.num_heads // groups


@dataclass(frozen=True)
class Rule:
    """A module of ours and those of theirs that its parameters are made of; ``{}`` stands for a layer's number."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = whole


@dataclass(frozen=True)
class Family:
    """One kind of model of ``transformers``.

    Args:
        name: its ``model_type``.
        architecture: the class with the output layer of a language model.
        rules: all modules with parameters, in the order of ``transformers``.
        fields: their keys of ``config.json`` and our fields of ``ModelConfig``, where a number is the same in both.
        fixed: fields of ``ModelConfig`` that the family says by itself.
        needs: keys of ``config.json`` with the values that we can represent, first the one that a folder without the
            key has.
        defaults: what a folder without a key of ``fields`` has; keys that are not here must be there.
        biases: keys that say whether groups of linear layers have biases; ``ModelConfig`` has one for all.
        rotary_percent: the share of a head that RoPE turns where ``config.json`` does not say it; None: always all.
        rotary_keys: its keys for RoPE's base and share outside ``rope_parameters``.
        rotary_base: RoPE's base where ``config.json`` does not say it.
        rotary_local: its key for the base in layers with a sliding window, and what it is without the key; None: all
            layers have one RoPE.
        sliding_window: "no" such key; of "all" layers; of the layers that ``layer_types`` names, and then "by type", or
            only "if used" (``use_sliding_window``).
        full_every: "by type", without ``layer_types``: its key for the number of layers of which the last one sees all
            ("": it has none), and that number without the key.
        without_values: tensors (as regular expressions) that old files hold and nothing needs, such as RoPE's tables.
    """

    name: str
    architecture: str
    rules: tuple[Rule, ...]
    fields: Mapping[str, str]
    fixed: Mapping[str, Any]
    needs: Mapping[str, tuple[Any, ...]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    rotary_percent: float | None = None
    rotary_keys: tuple[str, str] = ("rope_theta", "partial_rotary_factor")
    rotary_base: float = 10000.0
    rotary_local: tuple[str, float] | None = None
    sliding_window: str = "no"
    full_every: tuple[str, int] = ("", 1)
    without_values: tuple[str, ...] = (r"\.rotary_emb\.inv_freq$",)

    def rule(self, module: str) -> tuple[Rule, str]:
        """The rule of a module of ours, and its layer's number ("" outside layers)."""
        found = re.match(r"decoder\.layers\.(\d+)\.", module)
        number = found[1] if found else ""
        general = module.replace(f".{number}.", ".{}.", 1) if found else module
        return next(rule for rule in self.rules if rule.ours == general), number

    def unused(self, tensor: str) -> bool:
        """Whether a tensor of a file is one that nothing needs."""
        return any(re.search(pattern, tensor) for pattern in self.without_values)


class Piece(NamedTuple):
    """Rows ``start`` to ``stop`` of a tensor of theirs."""

    tensor: str
    start: int
    stop: int


def pieces(family: Family, model: ModelConfig, name: str, rows: int) -> list[Piece]:
    """What the ``rows`` rows of a parameter of our unsplit model are in a file, from the first to the last."""
    module, leaf = name.rsplit(".", 1)
    rule, number = family.rule(module)
    names = [f"{theirs.replace('{}', number)}.{leaf}" for theirs in rule.theirs]
    return [Piece(names[tensor], start, stop) for tensor, start, stop in rule.layout(model, rows)]


EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def parameters(model: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters of our unsplit language model with so many rows of the embedding."""
    num_heads, groups, head, _ = heads(model)
    hidden, queries = model.hidden_size, num_heads * head
    norm_bias, qkv_bias = not model.norm.startswith("rmsnorm"), model.bias or model.qkv_bias
    fc1_rows = model.ffn_hidden_size * (2 if model.gated else 1)
    out: dict[str, tuple[int, ...]] = {EMBEDDING: (vocab_size, hidden)}

    def add(module: str, shape: tuple[int, ...], bias: bool) -> None:
        out[f"{module}.weight"] = shape
        if bias:
            out[f"{module}.bias"] = shape[:1]

    for number in range(model.num_layers):
        layer = f"decoder.layers.{number}"
        add(f"{layer}.input_layernorm", (hidden,), norm_bias)
        add(f"{layer}.self_attention.linear_qkv", (queries + 2 * groups * head, hidden), qkv_bias)
        if model.qk_norm:
            add(f"{layer}.self_attention.q_layernorm", (head,), norm_bias)
            add(f"{layer}.self_attention.k_layernorm", (head,), norm_bias)
        add(f"{layer}.self_attention.linear_proj", (hidden, queries), model.bias)
        if model.post_norms:
            add(f"{layer}.self_attn_bda.norm", (hidden,), norm_bias)
        add(f"{layer}.pre_mlp_layernorm", (hidden,), norm_bias)
        add(f"{layer}.mlp.linear_fc1", (fc1_rows, hidden), model.bias)
        add(f"{layer}.mlp.linear_fc2", (hidden, model.ffn_hidden_size), model.bias)
        if model.post_norms:
            add(f"{layer}.mlp_bda.norm", (hidden,), norm_bias)
    add("decoder.final_layernorm", (hidden,), norm_bias)
    if not model.tie_embeddings:
        out[OUTPUT] = (vocab_size, hidden)
    return out


def their_tensors(family: Family, model: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a folder, in the order of ``transformers``."""
    out: dict[str, tuple[int, ...]] = {}
    for name, shape in in_their_order(family, parameters(model, vocab_size)):
        for tensor, _, stop in pieces(family, model, name, shape[0]):
            rows = out.get(tensor, (0,))[0]
            out[tensor] = (max(rows, stop), *shape[1:])
    return out


def in_their_order(family: Family, ours: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Items of a mapping from our parameters' names, in the order of the rules, layer by layer."""
    place = {rule.ours: number for number, rule in enumerate(family.rules)}
    first_layer = min(at for module, at in place.items() if "{}" in module)

    def key(name: str) -> tuple[int, int, int]:
        rule, number = family.rule(name.rsplit(".", 1)[0])
        at = place[rule.ours]
        if number:
            return 1, int(number), at
        return (0 if at < first_layer else 2), 0, at

    yield from sorted(ours.items(), key=lambda item: key(item[0]))


_QK_NORMS = tuple(
    Rule(f"decoder.layers.{{}}.self_attention.{x}_layernorm", (f"model.layers.{{}}.self_attn.{x}_norm",)) for x in "qk"
)


def _llama_rules(*more: Rule, gated: bool = True, post_norms: bool = False) -> tuple[Rule, ...]:
    """The modules of the Llama kind; ``more`` are of attention, after its projections. ``post_norms``: sandwich norms
    as Gemma names them, where ``post_attention_layernorm`` is one of them.
    """
    ours, theirs = "decoder.layers.{}", "model.layers.{}"
    projections = tuple(f"{theirs}.self_attn.{name}_proj" for name in "qkv")
    mlp = (f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj") if gated else (f"{theirs}.mlp.up_proj",)
    norms: tuple[Rule, ...] = (Rule(f"{ours}.pre_mlp_layernorm", (f"{theirs}.post_attention_layernorm",)),)
    if post_norms:
        norms = (
            Rule(f"{ours}.self_attn_bda.norm", (f"{theirs}.post_attention_layernorm",)),
            Rule(f"{ours}.pre_mlp_layernorm", (f"{theirs}.pre_feedforward_layernorm",)),
            Rule(f"{ours}.mlp_bda.norm", (f"{theirs}.post_feedforward_layernorm",)),
        )
    return (
        Rule("embedding.word_embeddings", ("model.embed_tokens",)),
        Rule(f"{ours}.self_attention.linear_qkv", projections, by_group),
        Rule(f"{ours}.self_attention.linear_proj", (f"{theirs}.self_attn.o_proj",)),
        *more,
        Rule(f"{ours}.mlp.linear_fc1", mlp, stacked if gated else whole),
        Rule(f"{ours}.mlp.linear_fc2", (f"{theirs}.mlp.down_proj",)),
        Rule(f"{ours}.input_layernorm", (f"{theirs}.input_layernorm",)),
        *norms,
        Rule("decoder.final_layernorm", ("model.norm",)),
        Rule("output_layer", ("lm_head",)),
    )


SHAPE = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "head_dim",
    "intermediate_size": "ffn_hidden_size",
    "max_position_embeddings": "max_position",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
}
_RMS = {**SHAPE, "rms_norm_eps": "norm_epsilon"}
_ABSENT = {"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False, "initializer_range": 0.02}
_RMS_ABSENT = {**_ABSENT, "rms_norm_eps": 1e-6}
# What no family of the Llama kind has unless it says so.
_NONE = {
    "qkv_bias": False,
    "qk_norm": False,
    "parallel_residual": False,
    "post_norms": False,
    "scale_embeddings": False,
    "query_pre_attn_scalar": None,
    "attention_softcap": None,
    "logit_softcap": None,
}
_PLAIN = {"activation": "swiglu", "norm": "rmsnorm", "bias": False, **_NONE}
_LLAMA = {key: value for key, value in _PLAIN.items() if key != "bias"}
_SILU = {"hidden_act": ("silu", "swish")}

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    _llama_rules(),
    _RMS,
    fixed=_LLAMA,
    needs=_SILU,
    defaults=_RMS_ABSENT,
    biases=("attention_bias", "mlp_bias"),
)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    _llama_rules(),
    _RMS,
    fixed=_PLAIN,
    needs=_SILU,
    defaults={**_RMS_ABSENT, "num_key_value_heads": 8, "sliding_window": 4096},
    sliding_window="all",
)
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    _llama_rules(),
    _RMS,
    fixed={**_PLAIN, "qkv_bias": True},
    needs=_SILU,
    defaults=_RMS_ABSENT,
    sliding_window="if used",
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    _llama_rules(*_QK_NORMS),
    _RMS,
    fixed={**_PLAIN, "qk_norm": True},
    needs={**_SILU, "attention_bias": (False,)},
    defaults={**_RMS_ABSENT, "head_dim": 128},
    sliding_window="if used",
)
NEMOTRON = Family(
    "nemotron",
    "NemotronForCausalLM",
    _llama_rules(gated=False),
    {**SHAPE, "norm_eps": "norm_epsilon"},
    fixed={"activation": "squared_relu", "norm": "layernorm1p", **_NONE},
    needs={"hidden_act": ("relu2",)},
    defaults={**_ABSENT, "norm_eps": 1e-5, "initializer_range": 0.0134},
    biases=("attention_bias", "mlp_bias"),
    rotary_percent=0.5,
)
_NEOX, _NEOX_LAYER = "gpt_neox", "gpt_neox.layers.{}"
GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    (
        Rule("embedding.word_embeddings", (f"{_NEOX}.embed_in",)),
        Rule("decoder.layers.{}.input_layernorm", (f"{_NEOX_LAYER}.input_layernorm",)),
        Rule("decoder.layers.{}.pre_mlp_layernorm", (f"{_NEOX_LAYER}.post_attention_layernorm",)),
        # Fused by head as ours, since every head has a key and a value of its own.
        Rule("decoder.layers.{}.self_attention.linear_qkv", (f"{_NEOX_LAYER}.attention.query_key_value",)),
        Rule("decoder.layers.{}.self_attention.linear_proj", (f"{_NEOX_LAYER}.attention.dense",)),
        Rule("decoder.layers.{}.mlp.linear_fc1", (f"{_NEOX_LAYER}.mlp.dense_h_to_4h",)),
        Rule("decoder.layers.{}.mlp.linear_fc2", (f"{_NEOX_LAYER}.mlp.dense_4h_to_h",)),
        Rule("decoder.final_layernorm", (f"{_NEOX}.final_layer_norm",)),
        Rule("output_layer", ("embed_out",)),
    ),
    {
        **{key: ours for key, ours in SHAPE.items() if key not in ("num_key_value_heads", "head_dim")},
        "layer_norm_eps": "norm_epsilon",
        "use_parallel_residual": "parallel_residual",
    },
    fixed={
        **{key: value for key, value in _NONE.items() if key != "parallel_residual"},
        "activation": "gelu",
        "norm": "layernorm",
        "bias": True,
        "num_query_groups": None,
        "head_dim": None,
    },
    needs={"hidden_act": ("gelu",), "attention_bias": (True,)},
    defaults={**_ABSENT, "layer_norm_eps": 1e-5, "use_parallel_residual": True},
    rotary_percent=0.25,
    rotary_keys=("rotary_emb_base", "rotary_pct"),
    without_values=(r"\.rotary_emb\.inv_freq$", r"\.attention\.(masked_)?bias$"),
)

_GEMMA = {
    **_PLAIN,
    "activation": "geglu",
    "norm": "rmsnorm1p",
    "post_norms": True,
    "scale_embeddings": True,
}
_GEMMA_NEEDS: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "use_bidirectional_attention": (False, None),
}
_GEMMA_ABSENT = {
    **_RMS_ABSENT,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    _llama_rules(post_norms=True),
    {
        **_RMS,
        "query_pre_attn_scalar": "query_pre_attn_scalar",
        "attn_logit_softcapping": "attention_softcap",
        "final_logit_softcapping": "logit_softcap",
    },
    fixed={key: value for key, value in _GEMMA.items() if not key.endswith(("softcap", "scalar"))},
    needs=_GEMMA_NEEDS,
    defaults={**_GEMMA_ABSENT, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    sliding_window="by type",
    full_every=("", 2),
)
GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    _llama_rules(*_QK_NORMS, post_norms=True),
    {**_RMS, "query_pre_attn_scalar": "query_pre_attn_scalar", "final_logit_softcapping": "logit_softcap"},
    fixed={key: value for key, value in _GEMMA.items() if key not in ("logit_softcap", "query_pre_attn_scalar")}
    | {"qk_norm": True},
    # transformers has a key for the cap of scores, and does not obey it.
    needs={**_GEMMA_NEEDS, "attn_logit_softcapping": (None,)},
    defaults={**_GEMMA_ABSENT, "final_logit_softcapping": None},
    rotary_base=1e6,
    rotary_local=("rope_local_base_freq", 10000.0),
    sliding_window="by type",
    full_every=("sliding_window_pattern", 6),
)

# In the order in which a model of ours looks for the family that it leaves as.
FAMILIES = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, NEMOTRON, GPT_NEOX, GEMMA2, GEMMA3)}
