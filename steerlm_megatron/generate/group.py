"""The ranks that hold one model replica, as generation sees them.

Owns: which rank leads, which rank samples, and the three messages of a step (plan, hidden states, sampled ids). Does
not own: the content of messages. Invariant: every rank of the replica makes the same calls in the same order; the
leader decides, the others follow.
"""

from __future__ import annotations

import pickle
from typing import Any, Protocol

import torch
import torch.distributed as dist

HEARTBEAT_SEC = 5.0


class ModelGroup(Protocol):
    """The TP × PP ranks of one model replica, which run in lockstep."""

    size: int
    is_leader: bool  # owns the queue and the HTTP server
    is_first_stage: bool
    is_last_stage: bool
    is_sampler: bool  # draws the tokens; it is one rank of the last stage
    heartbeat_sec: float  # an idle leader sends a message this often, well within any collective timeout

    def broadcast(self, value: Any) -> Any:
        """Return the leader's ``value`` on every rank. Collective over the replica."""
        ...

    def least(self, value: int) -> int:
        """Return the smallest ``value`` of all ranks. Collective over the replica."""
        ...

    def wait_for_all(self) -> None:
        """Return when every rank has called it. Collective over the replica."""
        ...

    def receive_hidden(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return hidden states from the stage before."""
        ...

    def send_hidden(self, hidden: torch.Tensor) -> None:
        """Send hidden states to the next stage."""
        ...

    def broadcast_sampled(self, sampled: torch.Tensor) -> torch.Tensor:
        """Return the last stage's ``sampled`` (CPU) on every rank; others pass a buffer of its shape. Collective over
        the replica."""
        ...


class LocalGroup:
    """A replica that is one process; torch.distributed is not touched."""

    size = 1
    is_leader = True
    is_first_stage = True
    is_last_stage = True
    is_sampler = True
    heartbeat_sec = HEARTBEAT_SEC

    def broadcast(self, value: Any) -> Any:
        return value

    def least(self, value: int) -> int:
        return value

    def wait_for_all(self) -> None:
        pass

    def receive_hidden(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        raise AssertionError("one stage only")

    def send_hidden(self, hidden: torch.Tensor) -> None:
        raise AssertionError("one stage only")

    def broadcast_sampled(self, sampled: torch.Tensor) -> torch.Tensor:
        return sampled


class MegatronGroup:
    """The TP × PP ranks of this process's data-parallel replica. Construction is collective over the replica."""

    def __init__(self, timeout_sec: int) -> None:
        """``timeout_sec`` is the time after which a collective that some rank does not join ends the run."""
        from megatron.core import parallel_state

        # Control messages are small CPU tensors, which this group sends through gloo also where its backend is NCCL
        # (``runtime.device.backend``), so that they never wait for a GPU's stream.
        self._control = parallel_state.get_model_parallel_group()
        ranks = dist.get_process_group_ranks(self._control)
        self._pipeline = parallel_state.get_pipeline_model_parallel_group()
        self.size = len(ranks)
        self._leader = min(ranks)
        self.is_leader = dist.get_rank() == self._leader
        stage = parallel_state.get_pipeline_model_parallel_rank()
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        self.is_first_stage, self.is_last_stage = stage == 0, stage == stages - 1
        self._previous = parallel_state.get_pipeline_model_parallel_prev_rank()
        self._next = parallel_state.get_pipeline_model_parallel_next_rank()
        # The first rank of the last stage samples. It sends the tokens to the other tensor-parallel ranks of its stage
        # too, so that a difference in the last bit of their logits cannot make them diverge.
        last = self.broadcast(parallel_state.get_pipeline_model_parallel_last_rank() if self.is_leader else None)
        self._sampling_rank: int = last
        self.heartbeat_sec = min(HEARTBEAT_SEC, timeout_sec / 4)
        self.is_sampler = dist.get_rank() == self._sampling_rank

    def broadcast(self, value: Any) -> Any:
        """Broadcast the leader's value, pickled, by two gloo broadcasts (size, bytes)."""
        if self.is_leader:
            data = torch.frombuffer(bytearray(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)), dtype=torch.uint8)
            size = torch.tensor([data.numel()], dtype=torch.int64)
            dist.broadcast(size, src=self._leader, group=self._control)
            dist.broadcast(data, src=self._leader, group=self._control)
            return value
        size = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(size, src=self._leader, group=self._control)
        data = torch.empty(int(size.item()), dtype=torch.uint8)
        dist.broadcast(data, src=self._leader, group=self._control)
        return pickle.loads(data.numpy().tobytes())

    def least(self, value: int) -> int:
        least = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self._control)
        return int(least.item())

    def wait_for_all(self) -> None:
        dist.all_reduce(torch.zeros(1), group=self._control)

    def receive_hidden(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        hidden = torch.empty(shape, dtype=dtype, device=device)
        dist.recv(hidden, src=self._previous, group=self._pipeline)
        return hidden

    def send_hidden(self, hidden: torch.Tensor) -> None:
        dist.send(hidden.contiguous(), dst=self._next, group=self._pipeline)

    def broadcast_sampled(self, sampled: torch.Tensor) -> torch.Tensor:
        dist.broadcast(sampled, src=self._sampling_rank, group=self._control)
        return sampled


def model_group(timeout_sec: int = 600) -> ModelGroup:
    """Return the group that fits this process: a replica of one needs no messages. Collective over the replica.

    ``timeout_sec``: ``engine.timeout_sec``, with which the process groups were made.
    """
    if not dist.is_initialized():
        return LocalGroup()
    from megatron.core import parallel_state

    if not parallel_state.is_initialized() or dist.get_world_size(parallel_state.get_model_parallel_group()) == 1:
        return LocalGroup()
    return MegatronGroup(timeout_sec)
