"""Compare the sampling engine with ``transformers.generate``, with the same weights and greedy tokens.

    python -m benchmarks.sample [--shape 10m] [--threads 1] [--rounds 5] [--output FILE.md]

Three questions: a decoding step at one length, by batch size (where the peer pads nothing); ragged requests to their
ends, against the peer in its best batch size, sorted by length; and what shared prefixes save (eight samples of a
prompt, and the variants of a prompt that ``evaluate`` asks). Before anything is timed, tokens are compared.
Contestants take turns; a ratio is taken within a round.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks import peers
from benchmarks.gpu_decode import NoTemplate, Numbers
from benchmarks.measure import Spread, commit, interleave, machine, markdown, rates, ratio
from steerlm_megatron.config.schema import EngineConfig, ModelConfig, ParallelConfig
from steerlm_megatron.generate.generator import Generator
from steerlm_megatron.generate.protocol import Limits, Request, SamplingParams
from steerlm_megatron.model.gpt import PackedGPTModel, build_model
from steerlm_megatron.model.weights import initialize
from steerlm_megatron.runtime import parallel
from steerlm_megatron.runtime.device import device, dtype_of

OURS, THEIRS = "steerlm_megatron", "transformers"
SHAPES = {
    "10m": ModelConfig(num_layers=6, hidden_size=320, num_heads=5, ffn_hidden_size=864, max_position=2048),
    "135m": ModelConfig(  # SmolLM2-135M's
        num_layers=30, hidden_size=576, num_heads=9, num_query_groups=3, ffn_hidden_size=1536, max_position=2048
    ),
}


@dataclass(frozen=True)
class Ask:
    """A prompt and how many tokens are drawn after it."""

    prompt: tuple[int, ...]
    new: int


class Ours:
    """The engine, with a cache that forgets all prefixes between calls."""

    def __init__(self, model: PackedGPTModel, vocab: int, max_batch: int) -> None:
        self.model, self.vocab, self.max_batch = model, vocab, max_batch

    def __call__(self, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
        generator = self.generator(asks)
        return [result.token_ids for result in generator.generate(requests(asks))]

    def generator(self, asks: Sequence[Ask]) -> Generator:
        longest = max(len(ask.prompt) + ask.new for ask in asks)
        blocks = sum(-(-(len(ask.prompt) + ask.new) // 16) for ask in asks)
        limits = Limits(self.max_batch, max_sequence_tokens=longest, max_cache_tokens=16 * blocks)
        return Generator(self.model, Numbers(self.vocab), NoTemplate(), limits)

    def step_sec(self, batch: int, prompt: int, new: int) -> float:
        """Seconds of a decoding step of ``batch`` sequences, on average over ``new`` - 1 of them."""
        asks = asked(self.vocab, [(prompt, new)] * batch)
        generator = self.generator(asks)
        generator.submit_all(requests(asks), bounded=False)
        while len(generator.scheduler.sampling()) < batch:  # until the last prompt is in the cache
            generator.step()
        start, before = time.perf_counter(), generator.steps
        while generator.step():
            pass
        return (time.perf_counter() - start) / (generator.steps - before)


def requests(asks: Sequence[Ask]) -> list[Request]:
    """Greedy requests."""
    return [
        Request(str(i), ask.prompt, SamplingParams(temperature=0.0, max_tokens=ask.new)) for i, ask in enumerate(asks)
    ]


class Theirs:
    """``transformers.generate`` on batches of like prompts, padded on the left."""

    def __init__(self, model: Any, batch: int) -> None:
        self.model, self.batch = model, batch

    @torch.inference_mode()
    def __call__(self, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
        order = sorted(range(len(asks)), key=lambda i: (asks[i].new, len(asks[i].prompt)))
        out: list[tuple[int, ...]] = [()] * len(asks)
        for at in range(0, len(order), self.batch):
            members = order[at : at + self.batch]
            longest, new = max(len(asks[i].prompt) for i in members), max(asks[i].new for i in members)
            ids = torch.zeros((len(members), longest), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(members):
                ids[row, longest - len(asks[i].prompt) :] = torch.tensor(asks[i].prompt)
                mask[row, longest - len(asks[i].prompt) :] = 1
            drawn = self.draw(ids.to(device()), mask.to(device()), new)[:, longest:].tolist()
            for row, i in enumerate(members):
                out[i] = tuple(drawn[row][: asks[i].new])
        return out

    def draw(self, ids: torch.Tensor, mask: torch.Tensor, new: int) -> torch.Tensor:
        out: torch.Tensor = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        return out

    @torch.inference_mode()
    def step_sec(self, vocab: int, prompt: int, new: int) -> float:
        """Seconds of a decoding step: those of ``new`` tokens less those of one."""
        ids = torch.tensor([ask.prompt for ask in asked(vocab, [(prompt, new)] * self.batch)]).to(device())
        seconds = []
        for tokens in (new, 1):
            start = time.perf_counter()
            self.draw(ids, torch.ones_like(ids), tokens)
            seconds.append(time.perf_counter() - start)
        return (seconds[0] - seconds[1]) / (new - 1)


def asked(vocab: int, sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Ask]:
    """Random prompts of (tokens, tokens drawn)."""
    rng = random.Random(seed)
    return [Ask(tuple(rng.randrange(1, vocab) for _ in range(prompt)), new) for prompt, new in sizes]


def ragged(vocab: int, count: int) -> list[Ask]:
    """Requests of log-normal lengths, of about 60 tokens each way, 200 at most."""
    rng = random.Random(1)
    sizes = [tuple(min(200, int(rng.lognormvariate(3.9, 0.7)) + 1) for _ in range(2)) for _ in range(count)]
    return asked(vocab, [(prompt, new) for prompt, new in sizes], seed=2)


def main() -> None:
    args = _arguments()
    parallel.initialize(ParallelConfig(), seed=0)
    torch.set_num_threads(args.threads)
    shape, vocab, dtype = SHAPES[args.shape], args.vocab, dtype_of(args.dtype)
    model = build_model(shape, ParallelConfig(), EngineConfig(precision=args.dtype), vocab, gather_logits=True)
    initialize(model, replace(shape, init_std=0.1), vocab, seed=1).eval()
    peer: Any = peers.llama(shape, vocab, "sdpa")
    peers.copy_weights(model, peer, shape)
    peer.to(device(), dtype).eval()
    ours = Ours(model, vocab, args.batch)
    asks = ragged(vocab, args.requests)
    runs: dict[str, Callable[[], Any]] = {OURS: lambda: ours(asks)}
    for batch in args.peer_batches:
        runs[f"{THEIRS}, batches of {batch}"] = partial(Theirs(peer, batch), asks)
    expected = ours(asks)
    same = _same(expected, Theirs(peer, args.peer_batches[-1])(asks))
    print(f"{same:.1%} of greedy tokens are equal up to the first that differs", flush=True)
    if same < (0.99 if args.dtype == "fp32" else 0.5):
        raise SystemExit("the contestants do not draw the same tokens: nothing is compared")
    text = [
        f"### {args.shape}, {args.dtype}, {args.threads} threads\n\n`python -m benchmarks.sample --shape {args.shape} "
        f"--dtype {args.dtype} --threads {args.threads} --rounds {args.rounds} --requests {args.requests}` "
        f"at {commit()}; {machine()}.\n",
        _steps(args, ours, peer),
        _whole(args, asks, runs),
        _shared(args, ours),
    ]
    print("\n".join(text))
    if args.output:
        with open(args.output, "a", encoding="utf-8") as file:
            file.write("\n".join(text) + "\n")


def _same(ours: Sequence[tuple[int, ...]], theirs: Sequence[tuple[int, ...]]) -> float:
    """Share of tokens before the first difference of each response. (After a near tie all tokens may differ.)"""
    equal = 0
    for a, b in zip(ours, theirs, strict=True):
        first = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        equal += first
    return equal / sum(map(len, ours))


def _steps(args: argparse.Namespace, ours: Ours, peer: Any) -> str:
    rows = []
    for batch in args.step_batches:
        found: dict[str, list[float]] = {OURS: [], THEIRS: []}
        contestants = {
            OURS: lambda batch=batch: ours.step_sec(batch, 64, args.new),
            THEIRS: lambda batch=batch: Theirs(peer, batch).step_sec(args.vocab, 64, args.new),
        }
        for run in contestants.values():  # warm
            run()
        for number in range(args.rounds):
            for name in (OURS, THEIRS) if number % 2 else (THEIRS, OURS):
                found[name].append(contestants[name]())
        ms = {name: Spread.of([1e3 * sec for sec in secs]) for name, secs in found.items()}
        rows.append([str(batch), ms[OURS].text(2), ms[THEIRS].text(2), ratio(found[OURS], found[THEIRS]).text(2)])
    header = ["batch", "ours, ms a step", f"{THEIRS}, ms a step", "× faster"]
    return f"A decoding step after 64 tokens of prompt, mean of {args.new - 1}:\n\n{markdown(header, rows)}\n"


def _whole(args: argparse.Namespace, asks: Sequence[Ask], runs: dict[str, Callable[[], Any]]) -> str:
    seconds = interleave(runs, args.rounds)
    drawn = sum(ask.new for ask in asks)
    best = min((name for name in seconds if name != OURS), key=lambda name: Spread.of(seconds[name]).median)
    rows = [
        [name, rates(times, drawn).text(), "" if name == OURS else ratio(seconds[OURS], times).text(2)]
        for name, times in seconds.items()
    ]
    return (
        f"{len(asks)} ragged requests, {sum(len(ask.prompt) for ask in asks):,} tokens of prompts, {drawn:,} drawn:\n\n"
        f"{markdown(['', 'tokens drawn/s', '× faster'], rows)}\n\n"
        f"Against its best: **{ratio(seconds[OURS], seconds[best]).text(2)}×**.\n"
    )


def _shared(args: argparse.Namespace, ours: Ours) -> str:
    """What is computed of prompts that share a prefix, as seconds of one token each."""
    (prompt,) = asked(args.vocab, [(600, 1)], seed=5)
    variants = [Ask((*prompt.prompt[:516], *ask.prompt), 1) for ask in asked(args.vocab, [(84, 1)] * 29, seed=6)]
    seconds = interleave(
        {"one": lambda: ours([prompt]), "n=8": lambda: ours([prompt] * 8), "29 variants": lambda: ours(variants)},
        args.rounds,
    )
    rows = [
        [name, Spread.of([1e3 * sec for sec in times]).text(1), ratio(seconds["one"], times).text(2)]
        for name, times in seconds.items()
    ]
    return (
        "A prompt of 600 tokens and one token after it; eight samples of it; 29 prompts that share 86 % of their "
        f"tokens:\n\n{markdown(['', 'ms', '× the prompt alone'], rows)}\n"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="10m")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64, help="ours: generation.max_batch")
    parser.add_argument("--peer-batches", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--step-batches", type=int, nargs="+", default=[1, 4, 16, 32, 64])
    parser.add_argument("--new", type=int, default=48, help="tokens drawn to measure a step")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--output", help="append the report to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
