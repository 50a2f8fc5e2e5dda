"""Decoding by graphs and by kernels over blocks, with the kernels' formula in their place where there is no GPU."""

from __future__ import annotations

import random
from contextlib import nullcontext

import pytest
import torch

from steerlm_megatron.generate import kv_cache
from steerlm_megatron.generate.cuda_graphs import DecodeGraphs, graph_rows
from steerlm_megatron.generate.generator import Generator
from steerlm_megatron.generate.protocol import EngineDead, Request, SamplingParams
from tests.helpers import paged_reference
from tests.helpers.fake_model import VOCAB, FakeModel, FakeTemplate, FakeTokenizer, limits


@pytest.fixture
def by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches have kernels that read blocks where they lie."""
    monkeypatch.setattr(kv_cache, "_kernels", lambda _: paged_reference)


def test_few_graphs_have_few_rows_too_many() -> None:
    sizes = {graph_rows(rows, 200) for rows in range(1, 201)}
    assert sizes == {1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 200}
    for rows in range(1, 201):
        assert rows <= graph_rows(rows, 200) <= max(8, rows * 3 / 2)
    assert graph_rows(5, 6) == 6


def _asked(count: int) -> list[Request]:
    rng = random.Random(2)
    asked = []
    for i in range(count):
        prompt = tuple(rng.randrange(62) for _ in range(rng.randint(1, 40)))
        asked.append(Request(f"r{i}", prompt, SamplingParams(temperature=i % 3, max_tokens=3 + 2 * (i % 25), seed=i)))
    return asked


@pytest.mark.parametrize("changes", [{}, {"max_cache_tokens": 160, "max_batch": 6}, {"overlap": True, "max_batch": 13}])
def test_graphs_give_the_tokens_of_single_steps(by_blocks: None, changes: dict[str, int]) -> None:
    """Rows come and go, are preempted, get blocks and fill graphs up, at every size of batch."""
    asked = _asked(40)
    plain = Generator(FakeModel(), FakeTokenizer(), FakeTemplate(), limits(max_batch=1))
    expected = [result.token_ids for result in plain.generate(asked)]
    generator = Generator(FakeModel(), FakeTokenizer(), FakeTemplate(), limits(**changes))
    runner, most = generator.runner, generator.limits.max_batch
    runner._graphs = DecodeGraphs(runner._decode, runner.cache, most, runner._tables.blocks.shape[1])
    seen: list[int] = []
    record = runner._graphs._record
    runner._graphs._record = lambda size: seen.append(size) or record(size)  # type: ignore[method-assign, func-returns-value]
    assert [result.token_ids for result in generator.generate(asked)] == expected
    assert len(seen) == len(set(seen)) >= 3, "one graph a size"
    assert generator.counters()["preemptions_total"] > 0 or "max_cache_tokens" not in changes


def test_a_gpu_without_memory_to_record_says_what_to_lower(by_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine ends with what to change, and every request is told."""

    def full(graphs: DecodeGraphs, size: int) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")

    monkeypatch.setattr(DecodeGraphs, "_record_graph", full)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    generator = Generator(FakeModel(), FakeTokenizer(), FakeTemplate(), limits())
    runner = generator.runner
    runner._graphs = DecodeGraphs(runner._decode, runner.cache, 8, runner._tables.blocks.shape[1])
    runner._graphs._pool = (0, 1)
    handle = generator.submit(_asked(1)[0])
    with pytest.raises(EngineDead, match="record a step of 1 sequences: lower generation.memory_fraction"):
        while generator.step():
            pass
    told = handle.future.exception(0)
    assert isinstance(told, EngineDead) and "tried to allocate 2.00 GiB" in str(told)


def test_why_steps_are_not_recorded(by_blocks: None) -> None:
    runner = Generator(FakeModel(), FakeTokenizer(), FakeTemplate(), limits()).runner
    assert "adapters are not merged" in str(runner._lacks_for_graphs())
    runner._compute.bound = True
    assert runner._lacks_for_graphs() is None
    runner.cache.kernels = None
    assert "kernels need Triton" in str(runner._lacks_for_graphs())


