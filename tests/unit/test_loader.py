"""Batches have every row once, equal steps for every layout, resume without replay, and cross no document boundary."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlm_megatron.config.schema import TrainConfig
from steerlm_megatron.data.batch import RowBatch
from steerlm_megatron.data.feed.blend import Corpora
from steerlm_megatron.data.feed.collate import PAD_DOCUMENT_TOKENS, collate
from steerlm_megatron.data.feed.dataset import ShardDataset
from steerlm_megatron.data.feed.loader import StepLoader, end_row
from steerlm_megatron.data.shards import ShardWriter
from steerlm_megatron.data.views import build_documents
from tests.helpers import corpora

ROW_TOKENS = 160


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> ShardDataset:
    folder: Path = tmp_path_factory.mktemp("loader") / "train"
    tok = corpora.tokenizer("trained")
    with ShardWriter(folder, tok, corpora.SCHEMA, corpora.STEERLM, 4000) as writer:
        for document in build_documents(corpora.conversations(90, seed=5), tok, corpora.STEERLM, corpora.SCHEMA):
            writer.add(document)
        writer.commit({}, [])
    return ShardDataset.open(folder)


def loader(dataset: ShardDataset, view: str = "acsft", rank: int = 0, size: int = 1, start_row: int = 0, **options):
    defaults = {"row_tokens": ROW_TOKENS, "global_batch_samples": 12, "seed": 7}
    prefetch = options.pop("prefetch_steps", 0)
    cp_rank, cp_size = options.pop("cp", (0, 1))
    end = options.pop("end", None)
    train = TrainConfig(**{**defaults, **options})
    rows = Corpora([dataset]).rows(view, train.row_tokens, train.seed)
    return StepLoader(rows, train, rank, size, start_row, end, prefetch, cp_rank, cp_size)


def ids(batches: list[RowBatch]) -> Counter[str]:
    return Counter(name for batch in batches for name in batch.sample_ids)


def same(a: RowBatch, b: RowBatch) -> bool:
    return all(
        torch.equal(x.nan_to_num(-1), y.nan_to_num(-1)) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


@pytest.mark.parametrize("view", ["acsft", "sft", "lm", "ap"])
def test_an_epoch_is_every_sample_once(dataset: ShardDataset, view: str) -> None:
    steps = loader(dataset, view, global_batch_samples=1)
    plan = steps.rows.plans[0]
    count = steps.steps_to(len(plan))
    rows = [next(steps) for _ in range(len(plan))] if steps.rows_per_step == 1 else []
    assert len(rows) == len(plan) == count
    seen = sum((ids(batches) for batches in rows), Counter())
    assert seen == Counter(dataset.document(index).id for index in plan.samples.tolist())
    assert steps.epoch == 1 and steps.consumed_samples == len(plan.samples)
    assert sum(batch.useful_tokens for batches in rows for batch in batches) == plan.useful_tokens


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_a_step_is_the_same_for_every_layout(dataset: ShardDataset, micro: int) -> None:
    reference = [ids(batches) for batches in itertools.islice(loader(dataset), 12)]
    for size in (1, 2, 4):
        ranks = [loader(dataset, rank=rank, size=size, micro_batch_rows=micro) for rank in range(size)]
        for step in range(12):
            parts = [next(rank) for rank in ranks]
            assert len({len(part) for part in parts}) == 1
            assert sum((ids(part) for part in parts), Counter()) == reference[step]
            assert all(batch.tokens_T.shape == (micro * ROW_TOKENS,) for part in parts for batch in part)
        assert len({str(rank.state()) for rank in ranks}) == 1


def test_rows_of_a_step_come_from_samples_not_layout(dataset: ShardDataset) -> None:
    for samples in (1, 12, 50, 1000):
        sizes = {loader(dataset, size=size, global_batch_samples=samples).rows_per_step for size in (1, 2, 4)}
        plan = loader(dataset).rows.plans[0]
        assert sizes == {min(len(plan), max(1, round(samples / (len(plan.samples) / len(plan)))))}


@pytest.mark.parametrize("stop", [0, 1, 5, 13])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_replays_nothing(dataset: ShardDataset, stop: int, prefetch: int) -> None:
    whole = list(itertools.islice(loader(dataset), 20))
    with loader(dataset, prefetch_steps=prefetch) as first:
        for _ in range(stop):
            next(first)
        state = first.state()
    with loader(dataset, start_row=state["consumed_rows"], prefetch_steps=prefetch) as rest:
        assert rest.state() == state
        for batches in whole[stop:]:
            assert all(same(a, b) for a, b in zip(next(rest), batches, strict=True))


def test_order_differs_by_epoch_and_seed_not_content(dataset: ShardDataset) -> None:
    one = loader(dataset, global_batch_samples=1)
    size = len(one.rows)
    first, second = ([tuple(next(one)[0].sample_ids) for _ in range(size)] for _ in range(2))
    assert first != second and sorted(first) == sorted(second)
    again = loader(dataset, global_batch_samples=1)
    assert first == [tuple(next(again)[0].sample_ids) for _ in range(size)]


@settings(deadline=None)
@given(
    samples=st.integers(1, 10**9),
    epochs=st.floats(0.01, 3.2),
    stop=st.integers(0, 40),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_a_run_by_epochs_sees_every_row_as_often_as_they_say(
    dataset: ShardDataset, samples: int, epochs: float, stop: int, sizes: tuple[int, int]
) -> None:
    """This holds for any batch size, also one larger than the corpus, and for runs that were stopped and resumed."""
    size = len(loader(dataset).rows)
    end = end_row(loader(dataset).rows, epochs)
    seen: Counter[str] = Counter()
    at = taken = 0
    for part in range(2):  # the run until the stop, and the resumed one
        ranks = [
            loader(
                dataset,
                rank=rank,
                size=sizes[0],
                start_row=at,
                end=end,
                micro_batch_rows=sizes[1],
                global_batch_samples=samples,
            )  # fmt: skip
            for rank in range(sizes[0])
        ]
        steps = ranks[0].steps_to(end)
        assert ranks[0].rows_per_step <= size
        for _ in range(min(steps, stop) if part == 0 else steps):
            parts = [next(rank) for rank in ranks]
            assert len({len(part) for part in parts}) == 1, "as many micro-batches on every rank"
            seen += sum((ids(part) for part in parts), Counter())
            taken += 1
        at = ranks[0].consumed_rows
    assert at == end == max(1, round(epochs * size)) and ranks[0].steps_to(end) == 0
    assert taken == -(-end // ranks[0].rows_per_step)
    whole, rest = divmod(end, size)
    assert set(seen.values()) <= {whole, whole + 1} and sum(seen.values()) == ranks[0].consumed_samples
    assert rest or len(set(seen.values())) == 1
    for rank in ranks:
        with pytest.raises(StopIteration):
            next(rank)


def test_a_prefetching_loader_ends_where_its_run_does(dataset: ShardDataset) -> None:
    rows = loader(dataset).rows
    with loader(dataset, end=end_row(rows, 1.0), prefetch_steps=2, global_batch_samples=9) as steps:
        count = steps.steps_to(len(rows))
        batches = list(steps)
        assert len(batches) == count and steps.consumed_samples == rows.samples


def test_evaluation_is_in_order_and_leaves_the_position(dataset: ShardDataset) -> None:
    parts = [list(loader(dataset, rank=rank, size=4).eval_batches()) for rank in range(4)]
    assert len({tuple(len(batches) for batches in part) for part in parts}) == 1
    seen = sum((ids(batches) for part in parts for batches in part), Counter())
    assert seen == Counter(dataset.document(index).id for index in loader(dataset).rows.plans[0].samples.tolist())
    steps = loader(dataset)
    limited = list(steps.eval_batches(limit_rows=3))
    wanted = Counter(dataset.document(i).id for row in range(3) for i in steps.rows.plans[0].row(row).tolist())
    assert sum((ids(batches) for batches in limited), Counter()) == wanted
    assert steps.consumed_rows == 0


def test_prefetch_gives_the_same_and_ends(dataset: ShardDataset) -> None:
    plain = list(itertools.islice(loader(dataset), 6))
    with loader(dataset, prefetch_steps=2) as steps:
        for batches in plain:
            assert all(same(a, b) for a, b in zip(next(steps), batches, strict=True))
        assert steps.consumed_rows == 6 * steps.rows_per_step
    assert not [thread for thread in threading.enumerate() if thread.name == "steerlm-loader"]
    with pytest.raises(StopIteration):
        next(steps)
    loader(dataset, prefetch_steps=2).close()


def test_an_error_in_the_thread_reaches_the_consumer(dataset: ShardDataset, monkeypatch) -> None:
    with loader(dataset, prefetch_steps=2) as steps:
        next(steps)
        monkeypatch.setattr(dataset, "sample", lambda *_: (_ for _ in ()).throw(OSError("disk gone")))
        for _ in range(2):
            with pytest.raises(OSError, match="disk gone"):
                for _ in range(5):
                    next(steps)


# Tensors


@pytest.mark.parametrize("view", ["acsft", "sft", "lm", "ap"])
def test_tensors_of_a_batch(dataset: ShardDataset, view: str) -> None:
    plan = dataset.plan(view, ROW_TOKENS, 7)
    rows = [[dataset.sample(i, view, ROW_TOKENS) for i in plan.row(row).tolist()] for row in range(3)] + [[]]
    batch = collate(rows, ROW_TOKENS, 3)
    total = 4 * ROW_TOKENS
    assert batch.tokens_T.dtype == batch.labels_T.dtype == batch.positions_T.dtype == batch.pool_P.dtype == torch.int64
    assert batch.loss_mask_T.dtype == batch.values_PA.dtype == torch.float32 and batch.cu_seqlens.dtype == torch.int32
    cu = batch.cu_seqlens.tolist()
    assert cu[0] == 0 and cu[-1] == total and all(a < b for a, b in itertools.pairwise(cu))
    assert set(range(0, total, ROW_TOKENS)) <= set(cu)
    documents = [(a, b) for a, b in itertools.pairwise(cu)]
    samples = [sample for row in rows for sample in row]
    real = [(a, b) for a, b in documents if a % ROW_TOKENS < sum(len(s.tokens_T) for s in rows[a // ROW_TOKENS])]
    assert len(real) == len(samples)
    pool, values = [], []
    for (start, end), sample in zip(real, samples, strict=True):
        size = end - start
        assert batch.tokens_T[start:end].tolist() == sample.tokens_T.tolist()
        assert batch.labels_T[start:end].tolist() == [*sample.tokens_T[1:].tolist(), 0]
        assert batch.loss_mask_T[start:end].tolist() == [*sample.loss_mask_T[1:].astype(float).tolist(), 0.0]
        assert batch.positions_T[start:end].tolist() == list(range(size))
        pool += (sample.pool_P + start).tolist()
        values.append(sample.values_PA)
    for start, end in set(documents) - set(real):
        assert end - start <= PAD_DOCUMENT_TOKENS
        assert not batch.loss_mask_T[start:end].any() and not batch.labels_T[start:end].any()
        assert batch.positions_T[start:end].tolist() == list(range(end - start))
    assert batch.pool_P.tolist() == pool
    np.testing.assert_array_equal(batch.values_PA.numpy(), np.concatenate(values))
    assert batch.values_PA.shape == (len(pool), 3)
    assert batch.useful_tokens == sum(len(sample.tokens_T) for sample in samples)
    assert batch.target_tokens == int(batch.loss_mask_T.sum()) == sum(int(s.loss_mask_T.sum()) for s in samples)
    assert batch.sample_ids == [sample.id for sample in samples]


def test_an_empty_batch() -> None:
    batch = collate([[], []], 100, 5)
    assert batch.cu_seqlens.tolist() == [0, 64, 100, 164, 200]
    assert batch.target_tokens == batch.useful_tokens == 0 and batch.values_PA.shape == (0, 5)


def test_a_row_too_full_is_our_bug(dataset: ShardDataset) -> None:
    sample = dataset.sample(0, "lm")
    with pytest.raises(ValueError, match="does not fit"):
        collate([[sample]], len(sample.tokens_T) - 1)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("view", ["acsft", "ap"])
def test_context_parallel_ranks_share_a_row(dataset: ShardDataset, view: str, ranks: int) -> None:
    """Every token, target and label belongs to one rank, and the keys of a chunk reach back to its document's
    beginning.
    """
    row_tokens = 168
    whole = next(loader(dataset, view, row_tokens=row_tokens))
    assert max(batch.cu_seqlens.diff().max() for batch in whole) > row_tokens // ranks, "one goes through all chunks"
    for number, batch in enumerate(whole):
        parts = [next(loader(dataset, view, row_tokens=row_tokens, cp=(rank, ranks)))[number] for rank in range(ranks)]
        owned = [np.concatenate([np.arange(c.start, c.stop) for c in part.chunks]) for part in parts]
        assert sorted(np.concatenate(owned)) == list(range(row_tokens))
        targets, pooled = [], []
        for part, index in zip(parts, owned, strict=True):
            for name in ("tokens_T", "labels_T", "loss_mask_T", "positions_T"):
                assert torch.equal(getattr(part, name), getattr(batch, name)[index])
            targets += index[part.target_K].tolist()
            pooled += [(int(index[p]), str(v)) for p, v in zip(part.pool_P, part.values_PA, strict=True)]
            assert torch.equal(part.cu_seqlens, batch.cu_seqlens) and part.row_tokens == row_tokens
            assert (part.useful_tokens, part.target_tokens) == (batch.useful_tokens, batch.target_tokens)
            _check_boundaries(part, batch)
        assert sorted(targets) == batch.target_K.tolist()
        assert sorted(pooled) == [(int(p), str(v)) for p, v in zip(batch.pool_P, batch.values_PA, strict=True)]


def _check_boundaries(part: RowBatch, batch: RowBatch) -> None:
    assert part.cu_queries is not None and part.cu_keys is not None
    queries, keys = part.cu_queries.diff().tolist(), part.cu_keys.diff().tolist()
    assert len(part.chunks) == 2 and sum(queries) == len(part.tokens_T)
    document_T = torch.repeat_interleave(torch.arange(len(batch.cu_seqlens) - 1), batch.cu_seqlens.diff().long())
    for chunk in part.chunks:
        assert document_T[chunk.first_key] == document_T[chunk.start] and batch.positions_T[chunk.first_key] == 0
        for i, length in enumerate(chunk.lengths):
            size, seen = queries.pop(0), keys.pop(0)
            assert size == length and seen == length + (chunk.carried if i == 0 else 0)
    assert not queries and not keys
