"""``ap.kind``: what belongs to one kind of attribute-prediction model is refused for the other, and plans differ."""

from __future__ import annotations

from typing import Any

import pytest

from steerlm_megatron.config import compose, load
from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.stages.train import view_of
from tests.helpers.dist import run_ranks


def config_of(command: str, *overrides: str) -> Config:
    return load.from_container(compose.composed(command, [*overrides, "attributes=demo"]))


def test_kind_decides_head_and_view() -> None:
    for command, kind, view, values in (
        ("train_ap", "regression", "ap", 5),
        ("train_ap", "generative", "ap_text", None),
    ):
        config = config_of(command, f"ap.kind={kind}")
        load.finalize(config, 1)
        assert view_of(config) == view and load.head_values(config) == values
    assert load.head_values(config_of("train_sft")) is None


def test_keys_of_the_regression_head_are_all_refused_at_once() -> None:
    wrong = (
        "ap.kind=generative", "train.label_weights={quality: 2.0}", "train.trainable=head", "optim.head_lr=0.1",
        "model.head_bias=false",
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        load.finalize(config_of("train_ap", *wrong), 1)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4 and all("is of ap.kind=regression" in line for line in lines)
    assert sorted(line.rpartition(" set ")[2] for line in lines) == [
        "model.head_bias=true", "optim.head_lr=null", "train.label_weights={}", "train.trainable=all",
    ]  # fmt: skip
    load.finalize(config_of("train_ap", *wrong[1:]), 1)


def planned() -> dict[str, dict[str, Any]]:
    from steerlm_megatron.stages.plan import plan_of

    out = {}
    for kind in ("regression", "generative"):
        made = plan_of(
            ["train_ap", "attributes=demo", "plan.vocab_size=1000", f"ap.kind={kind}", "train.row_tokens=64"]
        )
        (stage,) = made.stages
        out[kind] = {"parameters": stage.parameters, "checkpoint": made.checkpoint_bytes, "traced": stage.traced}
    return out


def test_a_plan_has_the_output_layer_of_the_kind() -> None:
    (found,) = run_ranks(1, planned)
    config = config_of("train_ap")
    width, rows = config.model.hidden_size, 1024
    assert config.model.vocab_multiple == 128 and not config.model.tie_embeddings
    assert found["regression"]["traced"] and found["generative"]["traced"]
    assert found["generative"]["parameters"] - found["regression"]["parameters"] == rows * width - (width + 1) * 5
    assert found["generative"]["checkpoint"] > found["regression"]["checkpoint"]
