"""``generation.engine=vllm``: what vLLM needs beside requests: a Hugging Face folder, memory, GPUs.

Owns: writing that folder once for a run, dividing memory and GPUs. Does not own: drawing (``generate/vllm_engine.py``),
the folder's content (``export_hf.py``). Invariant: the folder belongs to the checkpoint by its identity, so that a run
that goes on with another checkpoint does not draw from the old one.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from steerlm_megatron.config.compose import quoted
from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.cache_size import chunk_tokens, limits_for
from steerlm_megatron.generate.group import ModelGroup, model_group
from steerlm_megatron.generate.protocol import Limits
from steerlm_megatron.generate.vllm_engine import VllmEngine
from steerlm_megatron.generate.vllm_process import Vllm, VllmSettings, start_vllm
from steerlm_megatron.model.arithmetic import Widths, kv_cache_bytes, model_parameters
from steerlm_megatron.model.packed_tokens import CacheShape
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.observe.runfolder import fingerprint
from steerlm_megatron.runtime import launcher
from steerlm_megatron.runtime.collectives import broadcast_object, gather_objects
from steerlm_megatron.runtime.device import device, dtype_of
from steerlm_megatron.runtime.independent_work import independent_work
from steerlm_megatron.stages.session import OpenedCheckpoint, Session

log = get_logger(__name__)

_FOLDER = "vllm"  # in the run folder


def open_vllm(here: Session, opened: OpenedCheckpoint, max_queue: int | None = None) -> VllmEngine:
    """Return the engine over the model of ``opened``. ``max_queue`` is set for a server. Collective over the world.

    Each replica's leader starts a vLLM with ``parallel.tensor`` × ``parallel.pipeline`` ranks on the GPUs of the
    replica, whose processes have no weights.

    Raises:
        UserError: the model has no Hugging Face form, a replica has ranks on several hosts, vLLM does not start.
    """
    group = model_group(here.config.engine.timeout_sec)
    devices, folder = _devices(here), _exported(here, opened)
    limits, cache_bytes, share = _sizes(here, opened, group)
    if max_queue is not None:
        limits = replace(limits, max_queue=max_queue)
    settings = VllmSettings(
        folder=folder,
        precision=here.config.engine.precision,
        tensor=here.config.parallel.tensor,
        pipeline=here.config.parallel.pipeline,
        max_batch=limits.max_batch,
        max_sequence_tokens=limits.max_sequence_tokens,
        chunk_tokens=limits.chunk_tokens,
        cache_bytes=cache_bytes,
        memory_share=share,
        eager=device().type != "cuda" or not here.config.generation.cuda_graphs,
        devices=devices,
    )
    vllm: Vllm | None = None
    problem: str | None = None
    with independent_work():  # vLLM loads for minutes, in which no rank waits in a collective
        if group.is_leader:
            try:
                vllm = start_vllm(settings)
            except UserError as e:
                problem = str(e)
    if (problem := group.broadcast(problem)) is not None:
        raise UserError(problem)
    return VllmEngine(vllm, opened.tokenizer, opened.template, limits, group, here.config.engine.timeout_sec)


def _sizes(here: Session, opened: OpenedCheckpoint, group: ModelGroup) -> tuple[Limits, int | None, float]:
    """Return the limits of requests, the bytes of vLLM's cache (None: what its share of the GPU leaves), and the share
    of the device's memory that vLLM takes.
    """
    where, wanted, precision, layout = (
        device(),
        here.config.generation,
        here.config.engine.precision,
        here.config.parallel,
    )
    model, longest = opened.model_config, opened.model_config.max_position
    if where.type == "cuda":
        sequence = min(wanted.max_sequence_tokens, longest)
        tokens = wanted.max_cache_tokens or wanted.max_batch * sequence
        limits = Limits(
            wanted.max_batch, sequence, max(tokens, sequence), block_tokens=wanted.block_tokens,
            chunk_tokens=chunk_tokens(wanted, where),
        )  # fmt: skip
        free, total = torch.cuda.mem_get_info(where)
        asked = wanted.max_cache_tokens is not None
        size = kv_cache_bytes(model, layout, limits.max_cache_tokens, precision) if asked else None
        return limits, size, wanted.memory_fraction * free / total
    w = Widths.of(model)
    shape = CacheShape(tuple(range(1, w.L // layout.pipeline + 1)), -(-w.G // layout.tensor), w.H, dtype_of(precision))
    weights = model_parameters(model, opened.tokenizer.vocab_size) * dtype_of(precision).itemsize
    limits = limits_for(wanted, longest, shape, where, group, still_to_load=weights // group.size)
    return limits, limits.max_cache_tokens * shape.token_bytes, wanted.memory_fraction


def remove_exported(here: Session) -> None:
    """Remove the folders that were written for vLLM. Only the main rank calls it, when nothing will be drawn again."""
    shutil.rmtree(here.folder / _FOLDER, ignore_errors=True)


def _devices(here: Session) -> str | None:
    """Return the GPUs of this rank's replica, as CUDA_VISIBLE_DEVICES names them. Collective over the world.

    Raises:
        UserError: they are on several hosts.
    """
    at = here.layout
    found = gather_objects((at.dp_rank, socket.gethostname(), launcher.local_rank()))
    hosts = {host for replica, host, _ in found if replica == at.dp_rank}
    if len(hosts) > 1:
        raise UserError(
            f"generation.engine=vllm: the {at.tp_size * at.pp_size} ranks of a replica (parallel.tensor x "
            f"parallel.pipeline) are on the hosts {' '.join(sorted(hosts))}; a replica has to fit one host"
        )
    if device().type != "cuda":
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    # A launcher that shows each rank its own GPU alone (SLURM's --gpus-per-task) hides those of the others.
    numbers = [number for replica, _, number in found if replica == at.dp_rank]
    if max(numbers) >= len(names):
        raise UserError(
            f"generation.engine=vllm: this rank sees {len(names)} GPUs of the {len(numbers)} that its replica has; let "
            "all ranks of a host see all of its GPUs"
        )
    return ",".join(names[number] for number in numbers)


def _exported(here: Session, opened: OpenedCheckpoint) -> Path:
    """Return the Hugging Face folder of the model: that of the checkpoint, if it is one, else one in the run folder,
    which is written unless it stands there. Collective over the world.

    Raises:
        UserError: the model has no such form.
    """
    if opened.hf is not None:
        return opened.folder
    source = opened.folder
    name = fingerprint({"checkpoint": str(source.resolve())}, [source / "meta.json"])[:16]
    target = Path(broadcast_object(str(here.folder.resolve() / _FOLDER / name)))
    problem: str | None = None
    with independent_work():
        if here.layout.rank == 0 and not (target / "config.json").is_file():
            problem = _export(source, target)
    problem = broadcast_object(problem)
    if problem is not None:
        raise UserError(f"generation.engine=vllm: {problem}")
    return target


def _export(source: Path, target: Path) -> str | None:
    """Write ``target`` in another process, which needs no GPU and gives its memory back. Return what went wrong."""
    log.info("writing %s for vLLM, in %s", source, target)
    environment = {name: value for name, value in os.environ.items() if name not in launcher.OF_A_RANK}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "steerlm_megatron", "export", f"checkpoint={quoted(str(source))}",
        f"output={quoted(str(target))}", f"run_dir={quoted(str(target.parent / f'{target.name}-export'))}",
        "export.format=hf", "overwrite=true",
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode == 0:
        return None
    told = [line for line in done.stderr.splitlines() if line.strip()]
    return f"writing the model in Hugging Face form failed: {told[-1] if told else f'exit code {done.returncode}'}"
