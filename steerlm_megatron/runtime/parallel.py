"""Process groups and who this rank is in them.

Owns: starting ``torch.distributed`` and Megatron-Core's model-parallel groups, seeding, and :class:`Layout`, the answer
to "which rank am I". Does not own: starting processes (``launch``), ranks as a launcher numbers them (``launcher.py``).
Invariant: one layout per process; :func:`initialize` with the same sizes again is a no-op, so that the steps of a
pipeline can share a process.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from steerlm_megatron.config.schema import ParallelConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.runtime import device, launcher, mcore_compat

_PRETENDED = "pretended"  # the backend of groups that have no other processes


@dataclass(frozen=True)
class Layout:
    """This rank's coordinates and the sizes of the axes it lives on. ``rank`` is global."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    cp_rank: int = 0
    cp_size: int = 1

    @property
    def dp_cp_rank(self) -> int:
        """This rank's number among the ranks that hold the same parameters and add up gradients. As in Megatron-Core,
        context-parallel ranks of one replica are neighbours.
        """
        return self.dp_rank * self.cp_size + self.cp_rank

    @property
    def dp_cp_size(self) -> int:
        return self.dp_size * self.cp_size

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes that must be equal for a rank's generator states to fit. Without context parallelism there are
        three, as in checkpoints from before it.
        """
        sizes = (self.pp_size, self.tp_size, self.dp_size)
        return sizes if self.cp_size == 1 else (*sizes, self.cp_size)

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    @property
    def is_model_head(self) -> bool:
        """Whether this is the first rank of its data-parallel replica, which speaks for the replica."""
        return self.tp_rank == 0 and self.pp_rank == 0 and self.cp_rank == 0


def _start_torch_distributed(timeout_sec: int) -> None:
    if dist.is_initialized():
        return
    timeout = timedelta(seconds=timeout_sec)
    if launcher.world_size() == 1:
        # A run of one process needs no network and no port.
        dist.init_process_group(device.backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    try:
        dist.init_process_group(device.backend(), timeout=timeout, **_store_after_restart(timeout))
    except dist.DistNetworkError as error:
        where = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} MASTER_PORT={os.environ.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"{where}: another program listens there; set MASTER_PORT to a free port, the same for all ranks"
            ) from error
        raise UserError(
            f"{where}: rank {launcher.global_rank()} cannot reach rank 0 ({str(error).splitlines()[0]}); is that host "
            "up and reachable from here, and did rank 0 start?"
        ) from error


def _store_after_restart(timeout: timedelta) -> dict[str, Any]:
    """Return arguments of ``init_process_group`` for ranks that torchrun has restarted (``--max-restarts``).

    They use the store of torchrun's agent under a new prefix, because torch 2.13 hands them the store of the ranks
    before, in which gloo finds the addresses of dead processes and waits for them.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    address, rank, ranks = os.environ["MASTER_ADDR"], launcher.global_rank(), launcher.world_size()
    store = dist.TCPStore(address, int(os.environ["MASTER_PORT"]), ranks, is_master=False, timeout=timeout)
    return {"store": dist.PrefixStore(f"attempt_{attempt}", store), "rank": rank, "world_size": ranks}


def connect(timeout_sec: int = 600) -> None:
    """Connect this rank with the others, before the layout is known; nothing if it is connected. Collective over the
    world.
    """
    mcore_compat.apply()
    launcher.set_torch_variables()
    device.set_cpu_threads(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if device.has_cuda():
        torch.cuda.set_device(device.device())
    _start_torch_distributed(timeout_sec)


def initialize(parallel: ParallelConfig, seed: int, timeout_sec: int = 600) -> Layout:
    """Start (or reuse) the groups of ``parallel`` and seed this rank. Collective over the world.

    Ranks are numbered in Megatron-Core's order: tensor-parallel ranks are neighbours, then context, then data, then
    pipeline. Seeds follow its rule too: they are the same everywhere outside tensor-parallel regions, differ per
    tensor-parallel rank inside, and differ per pipeline stage. Context-parallel ranks have different seeds as well:
    they hold different tokens, which must not share a dropout mask.
    """
    connect(timeout_sec)
    sizes = (parallel.tensor, parallel.pipeline, parallel.virtual_pipeline, parallel.context)
    if parallel_state.is_initialized() and getattr(initialize, "sizes", None) != sizes:
        _destroy_groups()
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
            context_parallel_size=parallel.context,
            distributed_timeout_minutes=timeout_sec
            / 60,  # Megatron-Core turns it into a timedelta, so a fraction is fine
        )
        initialize.sizes = sizes  # type: ignore[attr-defined]
    seed_everything(seed)
    return layout()


def _destroy_groups() -> None:
    """Destroy the process groups. Megatron-Core only forgets them, and torch keeps them."""
    dist.barrier()  # no rank closes what another still reads
    parallel_state.destroy_model_parallel()
    gc.collect()  # an engine has reference cycles and holds its groups, each with a thread, until it is collected
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def seed_everything(seed: int) -> None:
    """Seed torch and Megatron-Core's model-parallel generators for this rank."""
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    stage_seed += 100_000 * parallel_state.get_context_parallel_rank()
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)


def layout() -> Layout:
    """Return the coordinates of this rank in the initialised groups."""
    return Layout(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
    )


def shutdown() -> None:
    """Wait for all ranks and tear the groups down, so that no rank leaves while another still talks to it."""
    if dist.is_initialized():
        dist.barrier()
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def pretended(parallel: ParallelConfig, rank: int, world: int) -> Iterator[Layout]:
    """Be rank ``rank`` of ``world`` inside the ``with``, without any other process: collectives return at once and move
    nothing. For a process that has no groups.

    It is for building what a rank of a large run would hold, on ``meta`` (``plan/trace.py``).
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore, _create_fake_pg

    assert not dist.is_initialized(), "this process is a rank already"
    mcore_compat.apply()
    if not hasattr(dist.Backend, _PRETENDED.upper()):
        # torch's fake groups, for tensors on meta as well
        dist.Backend.register_backend(_PRETENDED, _create_fake_pg, extended_api=True, devices=["cpu", "meta"])
    dist.init_process_group(_PRETENDED, store=FakeStore(), rank=rank, world_size=world)
    new_group = dist.new_group
    try:
        # Megatron-Core asks for groups of gloo beside the usual ones
        dist.new_group = lambda *args, **kwargs: new_group(*args, **{**kwargs, "backend": _PRETENDED})
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
            context_parallel_size=parallel.context,
        )
        seed_everything(0)
        yield layout()
    finally:
        dist.new_group = new_group
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
