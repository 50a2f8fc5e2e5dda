"""The parts of ``gpu_session.sh`` that measure, and the summary of all of them.

    python -P benchmarks/gpu_parts.py env|train|annotate|step|decode|kernels|summary --json FILE [--until TIME] [--tiny]

It runs with the repository's root on PYTHONPATH. Invariant: a finding is in the file as soon as it is made, so a part
that is stopped leaves what it has measured, and an error is a finding like any other. Modules of the project are
imported by the part that measures them: where one cannot be imported, the other parts still say what they find.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import importlib
import inspect
import json
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.measure import Spread, gemm_peak, synchronize

if TYPE_CHECKING:
    from steerlm_megatron.config.schema import ModelConfig
    from steerlm_megatron.generate.generator import Generator
    from steerlm_megatron.generate.protocol import Request
    from steerlm_megatron.generate.scheduler import StepPlan
    from steerlm_megatron.model.gpt import PackedGPTModel
    from steerlm_megatron.train.engine_mcore import MegatronEngine

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


# ---- env: the machine


def part_env(findings: Findings) -> None:
    """Note versions, and what the memory and the matrix units of this very card reach."""
    findings.note("python", sys.version.split()[0])
    findings.note("torch", f"{torch.__version__} cuda {torch.version.cuda} cudnn {torch.backends.cudnn.version()}")
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        memory, kind = f"{card.total_memory / 2**30:.1f} GiB", f"sm_{card.major}{card.minor}"
        findings.note("gpu", f"{card.name}, {memory}, {kind}, {card.multi_processor_count} SMs")
        findings.note("nccl", str(torch.cuda.nccl.version()))
    names = "megatron-core deepspeed triton numpy transformers pydantic fastapi msgspec hydra-core pytest".split()
    findings.note("versions", {name: version(name) for name in names})
    findings.measure("import steerlm_megatron.cli", lambda: importlib.import_module("steerlm_megatron.cli").__name__)
    findings.measure("varlen_attn parameters", lambda: list(varlen_attention()[1]))
    findings.measure("copy GB/s (read + written)", partial(copy_rate, findings.tiny))
    findings.measure("gemm TFLOP/s bf16", lambda: round(product_rate(findings.tiny) / 1e12, 2))


def version(name: str) -> str:
    """Return the version of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "MISSING"