def test_spare_rows_touch_no_block_of_a_sequence(by_blocks: None) -> None:
    generator = Generator(FakeModel(), FakeTokenizer(), FakeTemplate(), limits())
    cache = generator.runner.cache
    for layer in cache._layers.values():
        layer.fill_(7.0)
    row = torch.from_numpy(cache.spare_row(8))[None]
    cache.begin_rows(row)
    k_TGH = torch.zeros(1, cache.shape.groups, cache.shape.head_dim, dtype=torch.float64)
    cache.attend(1, torch.zeros(1, 4, 8, dtype=torch.float64), k_TGH, k_TGH, 1.0)
    assert bool((cache._layers[1][:, :, :-1] == 7.0).all()) and bool((cache._layers[1][:, :, -1, 0] == 0.0).all())


def test_the_runner_takes_graphs_where_it_can(by_blocks: None) -> None:
    """With Megatron-Core's GPT, whose weights are bound once; tokens are those without kernels and graphs."""
    from steerlm_megatron.config.schema import EngineConfig, ModelConfig, ParallelConfig
    from steerlm_megatron.model.gpt import build_model
    from steerlm_megatron.model.weights import initialize
    from steerlm_megatron.runtime import parallel

    parallel.initialize(ParallelConfig(), seed=1)
    config = ModelConfig(
        num_layers=2, hidden_size=64, num_heads=4, num_query_groups=2, ffn_hidden_size=96, init_std=0.2,
        sliding_window=9,
    )  # fmt: skip
    model = build_model(config, ParallelConfig(), EngineConfig(), VOCAB, gather_logits=True)
    initialize(model, config, VOCAB, seed=3).eval().double()
    results = []
    for graphs in (True, False):
        generator = Generator(model, FakeTokenizer(), FakeTemplate(), limits(cuda_graphs=graphs))
        assert (generator.runner._graphs is not None) is graphs
        results.append([result.token_ids for result in generator.generate(_asked(20))])
    assert results[0] == results[1]
    assert (
        not hasattr(FakeModel, "decoder")
        and Generator(FakeModel(), FakeTokenizer(), FakeTemplate(), limits()).runner._graphs is None
    )


@pytest.mark.parametrize(("share", "dim"), [(1, 8), (1, 64), (4, 8), (4, 64)])
def test_rows_say_where_a_token_goes(share: int, dim: int) -> None:
    """The formula over rows is the cache's own attention over the same blocks."""
    from steerlm_megatron.generate.kv_cache import BlockTables, KVCache, Span
    from steerlm_megatron.model.packed_tokens import CacheShape

    shape, blocks = CacheShape((1,), 2, dim, torch.float64), list(range(30))
    random.Random(1).shuffle(blocks)
    torch.manual_seed(0)
    found = []
    steps = [[(0, 0, 5), (1, 0, 30), (2, 0, 8)], [(0, 5, 1), (1, 30, 1), (2, 8, 1)]]
    q, k, v = (
        [torch.randn(n, heads, dim, dtype=torch.float64) for n in (43, 3)] for heads in (2 * share, 2, 2)
    )  # fmt: skip
    for kernels in (None, paged_reference):
        cache, tables = KVCache(shape, 30, 4, torch.device("cpu")), BlockTables(3, 10)
        cache.kernels = kernels
        for row in range(3):
            tables.add(blocks[10 * row : 10 * row + 10])
        for number, spans in enumerate(steps):
            made = [Span(*span) for span in spans]
            cache.begin(tables, [s for s in made if s.count == 1], [s for s in made if s.count > 1])
            out = cache.attend(1, q[number], k[number], v[number], 0.3, window=None if share == 1 else 6)
        found.append(out)
    torch.testing.assert_close(*found)
