"""Building the Megatron-Core ``GPTModel`` of a configuration.

Owns: the mapping from ``ModelConfig`` to Megatron-Core, the layer spec. Does not own: what the weights are
(``weights.py``, ``train/checkpoint.py``), data-parallel wrapping and precision (engines).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from steerlm_megatron.config.schema import EngineConfig, ModelConfig, ParallelConfig
from steerlm_megatron.model.arithmetic import padded_vocab_size
from steerlm_megatron.model.attention import PackedAttention
from steerlm_megatron.model.cross_entropy import soft_capped, vocab_parallel_cross_entropy
from steerlm_megatron.model.fused import CompiledGeGLU, CompiledSwiGLU, GeGLU, SwiGLU
from steerlm_megatron.model.lora import Lora, LoraColumn, LoraRow, add_rows
from steerlm_megatron.model.norm import CompiledHeadNorm, CompiledNorm, HeadNorm, NormedResidual, PackedNorm
from steerlm_megatron.model.packed_tokens import CacheShape, PackedTokens, Rotary
from steerlm_megatron.model.regression_head import RegressionHead
from steerlm_megatron.runtime.device import compiles_kernels, device, dtype_of
from steerlm_megatron.runtime.mcore_private import HookedGPTModel, HookedTransformerLayer

_ACTIVATIONS = {"swiglu": F.silu, "geglu": F.gelu, "gelu": F.gelu, "squared_relu": squared_relu}
_GATED = {"swiglu": (SwiGLU, CompiledSwiGLU), "geglu": (GeGLU, CompiledGeGLU)}  # plain, and with engine.compile


class PackedGPTModel(HookedGPTModel):
    """``GPTModel`` that applies its output layer only where an output is wanted (``PackedTokens.output_index_K``).

    With labels of the same K positions it returns their losses [1, K]; without, logits [1, K, V] (or attribute values
    [1, K, A]). ``words`` of its V columns are of the vocabulary, the others pad it.
    """

    post_process: bool
    words: int
    logit_softcap: float | None = None  # of ModelConfig
    compiled: bool = False  # engine.compile, as it was decided

    def before_output(self, hidden_states: torch.Tensor, packed_seq_params: PackedTokens) -> torch.Tensor:
        if self.post_process and self.config.sequence_parallel:
            # The output layer is built for whole sequences (see build_model): what follows is the same on every rank up
            # to its own all-reduce, so here the gradient is split, not summed.
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False
            )
            hidden_states = _wanted(hidden_states, packed_seq_params)  # LastLayer does it otherwise
        return hidden_states

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Labels [1, K] and this rank's logits [K, 1, V / tensor] → losses [1, K] in float32."""
        losses_K = vocab_parallel_cross_entropy(
            logits.squeeze(1), labels.squeeze(0), self.words, self.logit_softcap, self.compiled
        )
        return losses_K.unsqueeze(0)

    def cache_shape(self) -> CacheShape:
        """What generation keeps of a token on this rank."""
        layers = self.decoder.layers
        return CacheShape(
            layers=tuple(layer.layer_number for layer in layers),
            groups=layers[0].self_attention.num_query_groups_per_partition,
            head_dim=layers[0].self_attention.hidden_size_per_attention_head,
            dtype=layers[0].self_attention.linear_qkv.weight.dtype,
        )

    def after_output(self, outputs: torch.Tensor) -> torch.Tensor:
        """Logits [1, K, V] as the model has them; attribute values have no cap."""
        capped = self.logit_softcap is not None and not isinstance(self.output_layer, RegressionHead)
        return soft_capped(outputs, self.logit_softcap) if capped else outputs

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As in Megatron-Core, which on the last stage insists on a vocabulary weight that a regression head does not
        have.
        """
        regression = isinstance(getattr(self, "output_layer", None), RegressionHead)
        self.post_process, last = self.post_process and not regression, self.post_process
        try:
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)
        finally:
            self.post_process = last


def _wanted(hidden_TBD: torch.Tensor, packed: PackedTokens) -> torch.Tensor:
    index_K = packed.output_index_K
    return hidden_TBD if index_K is None else hidden_TBD.index_select(0, index_K)


class LastLayer(HookedTransformerLayer):
    """The model's last layer: after its attention, nothing is computed for positions whose output nobody wants.

    For K of T tokens it saves 1 - K/T of that layer's MLP, forward and backward; the outputs are the same.
    """

    def after_attention(
        self, hidden_states: torch.Tensor, before: torch.Tensor, packed_seq_params: PackedTokens
    ) -> torch.Tensor:
        return _wanted(hidden_states, packed_seq_params)


class ParallelLayer(HookedTransformerLayer):
    """GPT-J's and GPT-NeoX's layer (arXiv 2204.06745 §2.1): x + attention(norm(x)) + MLP(other norm(x)).

    Megatron-Core computes the MLP of x + attention, and adds it to that. What differs is the norm's input alone.
    """

    _before_TBD: torch.Tensor | None = None  # x, from the attention up to the norm

    def after_attention(
        self, hidden_states: torch.Tensor, before: torch.Tensor, packed_seq_params: PackedTokens
    ) -> torch.Tensor:
        self._before_TBD = before
        return hidden_states

    def norm_input(self, hidden_states: torch.Tensor) -> torch.Tensor:
        before_TBD, self._before_TBD = self._before_TBD, None
        assert before_TBD is not None
        return before_TBD


class LastParallelLayer(ParallelLayer):
    """The model's last layer of that kind, as :class:`LastLayer`."""

    def after_attention(
        self, hidden_states: torch.Tensor, before: torch.Tensor, packed_seq_params: PackedTokens
    ) -> torch.Tensor:
        super().after_attention(hidden_states, _wanted(before, packed_seq_params), packed_seq_params)
        return _wanted(hidden_states, packed_seq_params)


