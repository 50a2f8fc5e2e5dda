"""The names that this project uses of Megatron-Core and that Megatron-Core does not promise to keep.

Owns: the table of these names, each with its reason, and everything that is done with them but for patches, which
``mcore_compat.py`` makes through the same table. Does not own: names that Megatron-Core documents; these are imported
wherever they are needed.
Invariant: no other file of the package has one of these names. ``tests/unit/test_mcore_private.py`` looks for them
there, compares the table with the installed Megatron-Core, and says which name of which module has moved.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import __version__
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import TransformerLayer


@dataclass(frozen=True)
class Name:
    """One name of Megatron-Core.

    Args:
        module: where it stands, below ``megatron.core``.
        paths: the name there, dotted inside a class. There are several where versions call the same thing differently;
            the first one that exists is meant.
        why: what would break without it.
        takes: parameters that it is called with by their names.
    """

    module: str
    paths: tuple[str, ...]
    why: str
    takes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"megatron.core.{self.module}: {' or '.join(self.paths)}"

    @property
    def path(self) -> str:
        """The one of ``paths`` that the installed version has. ``AttributeError`` says which name has moved."""
        try:
            module = importlib.import_module(f"megatron.core.{self.module}")
        except ModuleNotFoundError as error:
            raise self._moved("there is no such module") from error
        for path in self.paths:
            try:
                reduce(getattr, path.split("."), module)
            except AttributeError:
                continue
            return path
        raise self._moved("the module has no such name")

    def get(self) -> Any:
        owner, name = self._owner()
        return getattr(owner, name)

    def set(self, value: Any) -> None:
        """Put ``value`` in its place, for everyone who looks it up from now on."""
        owner, name = self._owner()
        setattr(owner, name, value)

    def of(self, instance: Any) -> Any:
        """The method or attribute of this name of an object."""
        return getattr(instance, self.path.rpartition(".")[2])

    def check(self) -> None:
        """``AttributeError`` unless the installed version has the name, and it takes what it is called with."""
        value = self.get()
        lacking = [name for name in self.takes if name not in inspect.signature(value).parameters]
        if lacking:
            raise self._moved(f"it takes no {' and no '.join(lacking)}")

    def _owner(self) -> tuple[Any, str]:
        *owners, name = self.path.split(".")
        return reduce(getattr, owners, importlib.import_module(f"megatron.core.{self.module}")), name

    def _moved(self, what: str) -> AttributeError:
        return AttributeError(f"{self} has moved: {what} in Megatron-Core {__version__}; {self.why}")


NAMES: list[Name] = []


def _name(module: str, *paths: str, why: str, takes: tuple[str, ...] = ()) -> Name:
    NAMES.append(Name(module, paths, why, takes))
    return NAMES[-1]


_CPU_ONLY = "runtime/mcore_compat.py replaces it on machines without CUDA, where "
_OPTIMIZER, _DISTRIBUTED = "optimizer.optimizer", "optimizer.distrib_optimizer"

# ---- What mcore_compat.py replaces

TORCH = [
    _name(module, "torch", why=f'{_CPU_ONLY}device="cuda" is an error')
    for module in (
        "utils", "pipeline_parallel.schedules", "optimizer.clip_grads", _OPTIMIZER, _DISTRIBUTED,
        "dist_checkpointing.strategies.state_dict_saver", "dist_checkpointing.exchange_utils",
    )
]  # fmt: skip
TYPE_NAME_READERS = [
    _name(module, path, why=f"{_CPU_ONLY}it refuses tensors whose type is not named torch.cuda.…")
    for module, path in (
        (_OPTIMIZER, "Float16OptimizerWithFloat16Params.__init__"),
        (_DISTRIBUTED, "DistributedOptimizer.__init__"),
    )
]
BUILD_GROUPS = _name(
    _DISTRIBUTED,
    "DistributedOptimizer._build_model_and_main_param_groups",
    why=f"{_CPU_ONLY}it refuses tensors whose type is not named torch.cuda.…",
)
CLIP = [
    _name(module, "clip_grad_by_total_norm_fp32", why=f"{_CPU_ONLY}it scales no gradient of another type")
    for module in ("optimizer.clip_grads", _OPTIMIZER)
]
RANDOM_TORCH = _name("tensor_parallel.random", "torch", why=f"{_CPU_ONLY}there is no generator of CUDA's")
GET_RNG_STATE = _name("tensor_parallel.random", "_get_cuda_rng_state", why=f"{_CPU_ONLY}there is no such state")
SET_RNG_STATE = _name("tensor_parallel.random", "_set_cuda_rng_state", why=f"{_CPU_ONLY}there is no such state")
DATA_PARALLEL_COLLECTIVES = [
    _name("distributed.param_and_grad_buffer", name, why=f"{_CPU_ONLY}a group of one would copy everything onto itself")
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func")
]
LOCAL_L2_NORM = _name(
    "utils",
    "local_multi_tensor_l2_norm",
    why="runtime/mcore_compat.py makes clipping faster where this function computes the norm",
)
L2_NORM = _name("optimizer.clip_grads", "l2_norm_impl", why="runtime/mcore_compat.py makes clipping faster")
SCALE = _name("optimizer.clip_grads", "multi_tensor_scale_impl", why="runtime/mcore_compat.py makes clipping faster")
WRITE_RESULTS_QUEUE = _name(
    "dist_checkpointing.strategies.filesystem_async",
    "_get_write_results_queue",  # 0.16
    "get_write_results_queue",  # 0.19
    why="runtime/mcore_compat.py spares a save the process that Megatron-Core would start for its results",
)
WRITE_ALL = _name(
    "dist_checkpointing.strategies.filesystem_async",
    "FileSystemWriterAsync.write_preloaded_data_multiproc",  # 0.16, which is replaced
    "FileSystemWriterAsync.write_preloaded_data_multithread",  # 0.19, which has threads
    why="runtime/mcore_compat.py has a rank's part of a checkpoint written by threads, not by forked processes",
)
WRITE_ONE = _name(
    "dist_checkpointing.strategies.filesystem_async",
    "FileSystemWriterAsync.write_preloaded_data",
    why="runtime/mcore_compat.py writes each file of a checkpoint by it",
)

# ---- What this file uses itself

_FUSION_AVAILABLE = _name(
    "tensor_parallel.layers",
    "_grad_accum_fusion_available",
    why="it says whether Apex's kernel that accumulates gradients is there",
)
_OWNER_OF = "it says which part of a parameter a rank updates, which checkpoints are made of"
_RANGE_OF = _name(_DISTRIBUTED, "DistributedOptimizer._get_model_param_range_map", why=_OWNER_OF)
_STATE_OF = _name(_DISTRIBUTED, "DistributedOptimizer._get_main_param_and_optimizer_states", why=_OWNER_OF)
_GRAD_NORM = _name(_OPTIMIZER, "ChainedOptimizer.get_grad_norm", why="a step looks at the norm before it updates")
_UPDATE = _name(_OPTIMIZER, "ChainedOptimizer.step_with_ready_grads", why="a step may leave the update out")
_name(
    "models.gpt.gpt_model",
    "GPTModel._postprocess",
    why="the output layer is applied only where an output is wanted, and logits are capped (HookedGPTModel)",
    takes=("hidden_states", "packed_seq_params", "labels"),
)
_name(
    "transformer.transformer_layer",
    "TransformerLayer._forward_attention",
    why="the last layer's MLP is applied only where an output is wanted (HookedTransformerLayer)",
    takes=("packed_seq_params",),
)
_name(
    "transformer.transformer_layer",
    "TransformerLayer._forward_pre_mlp_layernorm",
    why="the MLP of a parallel layer reads what the attention reads (HookedTransformerLayer)",
    takes=("hidden_states",),
)
_name(
    "models.common.language_module.language_module",
    "LanguageModule._is_in_embd_group",
    why="a model that is built without values would exchange them between stages (HookedGPTModel)",
)


def can_fuse_gradient_accumulation() -> bool:
    """Whether there is a matrix product that adds weight gradients to the fp32 ones: Apex's, or the one in its place
    (:func:`accumulate_gradients_by`).
    """
    return bool(_FUSION_AVAILABLE.get())


def accumulate_gradients_by(product: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]) -> None:
    """Have linear layers add their weights' gradients by ``product(inputs [T, D], output gradients [T, F], fp32
    gradients [F, D])``, in the place of Apex's extension.
    """
    layers = importlib.import_module(f"megatron.core.{_FUSION_AVAILABLE.module}")
    vars(layers)["fused_weight_gradient_mlp_cuda"] = SimpleNamespace(wgrad_gemm_accum_fp32=product)
    _FUSION_AVAILABLE.set(True)


def range_of(optimizer: Any, parameter: torch.nn.Parameter) -> tuple[int, int] | None:
    """Start and end of what a ``DistributedOptimizer`` updates of the flattened ``parameter`` on this rank; None if it
    is another optimizer's.
    """
    if parameter not in optimizer.model_param_gbuf_map:
        return None
    found = _RANGE_OF.of(optimizer)(parameter)["param"]
    return found.start, found.end


def state_of(optimizer: Any, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """The main parameter (``param``) and the optimizer's moments of :func:`range_of`, as they are."""
    return _STATE_OF.of(optimizer)(parameter)


