"""The parts of the GPU check that train and score: benchmarks against their peer, and training steps of ours alone."""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from benchmarks.gpu_common import (
    DENSE_BF16,
    Findings,
    draw_on_device,
    error_text,
    memory_gib,
    peer_on_device,
    product_rate,
    start_groups,
    timed,
)
from benchmarks.gpu_profile import profiled
from benchmarks.measure import Spread, gemm_peak

if TYPE_CHECKING:
    from steerlm_megatron.model.gpt import PackedGPTModel
    from steerlm_megatron.train.engine_mcore import MegatronEngine


def part_benchmark(name: str, findings: Findings, arguments: Sequence[str]) -> None:
    """Run ``benchmarks.NAME`` with as many rounds as there is time for, and note its numbers."""
    module: Any = importlib.import_module(f"benchmarks.{name}")
    module.initialize = draw_on_device
    module.peers = SimpleNamespace(**{**vars(module.peers), "llama": peer_on_device})
    module.interleave = partial(interleave_until, findings)
    module.report = partial(noted_report, findings, module.report)
    if findings.tiny:
        module.gemm_peak = lambda dtype: gemm_peak(dtype, 256)
    sys.argv = [f"benchmarks.{name}", *arguments]
    findings.note("arguments", " ".join(arguments))
    try:
        module.main()
    except BaseException as e:
        findings.note("ERROR", error_text(e))
        findings.note("memory GiB", memory_gib())
        raise


def interleave_until(
    findings: Findings, contestants: dict[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Do as ``benchmarks.measure.interleave``, but end after two rounds or more when there is no time for another."""
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        if number >= 2 and findings.left() < 1.6 * sum(times[-1] for times in seconds.values()) + 4:
            print(f"no time for more than {number} of {rounds} rounds")
            break
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            elapsed = timed(contestants[name], 1)[0]
            if number >= 0:
                seconds[name].append(elapsed)
        findings.note("seconds", seconds)
    return seconds


def noted_report(
    findings: Findings, report: Callable[..., str], args: argparse.Namespace, docs: Sequence[Any], origin: str,
    seconds: dict[str, list[float]], *rest: Any,
) -> str:  # fmt: skip
    """Note the numbers of which a benchmark's ``report`` makes its section, and return that."""
    text = report(args, docs, origin, seconds, *rest)
    useful = sum(len(doc.tokens) for doc in docs)
    medians = {name: Spread.of(times).median for name, times in seconds.items()}
    ours, *others = medians
    findings.note("tokens", useful)
    findings.note("tokens/s", {name: round(useful / median) for name, median in medians.items()})
    findings.note("x faster than", {name: round(medians[name] / medians[ours], 3) for name in others})
    if rest:  # of training
        flops, peak, losses = rest
        findings.note("flops of a step", flops)
        findings.note("gemm peak", peak)
        findings.note("MFU of 989 TFLOP/s", {name: round(flops / m / DENSE_BF16, 4) for name, m in medians.items()})
        findings.note("MFU of gemm peak", {name: round(flops / m / peak, 4) for name, m in medians.items()})
        findings.note("first losses", losses)
    findings.note("memory GiB", memory_gib())
    findings.found["markdown"] = text  # which the benchmark prints itself
    findings.note("done", True)
    return text


def part_step(findings: Findings) -> None:
    """Measure training steps of ours alone, by what they may depend on."""
    start_groups()
    peak = product_rate(findings.tiny)
    findings.note("gemm TFLOP/s", round(peak / 1e12, 2))
    base, large, repeats = ("tiny", "tiny", 2) if findings.tiny else ("1b", "3b", 5)
    step = partial(training_step, findings, peak)
    measure = findings.measure
    measure("1b micro 2", partial(step, base, 2, repeats, profile=True))
    measure("1b micro 2, compile=false", partial(step, base, 2, repeats, compile=False), 20)
    measure("1b micro 4", partial(step, base, 4, repeats), 15)
    measure("3b micro 1", partial(step, large, 1, 3), 25)
    measure("1b micro 1", partial(step, base, 1, repeats), 15)
    measure("1b micro 2, attention=sdpa", partial(step, base, 2, 3, attention="sdpa"), 20)
    measure("1b micro 4, recompute=selective", partial(step, base, 4, 3, recompute="selective"), 15)


def make_engine(shape: str, vocab: int, engine: dict[str, Any]) -> tuple[PackedGPTModel, MegatronEngine]:
    """Return a model with values, and the engine that trains it."""
    from benchmarks.train_packed import OPTIM, SHAPES
    from steerlm_megatron.config.schema import EngineConfig, ParallelConfig
    from steerlm_megatron.model.gpt import build_model
    from steerlm_megatron.train.engine_mcore import MegatronEngine
    from steerlm_megatron.train.objective import TokenObjective

    config = EngineConfig(**engine)
    model = draw_on_device(build_model(SHAPES[shape], ParallelConfig(), config, vocab), SHAPES[shape], vocab, seed=1)
    return model, MegatronEngine([model], TokenObjective(), OPTIM, config, steps=10_000)


def training_step(
    findings: Findings, peak: float, shape: str, micro_rows: int, repeats: int, profile: bool = False, **engine: Any
) -> dict[str, Any]:
    """Measure steps of one model on micro-batches of ``micro_rows`` rows; ``engine`` are keys of its configuration."""
    from benchmarks import train_packed

    precision, vocab, row, tokens = ("fp32", 512, 128, 400) if findings.tiny else ("bf16", 32000, 4096, 128000)
    if shape == "3b":
        tokens //= 2
    start = time.perf_counter()
    model, trainer = make_engine(shape, vocab, {"precision": precision, **engine})
    try:
        docs, _ = train_packed.documents(None, tokens, vocab, row, regression=False)
        batches = train_packed.our_batches(docs, row, False, micro_rows)
        flops = train_packed._flops(model, train_packed.SHAPES[shape], docs, False)
        useful, slots = sum(len(doc.tokens) for doc in docs), sum(batch.tokens_T.numel() for batch in batches)
        built = time.perf_counter() - start
        first = timed(lambda: trainer.train_step(batches), 1)[0]
        trainer.train_step(batches)
        result = trainer.train_step(batches)
        times = timed(lambda: trainer.train_step(batches), repeats)
        median = statistics.median(times)
        out = {
            "ms": [round(1e3 * t, 1) for t in times], "tokens/s": round(useful / median),
            "micro_batches": len(batches), "useful": useful, "fill": round(useful / slots, 3),
            "TFLOP/s": round(flops / median / 1e12, 2), "MFU of 989": round(flops / median / DENSE_BF16, 4),
            "MFU of gemm": round(flops / median / peak, 4), "memory GiB": memory_gib(), "build s": round(built, 1),
            "first step s": round(first, 1), "loss": round(result.loss, 4),
            "optimizer ms": round(1e3 * result.seconds["optimizer"], 1),
        }  # fmt: skip
        if profile:
            out["profile"] = profiled(lambda: trainer.train_step(batches), findings.traces / "trace_train.json", 1)
        return out
    finally:
        trainer.close()  # without it, its tensors would stay