_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, engine: EngineConfig, *, per_token_loss: bool = True
) -> TransformerConfig:
    """Megatron-Core's configuration of ``model`` laid out by ``parallel``, run as ``engine`` says."""
    dtype = dtype_of(engine.precision)
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_query_groups or model.num_heads,
        kv_channels=model.head_dim or model.hidden_size // model.num_heads,
        ffn_hidden_size=model.ffn_hidden_size,
        activation_func=_ACTIVATIONS[model.activation],
        gated_linear_unit=model.gated,
        normalization="RMSNorm" if model.norm.startswith("rmsnorm") else "LayerNorm",
        layernorm_zero_centered_gamma=model.one_plus_norms,
        layernorm_epsilon=model.norm_epsilon,
        add_bias_linear=model.bias,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        softmax_scale=None if model.query_pre_attn_scalar is None else model.query_pre_attn_scalar**-0.5,
        window_size=None if model.sliding_window is None else (model.sliding_window - 1, 0),  # before and after itself
        window_attn_skip_freq=[int(i not in model.full_attention_layers) for i in range(model.num_layers)],
        hidden_dropout=model.dropout,
        attention_dropout=model.dropout,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # Interleaved stages exchange both directions at once. Batched, two stages would pair the wrong messages;
        # unbatched, Megatron-Core keeps the directions apart in two groups.
        overlap_p2p_comm=parallel.virtual_pipeline is not None,
        batch_p2p_comm=parallel.virtual_pipeline is None,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=per_token_loss,
        deterministic_mode=False,
        # Megatron-Core marks split parameters in what draws them, so that is called, and draws nothing.
        perform_initialization=True,
        use_cpu_initialization=True,
        init_method_std=model.init_std,
        init_method=_draw_nothing,
        output_layer_init_method=_draw_nothing,
        embedding_init_method=_draw_nothing,
        use_te_activation_func=model.gated,  # Megatron-Core's name for "as the layer spec says"
        # Megatron-Core's fusions need Apex or Transformer Engine kernels; model/fused.py has ours.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **_RECOMPUTE[engine.recompute],
    )


def layer_spec(
    model: ModelConfig,
    engine: EngineConfig,
    config: TransformerConfig,
    last: bool = False,
    lora: Lora | None = None,
) -> ModuleSpec:
    """One transformer layer: Megatron-Core's modules with our core attention (and RoPE in it), norms and gated MLPs.

    Args:
        config: what :func:`transformer_config` makes of ``model``.
        last: compute what follows attention for the positions alone whose output is wanted.
        lora: the adapters of its linear layers; None for none.
    """

    def linear(name: str, plain: Any, adapted: Any) -> Any:
        return adapted.of(lora) if lora is not None and name in lora.targets else plain

    usual, ending = (ParallelLayer, LastParallelLayer) if model.parallel_residual else (TransformerLayer, LastLayer)
    norm, compiled = _norm(engine), _compiles(engine)
    head_norm = (CompiledHeadNorm if compiled else HeadNorm) if model.qk_norm else None
    mlp = MLPSubmodules(
        linear_fc1=linear("linear_fc1", ColumnParallelLinear, LoraColumn),
        linear_fc2=linear("linear_fc2", RowParallelLinear, LoraRow),
    )
    if model.gated:
        mlp.activation_func = _GATED[model.activation][compiled]
    add = get_bias_dropout_add
    if model.post_norms:
        add = ModuleSpec(module=NormedResidual, params={"config": config, "norm": norm})
    return ModuleSpec(
        module=ending if last else usual,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linear("linear_qkv", ColumnParallelLinear, LoraColumn),
                    core_attention=partial(
                        PackedAttention,
                        backend=engine.attention,
                        rotary=Rotary.of(model),
                        local_rotary=Rotary.local(model),
                        softcap=model.attention_softcap,
                        compiled=compiled,
                    ),
                    linear_proj=linear("linear_proj", RowParallelLinear, LoraRow),
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
            mlp_bda=add,
        ),
    )