def varlen_attention() -> tuple[Callable[..., Any], Sequence[str]]:
    """Return torch's varlen attention and the names of its parameters, which differ between versions of torch."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, list(inspect.signature(varlen_attn).parameters)


def copy_rate(tiny: bool) -> float:
    """Return the GB/s, read and written, of copying a large tensor on the device."""
    source = torch.randn((1 << 20) if tiny else (1 << 30), device="cuda" if torch.cuda.is_available() else "cpu")
    target = torch.empty_like(source)
    return round(2 * source.numel() * 4 / min(timed(lambda: target.copy_(source), 8)) / 1e9, 1)


def product_rate(tiny: bool) -> float:
    """Return the FLOP/s of a large bf16 matrix product."""
    return gemm_peak(torch.bfloat16, 256 if tiny else None)


# ---- train, annotate: benchmarks against the peer


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


# ---- step: our training steps


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


# ---- profiles

KINDS = (
    ("gemm", r"gemm|cutlass|nvjet|sm90_xmma|cublas|splitK|wgrad|dgrad"),
    ("attention", r"flash|fmha|attention|cudnn_generated|mha_"),
    ("triton (compiled norm, RoPE, SwiGLU)", r"^triton_"),
    ("adam, clipping", r"adam|multi_tensor|foreach|lpnorm"),
    ("copy, fill", r"memcpy|memset|copy|fill|cast"),
    ("index", r"index|gather|scatter|embedding|sort|radix"),
    ("nccl", r"nccl"),
    ("softmax, reduce", r"softmax|reduce|norm"),
    ("elementwise", r"elementwise"),
)  # what a kernel does, by the first pattern that is found in its name
Span = tuple[float, float, str]  # begin and end in µs, name
LARGEST_TRACE = 15 << 20  # bytes, compressed; a larger one is not kept


def profiled(function: Callable[[], object], trace: Path, times: int) -> dict[str, Any]:
    """Return what the device did in ``times`` calls: kernels by kind and by name, how long it idled, largest gaps."""
    cuda = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        start = time.perf_counter()
        for _ in range(times):
            function()
        synchronize()
        wall = time.perf_counter() - start
    profile.export_chrome_trace(str(trace))
    data = trace.read_bytes()
    trace.unlink()
    packed = gzip.compress(data, 6)
    if len(packed) < LARGEST_TRACE:
        trace.with_suffix(".json.gz").write_bytes(packed)
    events = [event for event in json.loads(data)["traceEvents"] if "dur" in event]
    on_device = ("kernel", "gpu_memcpy", "gpu_memset") if cuda else ("cpu_op",)
    spans = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("cat") in on_device)
    # Triton launches through the driver.
    host = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    out = {"wall ms": round(1e3 * wall / times, 2), **device_time(spans, times), **host_time(host, times)}
    print(f"--- {trace.stem}, per call")
    for key, value in out.items():
        print(f"{key}:", *(value if isinstance(value, list) else [value]), sep="\n    ")
    return out


def device_time(spans: Sequence[Span], times: int) -> dict[str, Any]:
    """Return how a device's time was spent, per call; ``spans`` are of ``times`` calls, in the order of their begin."""
    busy, end, last = 0.0, spans[0][0] if spans else 0.0, ""
    gaps: list[tuple[float, str, str]] = []
    for begin, stop, name in spans:
        if begin > end:
            gaps.append((begin - end, last[:50], name[:50]))
        if stop > end:
            busy += stop - max(begin, end)
            end, last = stop, name
    total = end - spans[0][0] if spans else 0.0
    kinds: dict[str, list[float]] = {}
    names: dict[str, list[float]] = {}
    for begin, stop, name in spans:
        kind = next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")
        for table, key in ((kinds, kind), (names, name[:110])):
            table.setdefault(key, []).append(stop - begin)

    def lines(table: dict[str, list[float]], count: int) -> list[str]:
        largest = sorted(((sum(parts), len(parts), key) for key, parts in table.items()), reverse=True)[:count]
        share = 100 / max(busy, 1e-9)
        return [f"{t / 1e3 / times:9.3f} ms {n / times:8.0f}x {share * t:5.1f}%  {key}" for t, n, key in largest]

    return {
        "span ms": round(total / 1e3 / times, 2), "busy ms": round(busy / 1e3 / times, 2),
        "busy share": round(busy / max(total, 1e-9), 4), "kernels": round(len(spans) / times),
        "gaps > 20 us": round(sum(gap[0] > 20 for gap in gaps) / times),
        "gaps ms": round(sum(gap[0] for gap in gaps) / 1e3 / times, 2),
        "largest gaps (us, after, before)": [(round(gap), a, b) for gap, a, b in sorted(gaps, reverse=True)[:8]],
        "by kind": lines(kinds, 12), "by name": lines(names, 28),
    }  # fmt: skip


def host_time(events: Sequence[dict[str, Any]], times: int) -> dict[str, Any]:
    """Return how often the host launched something and waited for the device, per call."""
    waits = [event for event in events if "Synchronize" in event["name"]]
    return {
        "host launches": round(sum("Launch" in event["name"] for event in events) / times),
        "host waits": round(len(waits) / times, 1),
        "host waits ms": round(sum(event["dur"] for event in waits) / 1e3 / times, 2),
    }


# ---- decode: generation