def replace_update(optimizer: Any, grad_norm: Callable[[], float], update: Callable[[], bool]) -> None:
    """Have a ``ChainedOptimizer`` ask ``grad_norm`` for the gradients' norm and then call ``update`` for the update."""
    for name, function in ((_GRAD_NORM, grad_norm), (_UPDATE, update)):
        setattr(optimizer, name.path.rpartition(".")[2], function)


class HookedGPTModel(GPTModel):
    """``GPTModel`` with methods before and after its output layer, which may be built without values."""

    def setup_embeddings_and_output_layer(self) -> None:
        """As in Megatron-Core, without the exchange of tied weights between stages: they have no values yet, and both
        stages then get the same ones.
        """
        self._is_in_embd_group = lambda: False
        super().setup_embeddings_and_output_layer()
        del self._is_in_embd_group

    def before_output(self, hidden_states: torch.Tensor, packed_seq_params: Any) -> torch.Tensor:
        """What the rest of the model gets in the place of the last layer's ``hidden_states``, on every stage."""
        return hidden_states

    def after_output(self, outputs: torch.Tensor) -> torch.Tensor:
        """What the model returns in the place of the output layer's ``outputs`` where no losses are asked for."""
        return outputs

    def _postprocess(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        hidden_states = self.before_output(hidden_states, kwargs["packed_seq_params"])
        outputs = super()._postprocess(hidden_states=hidden_states, **kwargs)
        return self.after_output(outputs) if self.post_process and kwargs["labels"] is None else outputs


class HookedTransformerLayer(TransformerLayer):
    """``TransformerLayer`` with methods between its attention and its MLP."""

    def after_attention(
        self, hidden_states: torch.Tensor, before: torch.Tensor, packed_seq_params: Any
    ) -> torch.Tensor:
        """Return what follows the attention in the place of ``hidden_states``, the residual stream with the attention's
        output in it; ``before`` is the stream without it.
        """
        return hidden_states

    def norm_input(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return what the norm before the MLP gets in the place of ``hidden_states``."""
        return hidden_states

    def _forward_attention(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        before = args[0] if args else kwargs["hidden_states"]
        hidden_states, context = super()._forward_attention(*args, **kwargs)
        return self.after_attention(hidden_states, before, kwargs["packed_seq_params"]), context

    def _forward_pre_mlp_layernorm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super()._forward_pre_mlp_layernorm(self.norm_input(hidden_states))
