"""The Megatron-Core engine: tensor, sequence, pipeline and data parallelism with the distributed optimizer.

Owns: wrapping the model, one training step through Megatron-Core's schedules, its optimizer, what goes into a sharded
checkpoint.
Does not own: the loss (``objective.py``), files around the checkpoint (``checkpoint.py``), the loop.
Invariant: gradients are divided once, by the number of loss terms in the global batch (``calculate_per_token_loss``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    ChainedOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from steerlm_megatron.config.schema import EngineConfig, OptimConfig
from steerlm_megatron.data.batch import RowBatch
from steerlm_megatron.model.gpt import PackedGPTModel
from steerlm_megatron.model.inputs import on_device
from steerlm_megatron.model.lora import adapters, sum_tied_rows
from steerlm_megatron.runtime import mcore_private
from steerlm_megatron.runtime.collectives import sum_from_last_stage
from steerlm_megatron.runtime.device import HostCopy, Stopwatch, device, dtype_of, has_cuda
from steerlm_megatron.runtime.parallel import Layout, layout
from steerlm_megatron.train.adam import (
    ADAM_STEP,
    adam_step,
    allocate_adam,
    head_rates,
    is_head,
    set_adam_step,
)
from steerlm_megatron.train.engine import Engine, StepGivenUp, StepResult, pieces
from steerlm_megatron.train.objective import Objective
from steerlm_megatron.train.ranges import sharded_range
from steerlm_megatron.train.rng import rng_state, take_rng_state
from steerlm_megatron.train.schedule import build_schedule, rates_now
from steerlm_megatron.train.sharded import common_state, load_sharded, stored_keys


class MegatronEngine(Engine):
    """``chunks``: this rank's model, one part per virtual pipeline stage (usually one), built by
    ``model.gpt.build_model``.
    """

    def __init__(
        self,
        chunks: Sequence[PackedGPTModel],
        objective: Objective,
        optim: OptimConfig,
        engine: EngineConfig,
        steps: int,
    ) -> None:
        self.layout: Layout = layout()
        self.objective = objective
        self.config = chunks[0].config
        ddp = self._data_parallel_config(engine)
        self.chunks = [
            DistributedDataParallel(
                self.config,
                ddp,
                Float16Module(self.config, chunk) if self.config.bf16 else chunk,
                disable_bucketing=number
                > 0,  # the first chunk's backward pass is the last one: there is none to hide in
            )
            for number, chunk in enumerate(chunks)
        ]
        self.overlap_param_gather = ddp.overlap_param_gather
        if ddp.overlap_grad_reduce:  # not before the last micro-batch
            pauses = [chunk.no_sync for chunk in self.chunks]
            self.config.no_sync_func = pauses if len(pauses) > 1 else pauses[0]
        if mcore_private.can_fuse_gradient_accumulation():
            self._fuse_gradient_accumulation()
        config = self._optimizer_config(optim, engine, ddp.overlap_param_gather)
        overrides = get_standard_config_overrides(config)
        if rates := head_rates(optim):
            named = ParamWithNamePredicate(name="head", fn=lambda parameter, name: is_head(name))
            overrides[ParamKey(with_name_predicate=named)] = rates
        self.optimizer = get_megatron_optimizer(config, self.chunks, overrides)
        for inner in self._inner_optimizers():
            for group in inner.param_groups:
                for parameter in group["params"]:
                    allocate_adam(inner, parameter)
        self._use_fused_adam()
        self._guard_update()
        self.schedule = build_schedule(self.optimizer, optim, steps)
        self.config.grad_scale_func = self.optimizer.scale_loss
        self._own = Stopwatch()
        self._terms: torch.Tensor | None = None  # loss terms of a step's pieces that are done
        self.config.finalize_model_grads_func = self._finalize_gradients
        self.forward_backward = get_forward_backward_func()

    def _data_parallel_config(self, engine: EngineConfig) -> DistributedDataParallelConfig:
        def overlap(wanted: bool | None) -> bool:
            return (has_cuda() if wanted is None else wanted) and self.layout.dp_cp_size > 1

        reduce = overlap(engine.overlap_grad_reduce)
        return DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=reduce,
            overlap_param_gather=reduce
            and overlap(engine.overlap_param_gather),  # Megatron-Core needs the first for it
            bucket_size=engine.bucket_parameters,
            average_in_collective=False,
        )

    def _fuse_gradient_accumulation(self) -> None:
        """Weight gradients are added to the fp32 ones by the matrix product itself (Apex's extension)."""
        self.config.gradient_accumulation_fusion = True
        for chunk in self.chunks:
            for module in chunk.modules():
                if hasattr(module, "gradient_accumulation_fusion"):
                    module.gradient_accumulation_fusion = True

    @staticmethod
    def _optimizer_config(optim: OptimConfig, engine: EngineConfig, overlap_param_gather: bool) -> OptimizerConfig:
        return OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            clip_grad=optim.clip_grad,
            bf16=engine.precision == "bf16",
            params_dtype=dtype_of(engine.precision),
            use_distributed_optimizer=True,
            overlap_param_gather=overlap_param_gather,
        )

    def _distributed_optimizers(self) -> Iterator[DistributedOptimizer]:
        """Megatron-Core's wrappers of this rank; one whose parameters are all elsewhere has none."""
        for wrapper in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            if wrapper.optimizer is not None:
                yield wrapper

    def _inner_optimizers(self) -> Iterator[torch.optim.Optimizer]:
        """The optimizers inside them, usually torch's."""
        for wrapper in self._distributed_optimizers():
            yield wrapper.optimizer

    def _use_fused_adam(self) -> None:
        """One kernel per parameter instead of a dozen; torch has it for CPU and CUDA, Megatron-Core does not ask for
        it.
        """
        for inner in self._inner_optimizers():
            if isinstance(inner, torch.optim.AdamW):
                for group in (inner.defaults, *inner.param_groups):
                    group["fused"], group["foreach"] = True, False

    def _guard_update(self) -> None:
        """No update from a loss or gradients that are not finite: Megatron-Core looks for that in fp16 only."""
        optimizer, self._finite = self.optimizer, True
        self._sums_M = HostCopy(torch.zeros(len(self.objective.metric_names), dtype=torch.float64))
        assert isinstance(optimizer, ChainedOptimizer)  # its step() takes the norm, clips, then updates
        norm_of, update = optimizer.get_grad_norm, optimizer.step_with_ready_grads

        def get_grad_norm() -> float:
            norm = norm_of()
            loss = self.objective.means(self._sums_M.tolist())["loss"]  # has come with the norm
            self._finite = math.isfinite(norm) and math.isfinite(loss)
            return norm

        def step_with_ready_grads() -> bool:
            return update() if self._finite else False

        mcore_private.replace_update(optimizer, get_grad_norm, step_with_ready_grads)

    # ---- steps

    def _forward(self, batches: Iterator[RowBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(batches)
        here, packed = on_device(batch)
        packed.output_index_K = self.objective.output_index(here)
        labels = self.objective.labels(here)
        output = model(here.tokens_T[None], here.positions_T[None], None, labels=labels, packed_seq_params=packed)
        return output, partial(self._loss, here, self.objective.terms(batch))

    def _loss(
        self, batch: RowBatch, terms: int, output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        total, sums_M = self.objective.loss(output, batch)
        return total, torch.full((), terms, dtype=torch.int, device=total.device), {"sums": sums_M}

    def _run(self, batches: Sequence[RowBatch], forward_only: bool) -> torch.Tensor:
        """Sums of metrics of each of this data-parallel rank's micro-batches, float64 [B, M] on the device; B = 0 but
        on the last stage.
        """
        wanted = len(batches)
        if len(self.chunks) > 1:
            batches = _whole_rounds(batches, self.layout.pp_size)
        iterators = [iter(batches) for _ in self.chunks]
        stored = self.forward_backward(
            forward_step_func=self._forward,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=batches[0].row_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        if self.layout.is_last_stage and stored:
            return torch.stack([entry["sums"] for entry in stored[:wanted]])
        return torch.zeros(0, len(self.objective.metric_names), dtype=torch.float64, device=device())

    def _accumulate(self, piece: Sequence[RowBatch]) -> torch.Tensor:
        """:meth:`_run` of micro-batches that others of the step follow: their gradients and terms are added up on this
        rank, and nothing is reduced yet.
        """
        pauses, config = self.config.no_sync_func, self.config
        with ExitStack() as paused:
            for chunk in self.chunks:
                paused.enter_context(chunk.no_sync())
            config.no_sync_func, config.finalize_model_grads_func = None, self._add_terms
            try:
                return self._run(piece, forward_only=False)
            finally:
                config.no_sync_func, config.finalize_model_grads_func = pauses, self._finalize_gradients

    def _add_terms(self, chunks: list[torch.nn.Module], terms: torch.Tensor, **kwargs: Any) -> None:
        """In the place of :meth:`_finalize_gradients` where more micro-batches follow."""
        self._terms = terms if self._terms is None else self._terms + terms

    def _finalize_gradients(self, chunks: list[torch.nn.Module], terms: torch.Tensor, **kwargs: Any) -> None:
        """Megatron-Core's, and the division by the global batch's number of terms, which it has as well, but with the
        host waiting to see whether there are any.
        """
        self._own.stop()  # until here a replica works alone
        finalize_model_grads(chunks, None, **kwargs)
        for chunk in self.chunks:
            sum_tied_rows(chunk)
        terms, self._terms = terms if self._terms is None else self._terms + terms, None
        factor = 1.0 / sum_from_last_stage(terms).clamp(min=1)
        for chunk in self.chunks:
            chunk.scale_gradients(factor)

    def train_step(self, batches: Sequence[RowBatch], stopping: Callable[[], bool] | None = None) -> StepResult:
        start, computing = time.perf_counter(), Stopwatch()
        self._own.start()
        computing.start()
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        *first, last = pieces(batches, self.layout.pp_size)
        generators: dict[str, Any] = rng_state(self.layout).data if first and stopping else {}
        sums = []
        for piece in first:
            sums.append(self._accumulate(piece))
            if stopping is not None and stopping():
                take_rng_state(generators)
                raise StepGivenUp
        sums_BM = torch.cat([*sums, self._run(last, forward_only=False)])
        self._sums_M = HostCopy(sum_from_last_stage(sums_BM.sum(0)))
        computing.stop()
        self.schedule.step(increment=1)
        _, norm, _ = self.optimizer.step()  # host sync, the only one of a step: the norm, on which the update depends
        grad_norm = float(norm or 0.0)
        means = self.objective.means(self._sums_M.tolist())
        loss = means.pop("loss")
        seconds = {"forward_backward": computing.seconds(), "own": self._own.seconds()}
        seconds["optimizer"] = time.perf_counter() - start - seconds["forward_backward"]
        lr, rates = rates_now(self.schedule)
        means |= rates
        if self._finite:
            return StepResult(loss, grad_norm, lr, metrics=means, seconds=seconds)
        self.schedule.step(increment=-1)
        bad = (~sums_BM.isfinite().all(1)).nonzero().squeeze(1).tolist()
        return StepResult(loss, grad_norm, lr, True, bad, means, seconds)

    @torch.no_grad()
    def evaluate(self, steps: Iterable[Sequence[RowBatch]]) -> dict[str, float]:
        for chunk in self.chunks:
            chunk.eval()
        sums_M = torch.zeros(len(self.objective.metric_names), dtype=torch.float64, device=device())
        for batches in steps:
            sums_M += self._run(batches, forward_only=True).sum(0)
        return self.objective.means(sum_from_last_stage(sums_M).tolist())  # host sync

    def close(self) -> None:
        # Gradient accumulators hold a hook, the hook the wrapper. The wrapper holds the accumulators, and through the
        # configuration the optimizer, whose views of parameters hold accumulators as well: circles through C++, which
        # Python's garbage collector cannot see.
        for chunk in self.chunks:
            chunk.grad_accs.clear()
        self.config.grad_scale_func = self.config.finalize_model_grads_func = self.config.no_sync_func = None

    # ---- checkpoints

    def _model_state(self) -> dict[str, Any]:
        """Sharded state per chunk, of the bare models: their keys are the same whatever wraps them."""
        if self.overlap_param_gather:  # the next forward pass would gather what the last step updated
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)
        if len(self.chunks) == 1:
            return {"model": _bare(self.chunks[0]).sharded_state_dict()}
        return {f"model{i}": _bare(chunk).sharded_state_dict() for i, chunk in enumerate(self.chunks)}

    def live_tensors(self) -> Iterator[torch.Tensor]:
        for chunk in self.chunks:
            yield from chunk.parameters()
            yield from chunk.module.buffers()
        for inner in self._inner_optimizers():
            for group in inner.param_groups:
                yield from group["params"]
            for entry in inner.state.values():
                yield from (value for value in entry.values() if isinstance(value, torch.Tensor))

    def checkpoint_state(self) -> dict[str, Any]:
        return {
            **self._model_state(),
            "optimizer": self._optimizer_state(),
            "schedule": self.schedule.state_dict(),
            ADAM_STEP: adam_step(self._inner_optimizers()),
            "layout": self.layout.shape,
            "rng": rng_state(self.layout),
        }

    @torch.no_grad()
    def fill(self, weights: Iterable[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
        for parameter, value in weights:
            parameter.copy_(value)
            main = getattr(parameter, "main_param", None)
            if main is not None:  # of a bf16 parameter, this rank's range in float32
                for optimizer in self._distributed_optimizers():
                    owned = mcore_private.range_of(optimizer, parameter)
                    if owned is not None:
                        main.copy_(value.flatten()[slice(*owned)])

    def _optimizer_state(self) -> dict[str, Any]:
        """This rank's ranges of main parameters and moments, as they are: to write from, and to load into."""
        out: dict[str, Any] = {}
        for number, chunk in enumerate(self.chunks):
            model = _bare(chunk)
            templates = model.sharded_state_dict()
            for name, parameter in model.named_parameters():
                for optimizer in self._distributed_optimizers():
                    owned = mcore_private.range_of(optimizer, parameter)
                    if owned is None:
                        continue
                    for kind, values in mcore_private.state_of(optimizer, parameter).items():
                        if kind != "step":
                            key = f"optimizer.state.{kind}.{templates[name].key}"
                            out[f"{number}.{kind}.{name}"] = sharded_range(
                                templates[name], parameter.shape, key, values.detach(), owned[0]
                            )
        return out

    def load(self, folder: Path) -> None:
        common = common_state(folder)
        same_layout = common["layout"] == self.layout.shape
        state = {**self._model_state(), "optimizer": self._optimizer_state()}
        if same_layout:  # of either engine: generators are one rank's own
            state["rng"] = rng_state(self.layout)
        loaded = load_sharded(state, folder)  # the optimizer's tensors in place
        self._take_model(loaded)
        set_adam_step(self._inner_optimizers(), common[ADAM_STEP])
        self.schedule.load_state_dict(common["schedule"])
        if same_layout:
            take_rng_state(loaded["rng"])

    def _take_model(self, loaded: dict[str, Any], strict: bool = True) -> None:
        for i, chunk in enumerate(self.chunks):
            _bare(chunk).load_state_dict(loaded["model" if len(self.chunks) == 1 else f"model{i}"], strict=strict)

    def load_model(self, folder: Path) -> None:
        state, there = self._model_state(), stored_keys(folder)
        for part in state.values():  # adapters that the checkpoint lacks keep what they were filled with
            for name in [name for name, entry in adapters(part) if entry.key not in there]:
                del part[name]
        self._take_model(load_sharded(state, folder, missing_ok=("output_layer.",)), strict=False)
        self.optimizer.reload_model_params()


def _whole_rounds(batches: Sequence[RowBatch], stages: int) -> Sequence[RowBatch]:
    """Interleaved stages take turns of as many micro-batches as there are stages, and Megatron-Core refuses any other
    number: batches of padding, whose loss has no terms, make up for what a small step, or the end of a validation set,
    lacks.
    """
    last = batches[-1]
    nothing = replace(
        last,
        tokens_T=torch.zeros_like(last.tokens_T),
        loss_mask_T=torch.zeros_like(last.loss_mask_T),
        target_K=last.target_K[:0],
        pool_P=last.pool_P[:0],
        values_PA=last.values_PA[:0],
        sample_ids=[],
        useful_tokens=0,
        target_tokens=0,
        **{
            name: value[:0]
            for name in ("sample_K", "group_S", "weight_S", "logprob_S", "scale_S")
            if (value := getattr(last, name)) is not None
        },
        groups=0,
    )
    return [*batches, *[nothing] * (-len(batches) % stages)]


def _bare(chunk: torch.nn.Module) -> PackedGPTModel:
    """The model inside its data-parallel and precision wrappers."""
    while not isinstance(chunk, PackedGPTModel):
        assert isinstance(chunk.module, torch.nn.Module)
        chunk = chunk.module
    return chunk
