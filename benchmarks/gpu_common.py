"""What the parts of the GPU check share: findings, kept as they are made, timing, and models drawn on the device."""

from __future__ import annotations

import gc
import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.measure import gemm_peak, synchronize

if TYPE_CHECKING:
    from steerlm_megatron.config.schema import ModelConfig
    from steerlm_megatron.model.gpt import PackedGPTModel

DENSE_BF16 = 989e12  # FLOP/s of an H100 SXM and of an H200, without sparsity, by NVIDIA's data sheets


@dataclass
class Findings:
    """What a part has found so far, and the time that it has left."""

    file: Path
    until: float  # seconds since 1970
    traces: Path  # folder
    tiny: bool
    found: dict[str, Any] = field(default_factory=dict)
    begin: float = field(default_factory=time.time)

    def note(self, key: str, value: object) -> None:
        """Keep a finding: print it, and have it in the file."""
        self.found[key] = value
        print(f"[{time.time() - self.begin:6.1f} s] {key}: {value}", flush=True)
        temporary = self.file.with_name(self.file.name + ".tmp")
        temporary.write_text(json.dumps(self.found, indent=1, default=str))
        os.replace(temporary, self.file)

    def left(self) -> float:
        """Return the seconds until the part has to end."""
        return self.until - time.time()

    def measure(self, key: str, function: Callable[[], object], need: float = 0.0) -> None:
        """Note what ``function`` returns, or its error. With less than ``need`` seconds left it is not called."""
        if self.left() < need:
            self.note(key, f"skipped: {self.left():.0f} s left, needs {need:.0f}")
            return
        free()
        try:
            self.note(key, function())
        except (Exception, SystemExit) as e:
            self.note(key, error_text(e))
            traceback.print_exc()


def error_text(error: BaseException) -> str:
    """Return an error as a finding, which a reader tells from the others by its first word."""
    return f"ERROR {type(error).__name__}: {error}".strip()[:1500]


def free() -> None:
    """Give back the device memory that nobody refers to, so that the next measurement has all, and its own peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def timed(function: Callable[[], object], repeats: int) -> list[float]:
    """Return the seconds of each of ``repeats`` calls, until the device has done what they ask for."""
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def memory_gib() -> float:
    """Return the peak memory of this measurement, in GiB; on a CPU of this process."""
    from steerlm_megatron.runtime.device import peak_memory_gib

    return round(peak_memory_gib(), 2)


def start_groups() -> None:
    """Start the groups of one rank, which a model needs."""
    from steerlm_megatron.config.schema import ParallelConfig
    from steerlm_megatron.runtime import parallel

    parallel.initialize(ParallelConfig(), seed=0)


def peer_on_device(*args: Any, **kwargs: Any) -> torch.nn.Module:
    """Return ``benchmarks.peers.llama``'s model, drawn on the device: a CPU would draw 1b weights for minutes."""
    from benchmarks import peers
    from steerlm_megatron.runtime.device import device

    with torch.device(device()):
        return peers.llama(*args, **kwargs)


@torch.no_grad()
def draw_on_device(gpt: PackedGPTModel, model: ModelConfig, vocab_size: int, seed: int) -> PackedGPTModel:
    """Fill ``gpt`` as ``model.weights.initialize`` does, with other values, drawn where the parameters are.

    Nothing that is measured here depends on the values, and that function's draws on the CPU would take minutes.
    """
    for name, parameter in gpt.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(0.0 if model.norm == "layernorm1p" else 1.0)
        else:
            generator = torch.Generator(parameter.device).manual_seed(seed)
            parameter.normal_(0.0, model.init_std, generator=generator)
            seed += 1
    return gpt


def copy_rate(tiny: bool) -> float:
    """Return the GB/s, read and written, of copying a large tensor on the device."""
    source = torch.randn((1 << 20) if tiny else (1 << 30), device="cuda" if torch.cuda.is_available() else "cpu")
    target = torch.empty_like(source)
    return round(2 * source.numel() * 4 / min(timed(lambda: target.copy_(source), 8)) / 1e9, 1)


def product_rate(tiny: bool) -> float:
    """Return the FLOP/s of a large bf16 matrix product."""
    return gemm_peak(torch.bfloat16, 256 if tiny else None)
