"""Patches for running Megatron-Core without CUDA, Transformer Engine or Apex.

Owns: every patch of Megatron-Core or torch.cuda in this project, each with its reason. Where CUDA is available, only
the patches of the checkpoint's writer, of gradient clipping and of gradient accumulation are applied. Does not own: the
names of the replaced functions and classes (``mcore_private.py``). Invariant: :func:`apply` is idempotent and is called
before the first Megatron-Core object is built.

Megatron-Core assumes CUDA in four ways (found by reading 0.16.1; 0.19.2 does so in the same files):

1. ``torch.cuda.current_device()`` as a ``device=`` argument, ``torch.cuda.synchronize()``, ``Tensor.cuda()``;
2. the literal ``device="cuda"`` in schedules, clip_grads, optimizer, state_dict_saver;
3. type names such as ``'torch.cuda.FloatTensor'`` in the optimizers' parameter grouping and in gradient clipping;
4. the CUDA generator as the source of model-parallel randomness (``tensor_parallel/random.py``).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from steerlm_megatron.runtime import mcore_private
from steerlm_megatron.runtime.device import device, has_cuda

_applied = False


class _CpuTorch(types.ModuleType):
    """``torch`` as seen by one Megatron-Core module: for factory functions ``device="cuda"`` is this process's device
    (way 2).
    """

    _FACTORIES = ("zeros", "ones", "tensor", "empty", "full", "arange", "empty_like", "zeros_like")

    def __init__(self, cuda: Any = None) -> None:
        super().__init__("torch")
        for name in self._FACTORIES:
            setattr(self, name, _cpu_factory(getattr(torch, name)))
        if cuda is not None:
            self.cuda = cuda

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _cpu_factory(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(function)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = device()
        return function(*args, **kwargs)

    return on_cpu


class _CpuGenerators(types.ModuleType):
    """``torch.cuda`` as seen by ``tensor_parallel/random.py``: the CPU generator stands in for the device's (way 4)."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        self.manual_seed = torch.manual_seed
        self.get_rng_state = lambda *_: torch.get_rng_state()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    """Make ``Tensor.type()`` name a CPU tensor as if it were a CUDA tensor, inside the ``with`` (way 3)."""
    original = torch.Tensor.type

    def named(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if isinstance(result, str) and not result.startswith("torch.cuda."):
            return result.replace("torch.meta.", "torch.").replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.type = named  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]


def _with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_names():
            return function(*args, **kwargs)

    return wrapped


def _patch_torch_cuda() -> None:
    """Patch way 1. It is global, because Megatron-Core calls these everywhere and nothing else can without CUDA."""
    torch.cuda.current_device = device  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *_a, **_k: None
    # Megatron-Core 0.19 asks for the stream before it reduces gradients; a CPU's only stream orders everything already.
    torch.cuda.current_stream = lambda *_a, **_k: torch.cpu.current_stream()  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_a, **_k: self  # type: ignore[method-assign]


def _patch_literals() -> None:
    """Patch way 2 in each module that has such a literal."""
    for name in mcore_private.TORCH:
        name.set(_CpuTorch())


def _patch_type_checks() -> None:
    """Patch way 3 around the functions that compare type names, and nowhere else."""
    for name in mcore_private.TYPE_NAME_READERS:
        name.set(_with_cuda_type_names(name.get()))
    grouping = mcore_private.BUILD_GROUPS
    grouping.set(classmethod(_with_cuda_type_names(grouping.get().__func__)))
    clip = _with_cuda_type_names(mcore_private.CLIP[0].get())
    for name in mcore_private.CLIP:
        name.set(clip)


def _patch_generators() -> None:
    """Patch way 4: model-parallel RNG states become states of the CPU generator."""
    mcore_private.RANDOM_TORCH.set(_CpuTorch(cuda=_CpuGenerators()))
    mcore_private.GET_RNG_STATE.set(lambda *_a, **_k: torch.get_rng_state())
    mcore_private.SET_RNG_STATE.set(lambda state, *_a, **_k: torch.set_rng_state(state))
    # With dropout, every fork would warn that the CPU generator moved inside a "GPU RNG context"; here that is
    # intended.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.msg
    )


