"""Commands that serve a checkpoint check ``attributes.best`` against the checkpoint's schema."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerlm_megatron.config.schema import AttributesConfig, Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.stages.session import requested_best
from steerlm_megatron.steer.attributes import AttributeSchema

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("quality", "humor", "verbosity")
SCHEMA = AttributeSchema("demo", NAMES, 4, best={"quality": 4, "verbosity": 2})
PLAIN = AttributeSchema("none", (), 4)


def config(best: dict[str, int], names: tuple[str, ...] = ()) -> Config:
    return Config(attributes=AttributesConfig(name="chosen", names=list(names), best=best))


@given(st.dictionaries(st.sampled_from(NAMES), st.integers(0, 4)))
def test_what_is_named_overrides_the_checkpoint(best: dict[str, int]) -> None:
    for names in ((), NAMES, NAMES[::-1]):
        assert requested_best(config(best, names), SCHEMA) == SCHEMA.complete(best)


@given(
    st.dictionaries(st.sampled_from(NAMES), st.integers(0, 4)),
    st.one_of(
        st.tuples(st.text("abcxyz_", min_size=1).filter(lambda name: name not in NAMES), st.integers(0, 4)),
        st.tuples(st.sampled_from(NAMES), st.integers().filter(lambda level: not 0 <= level <= 4)),
    ),
)
def test_an_unknown_name_or_level_is_named(best: dict[str, int], wrong: tuple[str, int]) -> None:
    with pytest.raises(UserError, match=rf"attributes\.best: .*{wrong[0]}"):
        requested_best(config({**best, wrong[0]: wrong[1]}), SCHEMA)


def test_a_group_of_other_attributes_is_refused() -> None:
    with pytest.raises(UserError, match=r"violence.*attributes=chosen is not what the checkpoint"):
        requested_best(config({"violence": 0}, ("quality", "violence")), SCHEMA)


def test_a_model_without_attributes_takes_no_level() -> None:
    assert requested_best(config({}), PLAIN) == {}
    assert requested_best(config({"humor": 1}, NAMES), PLAIN) == {}
    with pytest.raises(UserError, match="humor.*has no attributes"):
        requested_best(config({"humor": 1}), PLAIN)


@pytest.mark.parametrize("command", ["serve", "generate"])
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "best: {}"),
        (["attributes.best.humor=3"], "best:\n    humor: 3\n"),
        (["attributes=demo"], "verbosity: 2"),
        (["experiment=quickstart"], "verbosity: 2"),
    ],
)
def test_no_group_is_chosen_for_the_user(command: str, overrides: list[str], expected: str) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "steerlm_megatron", command, "--cfg", "job", *overrides],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    assert expected in shown and "violence" not in shown
