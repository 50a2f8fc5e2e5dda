"""Tests that need a GPU: kernels over the cache's blocks, CUDA graphs, and no waiting for the device on the way."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from steerlm_megatron.config.schema import EngineConfig, ModelConfig, ParallelConfig
from steerlm_megatron.generate.generator import Generator
from steerlm_megatron.generate.kv_cache import BlockTables, KVCache, Span
from steerlm_megatron.generate.protocol import Request, SamplingParams
from steerlm_megatron.model.gpt import build_model
from steerlm_megatron.model.packed_tokens import CacheShape, PackedTokens, Rotary
from steerlm_megatron.model.weights import initialize
from steerlm_megatron.runtime import parallel
from steerlm_megatron.runtime.device import dtype_of
from tests.helpers import paged_cases
from tests.helpers.fake_model import VOCAB, FakeTemplate, FakeTokenizer, limits

pytestmark = pytest.mark.gpu

KINDS: dict[str, dict[str, Any]] = {
    "llama": {"num_query_groups": 2},
    "every head has a key": {"num_query_groups": 4, "head_dim": 128},
    "windows": {"num_query_groups": 2, "sliding_window": 9},
    "caps": {"num_query_groups": 1, "attention_softcap": 2.0},
    "norms of heads": {"num_query_groups": 2, "qk_norm": True},
    "part of a head turns": {"num_query_groups": 2, "rotary_percent": 0.5},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", paged_cases.CASES, ids=str)
def test_kernels_over_blocks_are_their_formula(dtype: torch.dtype, case: paged_cases.PagedCase) -> None:
    case.check("cuda", dtype)


@pytest.mark.parametrize("window", [None, 9])
def test_prompts_share_a_call(window: int | None) -> None:
    """In bf16, prompts that begin and that go on give what each of them gives in a call for itself."""
    shape, found = CacheShape((1,), 2, 64, torch.bfloat16), []
    torch.manual_seed(0)
    steps = [
        [(0, 0, 5), (1, 0, 300), (2, 0, 1)],
        [(0, 5, 40), (1, 300, 7), (2, 1, 2)],
        [(0, 45, 1), (1, 307, 9), (2, 3, 2)],
    ]
    qkv = [torch.randn(sum(count for *_, count in spans), 2, 5, 64, device="cuda").bfloat16() for spans in steps]
    for one_call in (True, False):
        cache, tables = KVCache(shape, 90, 16, torch.device("cuda")), BlockTables(3, 30)
        assert cache._varlen is not None and cache.takes_qkv
        cache._varlen = cache._varlen if one_call else None
        for row in range(3):
            tables.add(range(30 * row, 30 * row + 30))
        outputs = []
        for spans, each in zip(steps, qkv, strict=True):
            made = [Span(*span) for span in spans]
            positions_T = cache.begin(tables, [s for s in made if s.count == 1], [s for s in made if s.count > 1])
            cos, sin = PackedTokens(positions_T=positions_T).rotary(Rotary(64, 10000.0), torch.bfloat16)
            outputs.append(cache.attend_qkv(1, each, (cos, sin), 0.125, window))
        found.append(torch.cat(outputs).float())
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 0.02 and float(found[1].std()) > 0.1


def _generator(kind: str, precision: str, **changes: Any) -> Generator:
    parallel.initialize(ParallelConfig(), seed=1)
    values = {
        "num_layers": 2,
        "hidden_size": 256,
        "num_heads": 4,
        "ffn_hidden_size": 96,
        "init_std": 0.2,
        **KINDS[kind],
    }
    config = ModelConfig(**values)
    model = build_model(config, ParallelConfig(), EngineConfig(precision=precision), VOCAB, gather_logits=True)
    initialize(model, config, VOCAB, seed=3).to(dtype_of(precision)).eval().requires_grad_(False)
    return Generator(model, FakeTokenizer(), FakeTemplate(), limits(max_batch=12, **changes))


def _asked(count: int, **params: Any) -> list[Request]:
    rng = random.Random(2)
    prompts = [tuple(rng.randrange(62) for _ in range(rng.randint(1, 40))) for _ in range(count)]
    return [
        Request(f"r{i}", ids, SamplingParams(max_tokens=3 + 2 * (i % 25), seed=i, **params))
        for i, ids in enumerate(prompts)
    ]


def _tokens(generator: Generator, asked: Sequence[Request]) -> list[tuple[int, ...]]:
    return [result.token_ids for result in generator.generate(asked)]


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_give_the_tokens_of_passes_without_a_cache(kind: str) -> None:
    """In fp32, with and without graphs, read at once or a step later; the first tokens' logits are compared with those
    of the model itself.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        asked = _asked(30, temperature=0.0)
        plain = _generator(kind, "fp32", cuda_graphs=False)
        expected = _tokens(plain, asked)
        assert plain.runner._graphs is None
        for overlap in (False, True):
            generator = _generator(kind, "fp32", overlap=overlap)
            assert generator.runner._graphs is not None
            assert _tokens(generator, asked) == expected
            assert len(generator.runner._graphs._replays) > 3
        model, request = plain.runner.model, asked[3]
        ids = torch.tensor([*request.prompt_ids, *expected[3]], device="cuda")
        positions_T, cu = torch.arange(len(ids), device="cuda"), torch.tensor([0, len(ids)], dtype=torch.int32)
        packed = PackedTokens.from_cu_seqlens(cu, positions_T)
        with torch.no_grad():
            logits_TV = model(ids[None], positions_T[None], None, packed_seq_params=packed)[0, :, :VOCAB]
        logits_TV[:, sorted(plain.vocabulary.banned_ids)] = -torch.inf
        assert logits_TV[len(request.prompt_ids) - 1 : -1].argmax(1).tolist() == list(expected[3])
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "params", [{"temperature": 1.0, "top_k": 8}, {"temperature": 0.7, "top_p": 0.9, "logprobs": True}]
)
def test_a_step_is_launched_without_waiting(params: dict[str, Any]) -> None:
    """A step of decoding in bf16, recorded and sampled, makes the host wait for nothing until it is read."""
    generator = _generator("llama", "bf16", overlap=True)
    generator.submit_all(_asked(12, **params, ignore_eos=True), bounded=False)
    for _ in range(4):
        generator.step()
    runner = generator.runner
    plan = generator.scheduler.plan(lambda job: False)
    assert plan is not None and not plan.chunks
    runner.launch(plan).read()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = generator.scheduler.plan(lambda job: False)
        assert plan is not None
        launched = runner.launch(plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(launched.read().ids) == len(runner._rows)
