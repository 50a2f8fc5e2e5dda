"""The DeepSpeed engine: ZeRO 1, 2 and 3 over data-parallel ranks, tensor parallelism by Megatron-Core's layers.

Owns: handing our model, parameter groups and groups of ranks to DeepSpeed; one training step; what of ZeRO's partitions
goes into a sharded checkpoint, and back. Does not own: losses (``objective.py``), files (``checkpoint.py``), the loop.
Invariant: the sum of losses is divided once, by the number of terms of the global batch, and gradients, clipping, AdamW
and the schedule are those of the Megatron-Core engine. The only module that imports deepspeed.

Checkpoints have the model and the optimizer under the Megatron-Core engine's names, one whole tensor per parameter and
kind, not per partition: any command loads them, and training goes on from them at another ZeRO stage, layout or engine.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from steerlm_megatron.config.schema import EngineConfig, OptimConfig
from steerlm_megatron.data.batch import RowBatch
from steerlm_megatron.model.arithmetic import ZERO_BUCKET
from steerlm_megatron.model.gpt import PackedGPTModel
from steerlm_megatron.model.inputs import on_device
from steerlm_megatron.model.lora import adapters
from steerlm_megatron.runtime.collectives import sum_from_last_stage, sum_over_data_parallel
from steerlm_megatron.runtime.device import Stopwatch, device, has_cuda
from steerlm_megatron.runtime.parallel import Layout, layout
from steerlm_megatron.train.adam import ADAM_STEP, adam_step, allocate_adam, parameter_groups, set_adam_step
from steerlm_megatron.train.engine import Engine, StepGivenUp, StepResult, pieces
from steerlm_megatron.train.objective import Objective
from steerlm_megatron.train.rng import rng_state, take_rng_state
from steerlm_megatron.train.schedule import build_schedule, rates_now
from steerlm_megatron.train.sharded import common_state, load_sharded, stored_keys

# What ZeRO keeps in fp32 of each parameter, by the name it has in a checkpoint: the Megatron-Core engine's.
_MASTER = "param"
_KINDS = (_MASTER, "exp_avg", "exp_avg_sq")

Template: TypeAlias = ShardedTensor | ShardedTensorFactory


_SHARED = {"with_context_parallel": True}


class _Mpu:
    """Megatron-Core's groups under the names that DeepSpeed asks an ``mpu`` for: model parallel is tensor parallel."""

    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)
    # ZeRO partitions over all ranks that hold the same parameters, context-parallel ones among them.
    get_data_parallel_rank = staticmethod(partial(parallel_state.get_data_parallel_rank, **_SHARED))
    get_data_parallel_world_size = staticmethod(partial(parallel_state.get_data_parallel_world_size, **_SHARED))
    get_data_parallel_group = staticmethod(partial(parallel_state.get_data_parallel_group, **_SHARED))


