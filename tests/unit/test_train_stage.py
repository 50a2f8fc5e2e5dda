"""Speed and profile of a training run, tested without a run."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from steerlm_megatron.config.schema import Config
from steerlm_megatron.data.feed.collate import collate
from steerlm_megatron.data.views import Sample, View
from steerlm_megatron.errors import UserError
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.stages.train import check_profile, compare_with_constant, flops_of, label_counts
from steerlm_megatron.train.loop import Trainer
from steerlm_megatron.train.objective import RegressionObjective
from tests.helpers.engines import full_row


def sample(length: int) -> Sample:
    tokens, none = np.arange(5, 5 + length, dtype=np.int32), np.zeros(0, np.int32)
    return Sample("x", tokens, np.ones(length, np.bool_), none, np.zeros((0, 0), np.float32))


def test_padding_counts_for_nothing_but_fill() -> None:
    trainer: Any = SimpleNamespace(counts=[0.0] * 4, counted_steps=0)
    Trainer._count(trainer, [collate([[sample(30), sample(50)], []], 200), collate([[sample(200)]], 200)])
    useful, target, slots, squares = trainer.counts
    assert (useful, slots, squares) == (280, 600, 30**2 + 50**2 + 200**2) and target <= useful


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_flops_of_a_model_counted_by_hand(activation: str) -> None:
    config = Config()
    model = config.model
    model.num_layers, model.hidden_size, model.num_heads, model.num_query_groups, model.head_dim = 3, 20, 4, 2, 6
    model.ffn_hidden_size, model.activation = 50, activation
    query, keys_and_values, out = 20 * 24, 2 * 20 * 12, 24 * 20
    layer = query + keys_and_values + out + (3 if activation == "swiglu" else 2) * 20 * 50
    attention = 6 * 3 * 24 * 5200
    assert flops_of(config, 100, "sft")(100, 5200) == 6 * (3 * layer + 20 * 100) * 100 + attention
    model.tie_embeddings = True  # the product is the same if the matrix is shared
    assert flops_of(config, 100, "sft")(100, 5200) == 6 * (3 * layer + 20 * 100) * 100 + attention
    assert flops_of(config, 100, "ap")(100, 5200) == 6 * 3 * layer * 100 + attention
    config.train.trainable = "lora"
    assert flops_of(config, 100, "ap")(100, 5200) == 4 * 3 * layer * 100 + attention
    config.train.trainable = "head"
    assert flops_of(config, 100, "ap")(100, 5200) == 2 * 3 * layer * 100 + attention / 3
    config.engine.recompute = "full"
    assert flops_of(config, 100, "ap")(100, 5200) == 2 * 3 * layer * 100 + attention / 3
    for trainable in ("all", "lora"):  # a forward pass alone is the same, whatever is trained
        config.train.trainable = trainable
        assert flops_of(config, 100, "ap", trains=False)(100, 5200) == 2 * 3 * layer * 100 + attention / 3


@pytest.mark.parametrize(
    ("steps", "said"), [([3, 5], False), ([10, 99], False), ([11, 12], True), ([1, 2], True)],
    ids=["inside", "its last step", "beyond its end", "done before"],
)  # fmt: skip
def test_a_profile_that_will_not_be_is_said(steps: list[int], said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Commands that earlier tests ran in this process change the package's loggers, so caplog cannot be relied on here.
    logger, lines = get_logger("steerlm_megatron.stages.train"), []
    monkeypatch.setattr(logger, "warning", lambda text, *values: lines.append(text % values))
    config = Config()
    config.profile.steps = steps
    check_profile(config, ranks=2, done=2, steps=10)
    assert lines == ([f"profile.steps={steps}: no trace, this run goes from step 3 to step 10"] if said else [])


def test_a_profile_of_a_rank_that_is_not_there() -> None:
    config = Config()
    config.profile.steps, config.profile.ranks = [1, 2], [0, 2]
    with pytest.raises(UserError, match=r"profile.ranks=\[0, 2\]: there is no rank 2; legal: 0 to 1"):
        check_profile(config, ranks=2, done=0, steps=10)


def test_a_predictor_that_knows_no_more_than_the_mean_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean's error is that on the same labels; an attribute without a training label has none."""
    logger, recorded = get_logger("steerlm_megatron.stages.train"), []
    monkeypatch.setattr(logger, "warning", lambda text, *values: recorded.append(text % values))
    objective = RegressionObjective(("a", "b", "c"), {}, torch.tensor([2.0, 1.0, torch.nan]))
    values_PA = torch.tensor([[4.0, 1.0, 5.0], [1.0, torch.nan, 5.0]])
    batch = replace(full_row([4, 3]), pool_P=torch.tensor([3, 6]), values_PA=values_PA)
    _, sums_M = objective.loss(torch.tensor([[[4.0, 3.0, 0.0], [1.0, 0.0, 0.0]]]), batch)
    means = objective.means(sums_M.tolist())
    assert means["constant_mse/a"] == (4 + 1) / 2 and means["constant_mse/b"] == 0 and "constant_mse/c" not in means
    compare_with_constant(means)
    assert ["1 of 2 attributes: b (4, the mean's is 0)" in line for line in recorded] == [True]
    compare_with_constant({"mse/a": 0.1, "constant_mse/a": 0.2})
    assert len(recorded) == 1


@pytest.mark.parametrize(
    ("counts", "view", "said"),
    [
        ({"a": 3, "b": 0}, "acsft", "no trained response has a value of b: the model is not conditioned on it"),
        ({"a": 3, "b": 0, "c": 0}, "acsft", "a value of b, c: the model is not conditioned on them"),
        ({"a": 0, "b": 1}, "ap", "a value of a: the model learns nothing of it, and annotate leaves it out"),
        ({"a": 0, "b": 1, "c": 0}, "ap", "a value of a, c: the model learns nothing of them, and annotate leaves them"),
    ],
)
def test_attributes_without_a_label_are_named(
    counts: dict[str, int], view: View, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger, recorded = get_logger("steerlm_megatron.stages.train"), []
    monkeypatch.setattr(logger, "warning", lambda text, *values: recorded.append(text % values))
    data: Any = SimpleNamespace(name="shards", label_counts=lambda: counts)
    assert label_counts(Config(), data, view, None) == counts
    assert len(recorded) == 1 and said in recorded[0]
