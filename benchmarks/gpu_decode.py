"""The part of the GPU check that generates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu_common import (
    Findings,
    copy_rate,
    draw_on_device,
    free,
    memory_gib,
    peer_on_device,
    start_groups,
    timed,
)
from benchmarks.gpu_profile import profiled

if TYPE_CHECKING:
    from steerlm_megatron.generate.generator import Generator
    from steerlm_megatron.generate.protocol import Request
    from steerlm_megatron.generate.scheduler import StepPlan
    from steerlm_megatron.model.gpt import PackedGPTModel


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
