"""Small collectives on plain Python values, for control flow. They are too slow for inner loops."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from steerlm_megatron.errors import ReportedElsewhere, UserError
from steerlm_megatron.runtime import launcher

T = TypeVar("T")
_POLL_SEC = 0.05
_MAIN_FIRST_SEC = 1.0
_calls = count()  # of on_main and on_each_host, the same number on every rank


def broadcast_object(value: T, source: int = 0) -> T:
    """Return rank ``source``'s value on every rank. Collective over the world."""
    if dist.get_world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Return every rank's value, in rank order, on every rank. Collective over the world."""
    if dist.get_world_size() == 1:
        return [value]
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def any_rank(flag: bool) -> bool:
    """Return True on every rank if ``flag`` is true on any. Collective over the world."""
    if dist.get_world_size() == 1:
        return flag
    tensor = torch.tensor(
        [int(flag)], dtype=torch.int32
    )  # on the host, so that gloo sends it and no GPU stream is waited for
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return bool(tensor.item())


def barrier() -> None:
    """Wait for every rank. Collective over the world."""
    if dist.get_world_size() > 1:
        any_rank(False)


def on_main(action: Callable[[], T]) -> T | None:
    """Call ``action()`` on rank 0 and return its result there, None on the others.

    The other ranks wait for as long as it takes: no collective's timeout ends them. An exception ends every rank in the
    same way. Collective over the world.
    """
    if dist.get_world_size() == 1:
        return action()
    key, store = f"on_main_{next(_calls)}", dist.distributed_c10d._get_default_store()
    if dist.get_rank() != 0:
        while not store.check([key]):
            time.sleep(_POLL_SEC)
        outcome = json.loads(store.get(key))
        barrier()
        _end_as(outcome, 0)
        return None
    outcome = None
    try:
        return action()
    except BaseException as error:
        outcome = _outcome_of(error)
        raise
    finally:
        store.set(key, json.dumps(outcome))
        barrier()
        store.delete_key(key)


def on_each_host(action: Callable[[], object]) -> None:
    """Call ``action()`` on the first rank of each host.

    The other ranks wait for as long as it takes: no collective's timeout ends them. An exception on one host ends every
    rank in the same way. Collective over the world.
    """
    if dist.get_world_size() == 1:
        action()
        return
    rank = dist.get_rank()
    first = [found for found, is_first in enumerate(gather_objects(launcher.local_rank() == 0)) if is_first]
    keys, store = f"on_each_host_{next(_calls)}_", dist.distributed_c10d._get_default_store()
    failed: BaseException | None = None
    if rank in first:
        try:
            action()
        except BaseException as error:
            failed = error
        store.set(f"{keys}{rank}", json.dumps(None if failed is None else _outcome_of(failed)))
    while not store.check([f"{keys}{found}" for found in first]):
        time.sleep(_POLL_SEC)
    outcomes = {found: json.loads(store.get(f"{keys}{found}")) for found in first}
    barrier()  # the rank that has the store waits until all have read it
    if failed is not None:
        raise failed
    for found, outcome in outcomes.items():
        _end_as(outcome, found)


def _outcome_of(error: BaseException) -> dict[str, Any]:
    """Return what other ranks have to know of an exception, as plain data."""
    kind = next((k.__name__ for k in (UserError, SystemExit) if isinstance(error, k)), type(error).__name__)
    return {"kind": kind, "code": getattr(error, "code", None), "text": f"{error}"}


def _end_as(outcome: dict[str, Any] | None, rank: int) -> None:
    """Raise what rank ``rank`` raised, which reports it itself; nothing if it raised nothing."""
    if outcome is None:
        return
    if outcome["kind"] == "UserError":
        error = ReportedElsewhere(outcome["text"])
        error.code = outcome["code"]
        raise error
    if outcome["kind"] == "SystemExit":
        raise SystemExit(outcome["code"])
    raise RuntimeError(f"rank {rank} failed: {outcome['text']}")


def first_to_report(text: str) -> bool:
    """Return whether this rank is the first to report ``text``; other ranks give rank 0 a moment to be the first.

    Not collective: ranks may call it or not.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    key = f"said_{hashlib.sha256(text.encode()).hexdigest()}"
    try:
        store = dist.distributed_c10d._get_default_store()
        deadline = time.monotonic() + (0.0 if dist.get_rank() == 0 else _MAIN_FIRST_SEC)
        while time.monotonic() < deadline and not store.check([key]):
            time.sleep(_POLL_SEC)
        return store.add(key, 1) == 1
    except RuntimeError:  # the rank that holds the store is gone, and nobody knows whether it reported this
        return True


def sum_from_last_stage(sums_M: torch.Tensor) -> torch.Tensor:
    """Add ``sums_M`` over data- and context-parallel ranks and hand the last stage's total to every stage, in place.

    ``sums_M``: [M] or a scalar on the device; stages other than the last pass any of the same shape. Collective over
    the world.
    """
    if dist.get_world_size() > 1:
        dist.all_reduce(sums_M, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(sums_M, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return sums_M


def sum_over_data_parallel(values: list[float], with_context: bool = False) -> list[float]:
    """Return the element-wise sum over data-parallel ranks, or over all that hold the same parameters
    (``with_context``).

    Collective over that group.
    """
    group = parallel_state.get_data_parallel_group_gloo(with_context_parallel=with_context)
    if dist.get_world_size(group) == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)  # on the host, so that no GPU stream is waited for
    dist.all_reduce(total, group=group)
    return total.tolist()


def sum_over_context(values: torch.Tensor) -> None:
    """Add up ``values`` of the ranks that share rows, in place. Collective over the context-parallel group."""
    dist.all_reduce(values, group=parallel_state.get_context_parallel_group())


def broadcast_in_replica(value: T, from_last_stage: bool = True) -> T:
    """Return a replica's value from its last pipeline stage (tensor-parallel rank 0 there), else its first, on all of
    its ranks.

    Collective over the model-parallel group.
    """
    group = parallel_state.get_model_parallel_group()
    if dist.get_world_size(group) == 1:
        return value
    ranks = dist.get_process_group_ranks(group)
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    # Megatron-Core numbers tensor-parallel ranks next to each other, so a sorted replica ends with its last stage.
    source = sorted(ranks)[-tensor] if from_last_stage else min(ranks)
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=source, group=group)
    return box[0]
