"""What the parameters of a model start from, and their names in the model that is not split.

Owns: the draw of initial weights. Does not own: weights from elsewhere (``train/checkpoint.py``), how an engine takes
them (``train/engine.py``). Invariant: an initial weight is a function of (seed, parameter name) alone, so every layout
starts from the same model.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from steerlm_megatron.config.schema import ModelConfig
from steerlm_megatron.model.gpt import PackedGPTModel
from steerlm_megatron.model.lora import initial_std, is_adapter

HEAD = "output_layer."
REGRESSION_HEAD = "output_layer.regression."
_AHEAD_BYTES = 2 << 30  # of a rank's host memory
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def global_names(gpt: GPTModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters with the names they have in the unsplit model: layer numbers count from the model's first layer."""
    numbers = {f"decoder.layers.{i}.": layer.layer_number - 1 for i, layer in enumerate(gpt.decoder.layers)}
    for name, parameter in gpt.named_parameters():
        for local, number in numbers.items():
            if name.startswith(local):
                name = f"decoder.layers.{number}.{name[len(local) :]}"
                break
        yield name, parameter


def tensor_parallel_part(full: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """This tensor-parallel rank's part of a whole parameter, or all of ``full`` where ``parameter`` is not split."""
    world, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    if world == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return full
    axis, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    # A gated layer stores [gate; up]: stride 2, each half split on its own.
    return torch.cat(full.chunk(world * stride, dim=axis)[rank::world], dim=axis)


def initial_weights(
    gpt: PackedGPTModel,
    model: ModelConfig,
    vocab_size: int,
    seed: int,
    head_bias_A: torch.Tensor | None = None,
    within: str = "",
) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Each parameter of this rank with the float32 values that it starts from, on the CPU, drawn a few ahead of
    what is asked for.

    Matrices are N(0, init_std²), the projections into the residual stream N(0, init_std² / 2L) (GPT-2's rule, as in
    Megatron-LM). Norms start as the identity, biases at zero, and so do the embedding rows beyond ``vocab_size`` and
    the weights of a regression head: before training it predicts its bias, ``head_bias_A`` (float32 [A]; zero without
    it). An adapter starts with B = 0, trained rows as differences of zero (``model/lora.py``). Each whole parameter is
    drawn from a generator seeded by (seed, name), and a rank keeps its slice.

    Shapes are read at the call: make it before an engine cuts parameters into partitions.

    Args:
        within: only parameters whose name starts so, and adapters.
    """
    wanted = ((name, p) for name, p in global_names(gpt) if name.startswith(within) or is_adapter(name))
    found = [(name, p, list(p.shape)) for name, p in wanted]
    return _drawn(found, model, vocab_size, seed, head_bias_A)


def _drawn(
    found: list[tuple[str, torch.nn.Parameter, list[int]]],
    model: ModelConfig,
    vocab_size: int,
    seed: int,
    head_bias_A: torch.Tensor | None,
) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    world = parallel_state.get_tensor_model_parallel_world_size()

    def values(name: str, parameter: torch.nn.Parameter, shape: list[int]) -> torch.Tensor:
        constant = _constant(name, model, head_bias_A)
        if constant is not None:
            return constant if isinstance(constant, torch.Tensor) else torch.full(shape, constant)
        if world > 1 and getattr(parameter, "tensor_model_parallel", False):
            shape[parameter.partition_dim] *= world  # type: ignore[attr-defined]
        if name == "output_layer.weight" and model.tie_embeddings:
            name = "embedding.word_embeddings.weight"  # the tied copy on the last stage is the same tensor
        residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        std = model.init_std / math.sqrt(2 * model.num_layers) if residual else model.init_std
        if is_adapter(name):
            std = initial_std(shape)
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        full = torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
        if name in _VOCABULARY:
            full[vocab_size:] = 0.0
        return tensor_parallel_part(full, parameter)

    # A draw has one thread and takes 6 ns a number, a minute for 10 billion, so several parameters are drawn at a time.
    yield from _ahead((parameter, world, partial(values, name, parameter, shape)) for name, parameter, shape in found)


def _ahead(
    asked: Iterable[tuple[torch.nn.Parameter, int, Callable[[], torch.Tensor]]],
) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """What functions return, in order. As many of them run at a time as this process has threads, or as have values of
    ``_AHEAD_BYTES`` together: a parameter's, in float32, times the ranks (second of ``asked``) that it is split over.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        running: deque[tuple[torch.nn.Parameter, int, Future[torch.Tensor]]] = deque()
        ahead = 0
        for parameter, ranks, function in asked:
            size = 4 * parameter.numel() * ranks
            while running and (len(running) >= torch.get_num_threads() or ahead + size > _AHEAD_BYTES):
                first, taken, drawn = running.popleft()
                ahead -= taken
                yield first, drawn.result()
            running.append((parameter, size, pool.submit(function)))
            ahead += size
        while running:
            first, _, drawn = running.popleft()
            yield first, drawn.result()


def _constant(name: str, model: ModelConfig, head_bias_A: torch.Tensor | None) -> float | torch.Tensor | None:
    """What a parameter that is not drawn starts from; None for one that is."""
    if name == "output_layer.regression.bias" and head_bias_A is not None:
        return head_bias_A.float()
    if name.endswith(("bias", ".lora_b", ".rows")) or name == "output_layer.regression.weight":
        return 0.0
    if "norm" in name:
        return 0.0 if model.one_plus_norms else 1.0
    return None


@torch.no_grad()
def fill(weights: Iterable[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
    """Put values into parameters, rounded to their dtype."""
    for parameter, value in weights:
        parameter.copy_(value)


def initialize(gpt: PackedGPTModel, model: ModelConfig, vocab_size: int, seed: int) -> PackedGPTModel:
    """``gpt`` with the weights of :func:`initial_weights` in it, for a model that no engine wraps."""
    fill(initial_weights(gpt, model, vocab_size, seed))
    return gpt