def _patch_groups_of_one() -> None:
    """Skip collectives of groups of one rank. Its reduced gradients and gathered weights are in place already, but gloo
    would copy all of them onto themselves twice a step (3 % of its time). NCCL detects that by itself.
    """

    def needed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(output: torch.Tensor, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            same = output.data_ptr() == inputs.data_ptr() and output.numel() == inputs.numel()
            if same and torch.distributed.get_world_size(kwargs.get("group")) == 1 and not kwargs.get("async_op"):
                return None
            return function(output, inputs, *args, **kwargs)

        return wrapped

    for name in mcore_private.DATA_PARALLEL_COLLECTIVES:
        name.set(needed(name.get()))


def _patch_clipping() -> None:
    """Compute the norm of all gradients, and scale them, in a few kernels.

    Without Transformer Engine and Apex, Megatron-Core reads the norm of every single gradient back to the host and
    scales each gradient through a copy, which makes the host wait for the GPU hundreds of times a step.
    """

    def norm(_chunk_size: int, _flag: Any, tensors: list[list[torch.Tensor]], *_: Any) -> tuple[torch.Tensor, None]:
        return torch.nn.utils.get_total_norm([t for each in tensors for t in each]).reshape(1), None

    def scale(_chunk_size: int, _flag: Any, tensors: list[list[torch.Tensor]], factor: float) -> None:
        sources, targets = tensors
        assert sources is targets, "clipping scales in place"
        torch._foreach_mul_(targets, factor)

    if mcore_private.L2_NORM.get() is mcore_private.LOCAL_L2_NORM.get():
        mcore_private.L2_NORM.set(norm)
        mcore_private.SCALE.set(scale)


def add_weight_gradient(input_TD: torch.Tensor, grad_TF: torch.Tensor, sum_FD: torch.Tensor) -> None:
    """Add a weight's gradient, ``grad_TF``ᵀ · ``input_TD``, to ``sum_FD`` in the matrix product itself, in its float32
    arithmetic. The inputs have one dtype: that of ``sum_FD``, or on a GPU bf16 beside float32.
    """
    if input_TD.dtype is sum_FD.dtype:
        sum_FD.addmm_(grad_TF.t(), input_TD)
    else:
        torch.ops.aten.addmm.dtype_out(sum_FD, grad_TF.t(), input_TD, sum_FD.dtype, out=sum_FD)


def _patch_gradient_accumulation() -> None:
    """Have torch's matrix product do on a GPU what Megatron-Core expects of Apex's extension. Without, every weight's
    gradient is written in bf16, rounded, and added to the fp32 sum by a kernel of its own.
    """
    if not mcore_private.can_fuse_gradient_accumulation() and hasattr(torch.ops.aten.addmm, "dtype_out"):
        mcore_private.accumulate_gradients_by(add_weight_gradient)


def _patch_checkpoint_writer() -> None:
    """Make a rank write its part of a checkpoint from threads instead of processes.

    Megatron-Core 0.16 forks a process per file, which a process with CUDA or threads should not do, and both versions
    spawn a manager process for the queue of results, which takes seconds at the first save. Writing releases the
    interpreter's lock, so threads are as fast; 0.19 has them.
    """
    import queue
    from concurrent.futures import ThreadPoolExecutor

    mcore_private.WRITE_RESULTS_QUEUE.set(lambda *_: queue.SimpleQueue())
    write_one, write_all = mcore_private.WRITE_ONE.get(), mcore_private.WRITE_ALL

    def write(transforms: Any, use_msc: bool, _rank: int, buckets: list[Any], out: queue.SimpleQueue[Any]) -> None:
        def one(number: int) -> tuple[int, Any]:
            found: queue.Queue[Any] = queue.Queue()
            count: queue.Queue[Any] = queue.Queue()
            count.put(number)
            write_one(transforms, number, buckets[number], found, count, True, use_msc=use_msc)
            return found.get()

        with ThreadPoolExecutor(len(buckets)) as pool:
            outcome = dict(pool.map(one, range(len(buckets))))
        error = next((each for each in outcome.values() if isinstance(each, Exception)), None)
        out.put(error or outcome)

    if write_all.path == write_all.paths[0]:
        write_all.set(staticmethod(write))


def apply() -> None:
    """Make Megatron-Core run on this host. Later calls do nothing."""
    global _applied
    if _applied:
        return
    _applied = True
    _patch_checkpoint_writer()
    _patch_clipping()
    if has_cuda():
        _patch_gradient_accumulation()
        return
    _patch_torch_cuda()
    _patch_literals()
    _patch_type_checks()
    _patch_generators()
    _patch_groups_of_one()
