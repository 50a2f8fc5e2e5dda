"""Blends have the shares of the weights, pass through complete corpora, and refuse corpora that do not fit together."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from steerlm_megatron.config import load
from steerlm_megatron.config.schema import Config, TrainConfig
from steerlm_megatron.data.feed.blend import Corpora, Rows
from steerlm_megatron.data.feed.dataset import ShardDataset
from steerlm_megatron.data.feed.loader import StepLoader
from steerlm_megatron.data.shards import ShardWriter
from steerlm_megatron.data.views import build_documents
from steerlm_megatron.errors import UserError
from tests.helpers import corpora

ROW_TOKENS, SEED = 160, 7


def shards(folder: Path, count: int, seed: int, template=corpora.STEERLM, schema=corpora.SCHEMA) -> ShardDataset:
    tok = corpora.tokenizer("trained", tuple(dict.fromkeys((*template.control_strings, template.label_marker))))
    with ShardWriter(folder, tok, schema, template, 4000) as writer:
        for document in build_documents(corpora.conversations(count, seed=seed), tok, template, schema):
            writer.add(document)
        writer.commit({}, [])
    return ShardDataset.open(folder)


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Corpora:
    folder = tmp_path_factory.mktemp("blend")
    return Corpora([shards(folder / "large", 90, 5), shards(folder / "small", 12, 6)])


def blend(both: Corpora, weights: tuple[float, ...] = (1.0, 1.0)) -> Rows:
    return both.rows("acsft", ROW_TOKENS, SEED, weights=weights)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.1, 0.9)])
def test_shares_are_the_weights(both: Corpora, weights: tuple[float, ...]) -> None:
    rows = blend(both, weights)
    large = len(rows.plans[0])
    for epoch in range(4):
        order = rows.order(epoch)
        assert len(order) == len(rows) and order.min() >= 0 and order.max() < len(rows)
        assert abs((order < large).sum() / len(order) - weights[0] / sum(weights)) <= 1 / len(order)


def test_a_corpus_is_gone_through_whole_before_it_repeats(both: Corpora) -> None:
    rows = blend(both)
    drawn = np.concatenate([rows.order(epoch) for epoch in range(8)])
    for first, plan in zip((0, len(rows.plans[0])), rows.plans, strict=True):
        own = drawn[(drawn >= first) & (drawn < first + len(plan))] - first
        passes = [own[at : at + len(plan)] for at in range(0, len(own), len(plan))]
        assert len(passes) >= 3
        for turn in passes[:-1]:
            assert sorted(turn.tolist()) == list(range(len(plan)))
        assert len(set(passes[-1].tolist())) == len(passes[-1])
        assert passes[0].tolist() != passes[1].tolist(), "each pass has an order of its own"


def test_without_weights_an_epoch_is_every_row_once(both: Corpora) -> None:
    rows = blend(both, ())
    assert sorted(rows.order(0).tolist()) == list(range(len(rows)))
    assert rows.order(0).tolist() != rows.order(1).tolist()
    assert rows.samples == sum(len(plan.samples) for plan in rows.plans)


@pytest.mark.parametrize("weights", [(), (1.0, 3.0)])
def test_resuming_replays_nothing(both: Corpora, weights: tuple[float, ...]) -> None:
    train = TrainConfig(row_tokens=ROW_TOKENS, global_batch_samples=9, seed=SEED)

    def ids(loader: StepLoader, steps: int) -> list[Counter[str]]:
        return [Counter(name for batch in next(loader) for name in batch.sample_ids) for _ in range(steps)]

    whole = StepLoader(blend(both, weights), train, prefetch_steps=0)
    expected = ids(whole, 30)
    first = StepLoader(blend(both, weights), train, prefetch_steps=0)
    assert ids(first, 11) == expected[:11]
    second = StepLoader(blend(both, weights), train, start_row=first.state()["consumed_rows"], prefetch_steps=0)
    assert second.consumed_samples == first.consumed_samples
    assert ids(second, 19) == expected[11:] and second.state() == whole.state()
    ranks = [StepLoader(blend(both, weights), train, rank, 2, prefetch_steps=0) for rank in range(2)]
    assert sum((ids(loader, 1)[0] for loader in ranks), Counter()) == expected[0]


def test_the_report_names_every_corpus(both: Corpora) -> None:
    report = blend(both, (3.0, 1.0)).report()
    assert report["rows"] == sum(part["rows"] for part in report["corpora"].values()) == len(blend(both))
    assert sum(part["rows_per_epoch"] for part in report["corpora"].values()) == report["rows"]


def test_corpora_that_do_not_fit(both: Corpora, tmp_path: Path) -> None:
    other = shards(tmp_path / "llama", 8, 1, template=corpora.LLAMA2)
    with pytest.raises(UserError, match=r"llama was preprocessed with another (tokenizer|template) than .*large"):
        Corpora([both.datasets[0], other])


def test_a_weight_too_small_for_one_row(both: Corpora) -> None:
    with pytest.raises(UserError, match="not one of an epoch's"):
        blend(both, (1.0, 1e-6))


def test_label_mean_is_of_all_corpora(both: Corpora) -> None:
    means = [dataset.label_mean() for dataset in both.datasets]
    counts = [np.array(dataset.manifest["labels"]["count"]) for dataset in both.datasets]
    expected = sum(m * c for m, c in zip(means, counts, strict=True)) / sum(counts)
    np.testing.assert_allclose(both.label_mean(), expected, rtol=1e-6)


def test_configuration() -> None:
    def problems(**data) -> str:
        config = Config(command="train_sft")
        for key, value in data.items():
            setattr(config.data, key, value)
        with pytest.raises(UserError) as error:
            load.finalize(config)
        return str(error.value)

    assert "data.weights=[1.0] has 1 numbers, data.train 2 folders" in problems(train=["a", "b"], weights=[1.0])
    assert "data.weights: -1.0 must be a positive number" in problems(train=["a", "b"], weights=[1.0, -1.0])
    assert "data.train=3 is not a path" in problems(train=3)