class DeepSpeedEngine(Engine):
    """``chunks``: the model, in one piece (``config.load`` refuses pipelines with this engine)."""

    def __init__(
        self,
        chunks: Sequence[PackedGPTModel],
        objective: Objective,
        optim: OptimConfig,
        engine: EngineConfig,
        steps: int,
    ) -> None:
        deepspeed = _deepspeed()
        (model,) = chunks
        self.layout: Layout = layout()
        self.objective, self.stage = objective, engine.zero_stage
        # Before ZeRO cuts the parameters up: names, shapes and places of the whole ones.
        entries = model.sharded_state_dict()
        tensors = {n: e for n, e in entries.items() if isinstance(e, ShardedTensor | ShardedTensorFactory)}
        self.templates: dict[str, Template] = {name: replace(entry, data=None) for name, entry in tensors.items()}
        self.objects = {name: entry for name, entry in entries.items() if name not in tensors}
        self.parameters = dict(model.named_parameters())
        self.shapes = {name: p.shape for name, p in self.parameters.items()}
        self.dtypes = dict.fromkeys(self.parameters, torch.bfloat16 if engine.precision == "bf16" else torch.float32)
        adam = torch.optim.AdamW(
            parameter_groups(model, optim), lr=0.0, betas=(optim.beta1, optim.beta2), eps=optim.eps,
            weight_decay=optim.weight_decay, fused=True,
        )  # fmt: skip
        self.ds, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=adam, config=_config(optim, engine, self._trainable()), mpu=_Mpu(),
            dist_init_required=False,
        )  # fmt: skip
        self.adam = adam
        self._sum_sequence_parallel_gradients()
        self._guard_update()
        self._allocate()
        self.schedule = build_schedule(self.optimizer, optim, steps)

    @property
    def model(self) -> PackedGPTModel:
        """The model inside DeepSpeed's wrapper; under ZeRO 3 its parameters are empty outside a forward pass."""
        return self.ds.module

    def _trainable(self) -> int:
        """Return how many elements have a gradient; before ZeRO cuts the parameters up."""
        return sum(parameter.numel() for parameter in self.parameters.values() if parameter.requires_grad)

    def _sum_sequence_parallel_gradients(self) -> None:
        """Norms and biases that see only this rank's share of the tokens get the gradient of all of them, before ZeRO
        takes it; Megatron-Core does the same when it finalizes gradients.
        """
        if self.layout.tp_size == 1:
            return
        for parameter in self.parameters.values():
            if parameter.requires_grad and getattr(parameter, "sequence_parallel", False):
                parameter.register_hook(_summed_over_tensor_parallel)

    def _guard_update(self) -> None:
        """No update from a loss that is not finite; DeepSpeed itself sees to gradients that are not."""
        update, self._finite = self.adam.step, True

        def step(closure: Any = None) -> Any:
            return update(closure) if self._finite else None

        self.adam.step = step  # type: ignore[method-assign]

    # ---- steps

    def _forward(self, batch: RowBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of losses, float64 sums [M]) of one micro-batch."""
        here, packed = on_device(batch)
        packed.output_index_K = self.objective.output_index(here)
        labels = self.objective.labels(here)
        output = self.ds(here.tokens_T[None], here.positions_T[None], None, labels=labels, packed_seq_params=packed)
        return self.objective.loss(output, here)

    def train_step(self, batches: Sequence[RowBatch], stopping: Callable[[], bool] | None = None) -> StepResult:
        start = time.perf_counter()
        self.ds.train()
        terms = float(sum(self.objective.terms(batch) for batch in batches))
        # ZeRO takes the mean over the ranks it partitions over; wanted is the sum over the number of terms of them all.
        scale = self.layout.dp_cp_size / max(sum_over_data_parallel([terms], with_context=True)[0], 1.0)
        own = Stopwatch()
        own.start()
        asked_after = set(itertools.accumulate(map(len, pieces(batches, 1)[:-1])))
        generators: dict[str, Any] = rng_state(self.layout).data if asked_after and stopping else {}
        sums = []
        for number, batch in enumerate(batches):
            if number in asked_after and stopping is not None and stopping():
                take_rng_state(generators)
                raise StepGivenUp
            self.ds.set_gradient_accumulation_boundary(number == len(batches) - 1)
            total, sums_M = self._forward(batch)
            if number == 0:
                own.stop()
            self.ds.backward(total * scale)
            sums.append(sums_M)
        sums_BM = torch.stack(sums)
        means = self.objective.means(sum_from_last_stage(sums_BM.sum(0)).tolist())  # host sync
        loss = means.pop("loss")
        middle = time.perf_counter()
        self.schedule.step(increment=1)
        lr, rates = rates_now(self.schedule)
        means |= rates
        self._finite = math.isfinite(loss)
        self.ds.step()
        grad_norm = float(self.ds.get_global_grad_norm() or 0.0)
        seconds = {"forward_backward": middle - start, "optimizer": time.perf_counter() - middle}
        # ZeRO 3 puts weights together layer by layer, so that replicas wait for each other from the first one on.
        seconds["own"] = 0.0 if self.stage == 3 else own.seconds()
        if self._finite and not self.optimizer.overflow and math.isfinite(grad_norm):
            return StepResult(loss, grad_norm, lr, metrics=means, seconds=seconds)
        self.schedule.step(increment=-1)
        bad = (~sums_BM.isfinite().all(1)).nonzero().squeeze(1).tolist()
        return StepResult(loss, grad_norm, lr, True, bad, means, seconds)

    @torch.no_grad()
    def evaluate(self, steps: Iterable[Sequence[RowBatch]]) -> dict[str, float]:
        self.ds.eval()
        sums_M = torch.zeros(len(self.objective.metric_names), dtype=torch.float64, device=device())
        for batches in steps:
            for batch in batches:
                sums_M += self._forward(batch)[1]
        return self.objective.means(sum_from_last_stage(sums_M).tolist())  # host sync

    def close(self) -> None:
        from deepspeed.runtime.zero import parameter_offload

        model = self.model
        self.ds.destroy()  # removes the hooks that keep parameters and optimizer alive
        stack = parameter_offload.FWD_MODULE_STACK  # ZeRO 3 puts every model on it, and takes none off
        stack[:] = [module for module in stack if module is not model]

    # ---- checkpoints

    def live_tensors(self) -> Iterable[torch.Tensor]:
        return ()  # checkpoint_state hands out nothing but copies

    def checkpoint_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"model": self.objects | self._whole(None)}
        for kind in _KINDS:
            if whole := self._whole(kind):
                state[kind] = whole
        state["schedule"] = self.schedule.state_dict()
        state[ADAM_STEP] = adam_step([self.adam])
        state["layout"] = self.layout.shape
        state["rng"] = rng_state(self.layout)
        return state

    def fill(self, weights: Iterable[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for parameter, value in weights:
            self._take(_MASTER, {names[id(parameter)]: value})

    def load(self, folder: Path) -> None:
        common = common_state(folder)
        if frozen := {n: e for n, e in self._empty(None).items() if not self.parameters[n].requires_grad}:
            self._take(_MASTER, load_sharded({"model": frozen}, folder)["model"])
        for kind in _KINDS:  # one at a time: a rank has room for one whole fp32 copy of its part of the model
            self._take(kind, load_sharded({kind: self._empty(kind)}, folder)[kind])
        set_adam_step([self.adam], common[ADAM_STEP])
        self.schedule.load_state_dict(common["schedule"])
        if common["layout"] == self.layout.shape:  # of either engine: generators are one rank's own
            take_rng_state(load_sharded({"rng": rng_state(self.layout)}, folder)["rng"])

    def load_model(self, folder: Path) -> None:
        state, there = self._empty(None), stored_keys(folder)
        for name in [name for name, entry in adapters(state) if entry.key not in there]:
            del state[name]  # adapters that the checkpoint lacks keep what they were filled with
        loaded = load_sharded({"model": state}, folder, missing_ok=("output_layer.",))["model"]
        self._take(_MASTER, {name: tensor for name, tensor in loaded.items() if isinstance(tensor, torch.Tensor)})

    def _template(self, name: str, kind: str | None, data: torch.Tensor) -> Template:
        """Where ``data``, a whole parameter (``kind`` None) or a state of it, stands in a checkpoint."""
        entry = self.templates[name]
        key = entry.key if kind is None else f"optimizer.state.{kind}.{entry.key}"
        if isinstance(entry, ShardedTensorFactory):
            return replace(entry, key=key, data=data)
        return replace(entry, key=key, data=data, dtype=data.dtype)

    def _whole(self, kind: str | None) -> dict[str, Template]:
        """Every parameter, or a state of it, put together from its partitions; on the CPU of the first data-parallel
        rank, which writes it.
        """
        out = {}
        for name, parameter in self.parameters.items():
            full = self._gather(parameter, kind)
            if full is not None and self.layout.dp_cp_rank == 0:
                full = full.to(self.dtypes[name]) if kind is None else full
                out[name] = self._template(name, kind, full.detach().to("cpu", copy=True))
        return out

    def _gather(self, parameter: torch.nn.Parameter, kind: str | None) -> torch.Tensor | None:
        from deepspeed import zero
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if parameter.requires_grad:
            if kind in (None, _MASTER):
                return safe_get_full_fp32_param(parameter)
            return safe_get_full_optimizer_state(parameter, kind)
        if kind is not None:
            return None  # a frozen parameter has no state
        with zero.GatheredParameters([parameter], enabled=self.stage == 3):
            return parameter.detach().clone()

    def _empty(self, kind: str | None) -> dict[str, Template]:
        """Room for what :meth:`_whole` writes."""
        out = {}
        for name, parameter in self.parameters.items():
            if kind is None or parameter.requires_grad:
                dtype = self.dtypes[name] if kind is None else torch.float32
                out[name] = self._template(name, kind, torch.empty(self.shapes[name], dtype=dtype))
        return out

    @torch.no_grad()
    def _take(self, kind: str, loaded: dict[str, torch.Tensor]) -> None:
        """Put whole tensors into this rank's partitions; parameters into the model as well."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        for name, value in loaded.items():
            parameter, value = self.parameters[name], value.to(device()).float()
            if self.stage == 3:
                part = self._partition(parameter, value)
                if kind == _MASTER:
                    cast(Any, parameter).ds_tensor.data.copy_(part)
                    if parameter.requires_grad:
                        safe_set_local_fp32_param(parameter, part)
                else:
                    safe_set_local_optimizer_state(parameter, part, kind)
                continue
            if kind == _MASTER:
                parameter.data.copy_(value)
                if parameter.requires_grad:
                    safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, kind)

    def _partition(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> torch.Tensor:
        """This rank's share of ``value`` under ZeRO 3, padded like all shares."""
        size = cast(Any, parameter).ds_tensor.ds_numel
        padded = value.new_zeros(size * self.layout.dp_cp_size)
        padded[: value.numel()] = value.flatten()
        return padded[size * self.layout.dp_cp_rank : size * (self.layout.dp_cp_rank + 1)]

    def _partitions(self) -> Iterator[torch.Tensor]:
        """ZeRO's flat fp32 partitions, which are what AdamW updates."""
        flat = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        yield from getattr(self.optimizer, flat)

    def _allocate(self) -> None:
        """AdamW's state for every partition: a checkpoint has somewhere to go before the first step, and DeepSpeed,
        which ties parameters to their states once, in the first group's first step, finds those of all groups.
        """
        for partition in self._partitions():
            allocate_adam(self.adam, partition)
        if self.stage != 3:
            self.optimizer._lazy_init_hp_params_optimizer_state()


def _summed_over_tensor_parallel(gradient: torch.Tensor) -> torch.Tensor:
    total = gradient.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    return total.to(gradient.dtype)


def _deepspeed() -> Any:
    """The package, told to keep to the device that torch has, and to warnings."""
    if not has_cuda():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it; a run of one process has no launcher to set it
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Its own collectives in shared memory would be compiled now, for half a minute; gloo does as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _config(optim: OptimConfig, engine: EngineConfig, trainable: int) -> dict[str, Any]:
    """DeepSpeed's configuration. The loop decides when gradients are whole, so DeepSpeed counts no accumulation. A
    bucket of gradients is allocated as a whole, so it is no larger than the ``trainable`` elements.
    """
    bucket = max(1, min(ZERO_BUCKET, trainable))
    zero: dict[str, Any] = {"stage": engine.zero_stage, "overlap_comm": has_cuda(), "reduce_bucket_size": bucket}
    if engine.offload in ("optimizer", "all"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": has_cuda()}
    if engine.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": has_cuda()}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.clip_grad,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "steps_per_print": 1 << 60,
    }
    if engine.precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if engine.zero_stage > 1:  # with stage 1 it takes another optimizer, which has no partitions to save
            config["data_types"] = {"grad_accum_dtype": "fp32"}  # of a rank's share; micro-batches add up in it
    return config