class Numbers:
    """A tokenizer whose text is the ids in decimal. It has no control tokens, so that no response ends early."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    @property
    def controls(self) -> dict[str, int]:
        """No text is a control string."""
        return {}

    def control_id(self, text: str) -> int:
        raise KeyError(text)


class NoTemplate:
    """A template without control strings."""

    control_strings: tuple[str, ...] = ()
    stop_strings: tuple[str, ...] = ()
    response_suffix = ""


@dataclass(frozen=True)
class Step:
    """One step of a generator: its seconds, the rows that got a token, the prompt tokens that it computed."""

    seconds: float
    rows: int
    prompt_tokens: int


def part_decode(findings: Findings) -> None:
    """Measure generation by batch size and by what it may depend on; then ``transformers.generate``."""
    start_groups()
    rate = copy_rate(findings.tiny)
    findings.note("copy GB/s", rate)
    decoding = Decoding(findings, rate)
    new, prompt, batch = (6, 16, 2) if findings.tiny else (96, 512, 64)
    measure, run = findings.measure, decoding.run
    ragged = 2 * batch
    measure("1b batch 64", partial(run, "1b", batch, prompt, new, profile=True))
    measure("1b batch 1", partial(run, "1b", 1, prompt, new // 2), 5)
    measure("1b batch 256", partial(run, "1b", 4 * batch, prompt // 2, new), 8)
    measure("1b ragged", partial(decoding.ragged, ragged, prompt, new), 10)
    measure("7b batch 64", partial(run, "7b", batch, prompt, new, profile=True), 12)
    measure("7b batch 1", partial(run, "7b", 1, prompt, new // 2), 6)
    decoding.forget()
    measure("transformers 1b ragged", partial(decoding.ragged_by_peer, ragged, prompt, new), 15)
    measure("transformers 1b batch 64", partial(decoding.theirs, batch, prompt, new), 8)
    measure("1b batch 64, mixed lengths", partial(run, "1b", batch, prompt, new, mixed=True), 8)
    measure("1b batch 64, greedy", partial(run, "1b", batch, prompt, new, temperature=0.0), 8)
    measure("1b batch 64, no graphs", partial(run, "1b", batch, prompt, new, graphs=False), 8)
    measure("1b batch 64, compile=false", partial(run, "1b", batch, prompt, new, compiled=False), 8)


class Decoding:
    """Measurements of generation. It keeps the model of the last one, since the next one often takes the same."""

    def __init__(self, findings: Findings, copy_gb_per_sec: float) -> None:
        from benchmarks.train_packed import SHAPES
        from steerlm_megatron.config.schema import ModelConfig

        seven = ModelConfig("7b", num_layers=32, hidden_size=4096, num_heads=32, ffn_hidden_size=11008)
        self.shapes = {"1b": SHAPES["1b"], "7b": seven}
        self.precision, self.vocab = "bf16", 32000
        if findings.tiny:
            self.shapes = dict.fromkeys(self.shapes, SHAPES["tiny"])
            self.precision, self.vocab = "fp32", 512
        self.findings, self.copy_gb_per_sec = findings, copy_gb_per_sec
        self.models: dict[tuple[str, bool | None], PackedGPTModel] = {}

    def forget(self) -> None:
        """Give the model's memory back."""
        self.models.clear()
        free()

    def model(self, shape: str, compiled: bool | None) -> PackedGPTModel:
        """Return the model of a shape as ``steerlm generate`` has it."""
        from steerlm_megatron.config.schema import EngineConfig, ParallelConfig
        from steerlm_megatron.model.gpt import build_model
        from steerlm_megatron.runtime.device import dtype_of

        if (shape, compiled) not in self.models:
            self.forget()
            engine, config = EngineConfig(precision=self.precision, compile=compiled), self.shapes[shape]
            model = build_model(config, ParallelConfig(), engine, self.vocab, gather_logits=True)
            draw_on_device(model, config, self.vocab, seed=1).to(dtype_of(self.precision)).eval().requires_grad_(False)
            self.models[shape, compiled] = model
        return self.models[shape, compiled]

    def run(
        self, shape: str, batch: int, prompt: int, new: int, *, compiled: bool | None = None, graphs: bool = True,
        profile: bool = False, mixed: bool = False, temperature: float = 1.0,
    ) -> dict[str, Any]:  # fmt: skip
        """Measure ``batch`` responses of ``new`` tokens to prompts of ``prompt`` tokens (``mixed``: half as many to
        all), drawn twice.
        """
        from steerlm_megatron.generate.generator import Generator
        from steerlm_megatron.generate.protocol import Limits, Request, SamplingParams

        model = self.model(shape, compiled)
        limits = Limits(
            batch, 4096, max_cache_tokens=max(4096, batch * (prompt + new + 64) * 2), chunk_tokens=8192,
            overlap=torch.cuda.is_available(), cuda_graphs=graphs,
        )  # fmt: skip
        generator = Generator(model, Numbers(self.vocab), NoTemplate(), limits)
        g = torch.Generator().manual_seed(0)
        lengths = [prompt - (37 * i) % (prompt // 2) if mixed else prompt for i in range(batch)]

        def requests() -> list[Request]:
            """Prompts that no step has seen, so that nothing of them is in the cache."""
            prompts = [tuple(torch.randint(1, self.vocab, (length,), generator=g).tolist()) for length in lengths]
            return [
                Request(f"r{i}", ids, SamplingParams(temperature, max_tokens=new, seed=i))
                for i, ids in enumerate(prompts)
            ]

        first = sum(step.seconds for step in drawn(generator, requests()))
        steps = drawn(generator, requests())
        took = sum(step.seconds for step in steps)
        decode = [step for step in steps if not step.prompt_tokens]
        prefill = [step for step in steps if step.prompt_tokens]
        ms = sorted(1e3 * step.seconds for step in decode)
        tenth = len(ms) // 10
        moved = self.bytes_of_step(model, shape, batch * (prompt + new // 2))
        out = {
            "decode tokens/s": round(sum(step.rows for step in decode) / sum(step.seconds for step in decode)),
            "tokens/s with prefill": round(batch * new / took), "step ms median": round(statistics.median(ms), 2),
            "step ms p10-p90": (round(ms[tenth], 2), round(ms[-1 - tenth], 2)), "step ms max": round(ms[-1], 1),
            "floor ms (weights + cache bytes)": round(moved / self.copy_gb_per_sec / 1e6, 3),
            "prefill tokens/s": round(sum(s.prompt_tokens for s in prefill) / sum(s.seconds for s in prefill)),
            "first run s": round(first, 2), "second run s": round(took, 2), "memory GiB": memory_gib(),
        }  # fmt: skip
        if profile:
            handles = generator.submit_all(requests(), bounded=False)
            for _ in range(len(prefill) + 2):  # so that no prompt is left
                generator.step()
            out["profile"] = profiled(generator.step, self.findings.traces / f"trace_decode_{shape}.json", 3)
            for handle in handles:
                handle.cancel()
        return out

    def bytes_of_step(self, model: PackedGPTModel, shape: str, cached_tokens: int) -> int:
        """Return the bytes that a decoding step cannot but read: the weights, and the keys and values in the cache."""
        config = self.shapes[shape]
        weights = [p for name, p in model.named_parameters() if "embedding" not in name]
        head = config.hidden_size // config.num_heads
        numbers = 2 * config.num_layers * (config.num_query_groups or config.num_heads) * head
        size = weights[0].element_size()
        return sum(p.numel() * p.element_size() for p in weights) + cached_tokens * numbers * size

    def ragged_sizes(self, count: int, prompt: int, new: int) -> list[tuple[int, int]]:
        """Return lengths of prompts, an eighth of ``prompt`` to all of it, and numbers of tokens to draw, a quarter of
        ``new`` to twice ``new``: log-uniform, the lengths independent of the numbers.
        """
        g = torch.Generator().manual_seed(5)
        share = torch.rand(2, count, generator=g)
        lengths, numbers = (prompt * 8 ** (share[0] - 1)).int().tolist(), (new / 4 * 8 ** share[1]).int().tolist()
        return list(zip((max(1, n) for n in lengths), (max(1, n) for n in numbers), strict=True))

    def ragged(self, count: int, prompt: int, new: int) -> dict[str, Any]:
        """Measure responses of different lengths to prompts of different lengths, greedy, of which up to 64 run at a
        time.
        """
        from steerlm_megatron.generate.generator import Generator
        from steerlm_megatron.generate.protocol import Limits, Request, SamplingParams

        limits = Limits(64, 4096, max_cache_tokens=max(4096, 64 * (prompt + 2 * new)), chunk_tokens=2048,
                        overlap=torch.cuda.is_available())  # fmt: skip
        generator, g = Generator(self.model("1b", None), Numbers(self.vocab), NoTemplate(), limits), torch.Generator()
        sizes, seconds = self.ragged_sizes(count, prompt, new), []
        for _ in range(2):  # the first time, graphs are recorded
            asked = [
                Request(f"r{i}", tuple(torch.randint(1, self.vocab, (length,), generator=g).tolist()),
                        SamplingParams(0.0, max_tokens=number, ignore_eos=True))
                for i, (length, number) in enumerate(sizes)
            ]  # fmt: skip
            seconds += timed(lambda asked=asked: generator.generate(asked), 1)  # type: ignore[misc]
        tokens = sum(number for _, number in sizes)
        return {"tokens/s": round(tokens / seconds[1]), "first s": round(seconds[0], 2), "s": round(seconds[1], 2)}

    def ragged_by_peer(self, count: int, prompt: int, new: int) -> dict[str, Any]:
        """Measure the same with ``transformers.generate``: batches of 64 of like numbers of tokens to draw, prompts
        padded on the left.
        """
        from steerlm_megatron.runtime.device import device, dtype_of

        peer: Any = peer_on_device(self.shapes["1b"], self.vocab, "sdpa").to(dtype_of(self.precision)).eval()
        sizes = sorted(self.ragged_sizes(count, prompt, new), key=lambda size: size[1])

        @torch.inference_mode()
        def draw(batch: list[tuple[int, int]], most: int) -> None:
            longest = max(length for length, _ in batch)
            ids = torch.randint(1, self.vocab, (len(batch), longest), device=device())
            padding = torch.tensor([longest - length for length, _ in batch], device=device())
            mask = (torch.arange(longest, device=device()) >= padding[:, None]).long()
            peer.generate(ids, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, do_sample=False,
                          use_cache=True, pad_token_id=0, eos_token_id=None)  # fmt: skip

        draw(sizes[:64], 4)
        batches = [sizes[at : at + 64] for at in range(0, count, 64)]
        took = timed(lambda: [draw(batch, batch[-1][1]) for batch in batches], 1)[0]
        return {"tokens/s": round(sum(number for _, number in sizes) / took), "s": round(took, 2)}

    def theirs(self, batch: int, prompt: int, new: int) -> dict[str, Any]:
        """Measure ``transformers.generate`` with prompts of one length, at which it need not pad."""
        from steerlm_megatron.runtime.device import device, dtype_of

        peer: Any = peer_on_device(self.shapes["1b"], self.vocab, "sdpa").to(dtype_of(self.precision)).eval()
        ids = torch.randint(1, self.vocab, (batch, prompt), device=device())
        mask = torch.ones_like(ids)

        @torch.inference_mode()
        def draw(tokens: int) -> None:
            peer.generate(
                ids, max_new_tokens=tokens, min_new_tokens=tokens, attention_mask=mask, do_sample=True, top_k=50,
                use_cache=True, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip

        draw(4)
        whole, start = timed(lambda: draw(new), 1)[0], timed(lambda: draw(1), 1)[0]
        decode = whole - start
        return {"decode tokens/s": round(batch * (new - 1) / decode), "step ms": round(1e3 * decode / (new - 1), 2)}


def drawn(generator: Generator, requests: Sequence[Request]) -> list[Step]:
    """Answer ``requests`` and return the steps that it took."""
    plan_of, plans = generator.scheduler.plan, []

    def plan(gone: Callable[[Any], bool]) -> StepPlan | None:
        found = plan_of(gone)
        if found is not None:
            plans.append((len(generator.scheduler.sampling()), sum(count for _, count in found.chunks)))
        return found

    generator.scheduler.plan = plan  # type: ignore[method-assign]
    try:
        handles, seconds = generator.submit_all(requests, bounded=False), []
        while True:
            start = time.perf_counter()
            if not generator.step():
                break
            seconds.append(time.perf_counter() - start)
    finally:
        generator.scheduler.plan = plan_of  # type: ignore[method-assign]
    if generator.limits.overlap:  # the last call has read the last step
        seconds[-2:] = [sum(seconds[-2:])]
    for handle, request in zip(handles, requests, strict=True):
        assert len(handle.future.result(timeout=0).token_ids) == request.params.max_tokens
    return [Step(sec, rows, tokens) for sec, (rows, tokens) in zip(seconds, plans, strict=True)]


# ---- kernels

MODES = ("project", "static shapes", "token dimension dynamic")


@dataclass(frozen=True)
class Sizes:
    """T tokens, width D, MLP width F, N query heads and G key heads of H."""

    T: int = 8192
    D: int = 2048
    F: int = 8192
    N: int = 32
    G: int = 8
    H: int = 64


@dataclass(frozen=True)
class Kernel:
    """A formula of ``model/fused.py``: what it is called with, and the numbers that it cannot but read and write."""

    name: str
    formula: Callable[..., torch.Tensor]
    eager: Callable[..., torch.Tensor]  # what runs without engine.compile
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    numbers: int


def part_kernels(findings: Findings) -> None:
    """Measure compiled kernels by how their shapes are declared, and attention by how many key heads it gets."""
    tiny = findings.tiny
    sizes = Sizes(T=64, D=32, F=48, N=4, G=2, H=8) if tiny else Sizes()
    findings.note("copy GB/s", copy_rate(tiny))
    for kernel in kernels(sizes, torch.float32 if tiny else torch.bfloat16):
        for mode in MODES:
            findings.measure(f"{kernel.name}: {mode}", partial(kernel_rate, kernel, mode, sizes.T, tiny), 6)
        findings.measure(f"{kernel.name}: without compile", partial(kernel_rate, kernel, "eager", sizes.T, tiny), 3)
    if torch.cuda.is_available() and not tiny:
        for name, heads, length in (
            ("heads repeated, documents of 512", sizes.N, 512),
            ("8 groups as they are, documents of 512", sizes.G, 512),
            ("heads repeated, documents of 4096", sizes.N, 4096),
        ):
            findings.measure(f"varlen, {name}", partial(attention_rate, sizes, heads, length), 4)


def kernels(s: Sizes, dtype: torch.dtype) -> list[Kernel]:
    """Return the kernels of the project with inputs of sizes ``s``."""
    from steerlm_megatron.model import fused
    from steerlm_megatron.runtime.device import device

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device(), dtype=dtype)

    def norm_inputs() -> tuple[torch.Tensor, ...]:
        # As a Parameter the weight has a static size to dynamo.
        return random(s.T, 1, s.D).requires_grad_(), torch.nn.Parameter(torch.ones(s.D, device=device(), dtype=dtype))

    def rotate_inputs() -> tuple[torch.Tensor, ...]:
        return random(s.T, s.N, s.H).requires_grad_(), random(s.T, 1, s.H // 2), random(s.T, 1, s.H // 2)

    return [
        Kernel(
            "rms_norm", lambda x, weight_D: fused._rms_norm_formula(x, weight_D, 1e-5),
            lambda x, weight_D: fused.rms_norm(x, weight_D, 1e-5), norm_inputs, 2 * s.T * s.D,
        ),
        Kernel("swiglu", fused._swiglu_formula, fused.SwiGLU(), lambda: (random(s.T, 1, 2 * s.F).requires_grad_(),),
               3 * s.T * s.F),
        Kernel("rotate", fused._rotate_formula, fused.rotate, rotate_inputs, 2 * s.T * s.N * s.H),
    ]  # fmt: skip


def compiled(formula: Callable[..., torch.Tensor], mode: str, tiny: bool) -> Callable[..., torch.Tensor]:
    """Return ``formula`` compiled in one of MODES; a tiny one without generating code, which takes a CPU long."""
    from steerlm_megatron.model import fused

    if mode == "project" and not tiny:
        return fused.one_kernel(formula)
    dynamic = {"project": True, "static shapes": False, "token dimension dynamic": None}[mode]
    return torch.compile(formula, dynamic=dynamic, backend="eager" if tiny else "inductor")


def kernel_rate(kernel: Kernel, mode: str, tokens: int, tiny: bool) -> dict[str, Any]:
    """Measure a kernel forward and backward, and the host's part of a call."""
    torch._dynamo.reset()
    call = kernel.eager if mode == "eager" else compiled(kernel.formula, mode, tiny)
    inputs = kernel.inputs()
    for tensor in inputs if mode == "token dimension dynamic" else ():
        if len(tensor) == tokens:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    gradient = torch.randn_like(call(*inputs))

    def forward() -> None:
        call(*inputs)

    def both() -> None:
        for tensor in inputs:
            tensor.grad = None
        call(*inputs).backward(gradient)

    one_way, both_ways = median_seconds(forward), median_seconds(both)
    starts = [time.perf_counter()]
    for _ in range(20):
        forward()
        starts.append(time.perf_counter())
    host = statistics.median(b - a for a, b in zip(starts, starts[1:], strict=False))
    moved = kernel.numbers * inputs[0].element_size()
    return {
        "forward us": round(1e6 * one_way, 1), "GB/s": round(moved / one_way / 1e9, 1),
        "fwd+bwd us": round(1e6 * both_ways, 1), "host us of a call": round(1e6 * host, 1),
    }  # fmt: skip


def median_seconds(function: Callable[[], None]) -> float:
    """Return a call's seconds on the device; on a GPU, without what the host takes to launch it."""
    for _ in range(3):
        function()
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return do_bench(function, warmup=20, rep=60, return_mode="median") / 1e3
    return statistics.median(timed(function, 3))


def attention_rate(s: Sizes, heads_kv: int, length: int) -> dict[str, Any]:
    """Measure torch's varlen kernel on documents of ``length`` tokens with ``heads_kv`` key and value heads."""
    varlen, names = varlen_attention()
    total = 4 * s.T
    q, k, v = (
        torch.randn(total, heads, s.H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (s.N, heads_kv, heads_kv)
    )
    cu = torch.arange(0, total + 1, length, dtype=torch.int32, device="cuda")
    options: dict[str, Any] = {"is_causal": True} if "is_causal" in names else {"window_size": (-1, 0)}
    if heads_kv < s.N and "enable_gqa" in names:
        options["enable_gqa"] = True
    call = partial(varlen, q, k, v, cu, cu, length, length, **options)
    gradient = torch.randn_like(q)
    for _ in range(3):
        call().backward(gradient)
    one_way = statistics.median(timed(call, 10))
    both_ways = statistics.median(timed(lambda: call().backward(gradient), 10))
    flops = 4 * total * length / 2 * s.N * s.H
    return {
        "forward ms": round(1e3 * one_way, 3), "TFLOP/s": round(flops / one_way / 1e12, 1),
        "fwd+bwd ms": round(1e3 * both_ways, 3), "fwd+bwd TFLOP/s": round(3.5 * flops / both_ways / 1e12, 1),
    }  # fmt: skip


# ---- summary

ENDINGS = {0: "ok", 99: "skipped, no time", 124: "stopped at its limit", 137: "killed at its limit"}


def part_summary(file: Path, work: Path) -> None:
    """Put the findings of all parts into one file, and print what is asked first."""
    everything: dict[str, Any] = {"parts": {}}
    endings = work / "parts.tsv"
    for line in endings.read_text().splitlines() if endings.exists() else []:
        name, code, seconds = line.split("\t")
        everything["parts"][name] = {"rc": int(code), "seconds": int(seconds)}
    for path in sorted(work.glob("*.json")):
        try:
            everything[path.stem] = json.loads(path.read_text())
        except ValueError:
            everything[path.stem] = {"ERROR": "its file is not JSON"}
    if (work / "junit.xml").exists():
        everything["gpu tests"] = gpu_tests(work / "junit.xml")
    file.write_text(json.dumps(everything, indent=1, default=str))
    bar = "=" * 100
    print(bar, *summary_lines(everything), bar, sep="\n")


def gpu_tests(junit: Path) -> dict[str, Any]:
    """Return state, seconds and message of each test."""
    cases = {}
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        state, message = ("passed", "") if bad is None else (bad.tag, bad.get("message", ""))
        seconds = float(case.get("time", 0))
        cases[case.get("name", "")] = {"state": state, "seconds": seconds, "message": message[:600]}
    return cases


def summary_lines(everything: dict[str, Any]) -> Iterable[str]:
    """Yield the lines of the table that ends the output."""
    for name, part in everything["parts"].items():
        yield f"{name:20} {part['seconds']:4d} s  {ENDINGS.get(part['rc'], 'rc ' + str(part['rc']))}"
    env, tests = everything.get("env", {}), everything.get("gpu tests", {})
    rates = f"copy {env.get('copy GB/s (read + written)')} GB/s | gemm {env.get('gemm TFLOP/s bf16')} TFLOP/s"
    yield f"{env.get('gpu', 'no GPU')} | torch {env.get('torch')} | {rates}"
    for name, case in tests.items():
        if case["state"] != "passed":
            yield f"TEST {case['state']:7} {name}: {case['message'][:200]}"
    states = [case["state"] for case in tests.values()]
    if states:
        yield f"gpu tests: {', '.join(f'{states.count(state)} {state}' for state in sorted(set(states)))}"
    for name in ("train_1b", "train_1b_small", "train_1b_ap", "annotate"):
        part = everything.get(name)
        if part is not None:
            keys = ("tokens/s", "x faster than", "MFU of 989 TFLOP/s", "memory GiB", "ERROR")
            yield f"{name}: " + "; ".join(f"{key} {str(part[key])[:300]}" for key in keys if key in part)
    for name in ("step", "decode", "kernels"):
        for key, value in everything.get(name, {}).items():
            if isinstance(value, dict):
                yield from measurement_lines(f"{name} | {key}", value)
            elif "ERROR" in str(value) or "skipped" in str(value):
                yield f"{name} | {key}: {str(value)[:200]}"


def measurement_lines(title: str, found: dict[str, Any]) -> Iterable[str]:
    """Yield a measurement on one line, and the main figures of its profile below."""
    left_out = ("profile", "build s", "useful", "micro_batches")
    yield f"{title}: " + ", ".join(f"{key} {value}" for key, value in found.items() if key not in left_out)
    profile = found.get("profile")
    if profile:
        kernels, waits = profile["kernels"], profile["host waits"]
        yield f"    busy {profile['busy share']:.0%} of {profile['span ms']} ms, {kernels} kernels, waits {waits}"
        yield from ("    " + line for line in profile["by kind"][:6])


PARTS: dict[str, Callable[[Findings, list[str]], None]] = {
    "env": lambda findings, _: part_env(findings),
    "train": partial(part_benchmark, "train_packed"),
    "annotate": partial(part_benchmark, "annotate"),
    "step": lambda findings, _: part_step(findings),
    "decode": lambda findings, _: part_decode(findings),
    "kernels": lambda findings, _: part_kernels(findings),
}


def main() -> None:
    usage = "%(prog)s PART --json FILE [--until TIME] [--tiny] [-- arguments of the benchmark (train, annotate)]"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=usage)
    parser.add_argument("part", choices=[*PARTS, "summary"])
    parser.add_argument("--json", type=Path, required=True, help="the file of the findings")
    parser.add_argument("--until", type=float, default=float("inf"), help="when to end, in seconds since 1970")
    parser.add_argument("--traces", type=Path, default=os.environ.get("OUT", tempfile.gettempdir()), help="folder")
    parser.add_argument("--work", type=Path, help="summary: the folder of the parts' files")
    parser.add_argument("--tiny", action="store_true", help="small models, which a CPU runs in seconds")
    own, rest = sys.argv[1:], []
    if "--" in own:
        cut = own.index("--")
        own, rest = own[:cut], own[cut + 1 :]
    args = parser.parse_args(own)
    if args.part == "summary":
        part_summary(args.json, args.work or args.json.parent)
    else:
        PARTS[args.part](Findings(args.json, args.until, args.traces, args.tiny), rest)


if __name__ == "__main__":
    main()