def _compiles(engine: EngineConfig) -> bool:
    """By itself only where torch.compile has all that it needs on a GPU."""
    return compiles_kernels() if engine.compile is None else engine.compile


def _norm(engine: EngineConfig) -> type[PackedNorm]:
    return CompiledNorm if _compiles(engine) else PackedNorm


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    engine: EngineConfig,
    vocab_size: int,
    attributes: int | None = None,
    vp_stage: int | None = None,
    gather_logits: bool = False,
    where: torch.device | str | None = None,
    lora: Lora | None = None,
) -> PackedGPTModel:
    """This rank's part of the model, whose parameters have no values yet.

    :func:`steerlm_megatron.model.weights.initialize` draws values, or a checkpoint is read into them; what comes after
    depends on neither. Matrices have the dtype of ``engine.precision``, norms and the regression head float32.

    Args:
        vocab_size: of the tokenizer; the embedding has :func:`padded_vocab_size` rows.
        attributes: build the regression head with that many outputs in place of the output layer.
        vp_stage: which of the stages that this rank holds under ``parallel.virtual_pipeline``.
        gather_logits: full-vocabulary logits on every tensor-parallel rank (generation).
        where: the device of the parameters; this process's without it. On ``meta`` they take no memory, which is enough
            for names, shapes and sharding.
        lora: the adapters that the model has beside its weights; None for none.
    """
    config = transformer_config(model, parallel, engine)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    chunks = parallel.virtual_pipeline or 1
    first = stage == 0 and (vp_stage or 0) == 0
    last = stage == parallel.pipeline - 1 and (vp_stage or 0) == chunks - 1
    layer_specs = [layer_spec(model, engine, config, lora=lora)] * get_num_layers_to_build(config, vp_stage)
    if last and not config.sequence_parallel:  # under it a rank has a part of the sequence only
        layer_specs[-1] = layer_spec(model, engine, config, last=True, lora=lora)
    spec = TransformerBlockSubmodules(layer_specs=layer_specs, layer_norm=_norm(engine))
    with torch.device("meta"):
        gpt = PackedGPTModel(
            config=config,
            transformer_layer_spec=spec,  # mcore takes either
            vocab_size=padded_vocab_size(vocab_size, model.vocab_multiple, parallel.tensor),
            max_sequence_length=model.max_position,
            pre_process=first,
            post_process=last,
            parallel_output=not gather_logits,
            share_embeddings_and_output_weights=model.tie_embeddings and attributes is None,
            position_embedding_type="none",
            vp_stage=vp_stage,
        )
        gpt.words = vocab_size
        if last and attributes is not None:
            gpt.output_layer = RegressionHead(config, attributes, model.head_bias)
        if lora is not None:
            add_rows(gpt, lora)
    gpt.logit_softcap, gpt.compiled = model.logit_softcap, _compiles(engine)
    if first and model.scale_embeddings:
        gpt.embedding.register_forward_hook(partial(_scaled, scale=_rounded(math.sqrt(model.hidden_size), config)))
    if last and attributes is None:
        gpt.output_layer.sequence_parallel = False  # PackedGPTModel gathers the sequence itself
        gpt.output_layer.allreduce_dgrad = parallel.tensor > 1
    _allocate(gpt, torch.device(where) if where is not None else device())
    return gpt


def _rounded(number: float, config: TransformerConfig) -> float:
    """In the type of the weights. Gemma was trained with its scale in bf16: 55.5 where √3072 is 55.4256."""
    return float(torch.tensor(number, dtype=config.params_dtype))


def _scaled(module: torch.nn.Module, args: Any, output: torch.Tensor, scale: float) -> torch.Tensor:
    """Take the embedding's output times ``scale`` in its place."""
    return output * scale


def _draw_nothing(parameter: torch.Tensor) -> torch.Tensor:
    """In the place of Megatron-Core's initialisation."""
    return parameter


def _allocate(gpt: torch.nn.Module, where: torch.device) -> None:
    """Give parameters on ``meta`` memory on ``where``. ``Module.to_empty`` would lose what Megatron-Core has noted on
    them (how they are split).
    """
    if where.type == "meta":
        return
    assert not list(gpt.buffers()), "a buffer would have no values either"
    for module in gpt.modules():
        for name, parameter in module.named_parameters(recurse=False):
            allocated = torch.nn.Parameter(torch.empty_like(parameter, device=where), parameter.requires_grad)
            allocated.__dict__.update(parameter.__dict__)
            setattr(module, name, allocated)


def freeze_trunk(gpt: PackedGPTModel) -> None:
    """Leave the output layer alone trainable."""
    for name, parameter in gpt.named_parameters():
        parameter.requires_grad_(name.startswith("output_layer."))
