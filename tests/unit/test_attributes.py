"""steer.attributes quantises as the released scripts do, writes and parses label strings, and refuses wrong ones."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from steerlm_megatron.config.schema import AttributesConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.attributes import AttributeSchema

CONF = Path(__file__).parents[2] / "conf" / "attributes"
NAMES = ("quality", "toxicity", "humor", "creativity", "violence", "helpfulness", "not_appropriate")
PAPER = "quality:6,toxicity:0,humor:9,creativity:0,violence:0,helpfulness:5,not_appropriate:0"


def oasst() -> AttributeSchema:
    return AttributeSchema("oasst", NAMES, 9, "quality", {"quality": 9, "helpfulness": 9, "toxicity": 0})


@pytest.mark.parametrize(
    ("label", "of_9", "of_4"),
    [(0.5, 4, 2), (0.125, 1, 0), (0.375, 3, 2), (0.625, 6, 2), (0.416, 4, 2), (0.16, 1, 1), (0.33, 3, 1), (1.0, 9, 4)],
)
def test_rounding_is_that_of_the_released_scripts(label: float, of_9: int, of_4: int) -> None:
    assert oasst().level(label * 9) == of_9
    assert AttributeSchema("h", ("quality",), 4).level(label * 4) == of_4


def test_level_clamps_and_refuses_what_is_no_number() -> None:
    schema = oasst()
    assert [schema.level(v) for v in (-3, -0.4, 9.6, math.inf, -math.inf)] == [0, 0, 9, 9, 0]
    for bad in (math.nan, "7", None, True):
        with pytest.raises(UserError, match="not a number"):
            schema.level(bad)  # type: ignore[arg-type]


def test_paper_string_both_ways() -> None:
    levels = dict(zip(NAMES, (6, 0, 9, 0, 0, 5, 0), strict=True))
    assert oasst().format(levels) == PAPER
    assert oasst().parse(PAPER) == levels
    assert oasst().format(dict(reversed(levels.items()))) == PAPER


@given(st.dictionaries(st.sampled_from(NAMES), st.integers(0, 9)))
def test_parse_inverts_format(levels: dict[str, int]) -> None:
    parsed = oasst().parse(oasst().format(levels))
    assert parsed == levels
    assert list(parsed) == [name for name in NAMES if name in levels]


@st.composite
def schemas_and_levels(draw: st.DrawFn) -> tuple[AttributeSchema, dict[str, int]]:
    """Draw a legal schema with any names and scale, and some of its levels in any order."""
    name = st.text(st.sampled_from("aZ09_.-éß名٣"), min_size=1, max_size=8)
    names = draw(st.lists(name, max_size=6, unique=True))
    top = draw(st.integers(1, 1000))
    schema = AttributeSchema("any", tuple(names), top, names[0] if names else "quality")
    some = st.dictionaries(st.sampled_from(names), st.integers(0, top)) if names else st.just({})
    return schema, draw(some)


@settings(deadline=None)
@given(schemas_and_levels())
def test_parse_inverts_format_for_every_schema(case: tuple[AttributeSchema, dict[str, int]]) -> None:
    schema, levels = case
    text = schema.format(levels)
    assert schema.parse(text) == levels
    assert schema.format(schema.parse(text)) == text
    assert AttributeSchema.from_dict(schema.to_dict()).parse(text) == levels


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_parse_inverts_format_for_shipped_schemas(file: Path, data: st.DataObject) -> None:
    schema = AttributeSchema.from_config(OmegaConf.load(file))
    level = st.integers(0, schema.max_level)
    levels = data.draw(st.dictionaries(st.sampled_from(schema.names), level)) if schema.names else {}
    assert schema.parse(schema.format(levels)) == levels


@given(st.dictionaries(st.sampled_from(NAMES), st.floats(0, 9)))
def test_levels_are_nearest_and_in_order(values: dict[str, float]) -> None:
    levels = oasst().levels(values)
    assert list(levels) == [name for name in NAMES if name in values]
    assert all(abs(levels[name] - values[name]) <= 0.5 for name in values)


@given(st.text(alphabet="qualityhumor:,0123456789 -", max_size=30))
def test_parse_accepts_only_what_format_writes_up_to_order(text: str) -> None:
    schema = AttributeSchema("x", ("quality", "humor"), 9)
    try:
        levels = schema.parse(text)
    except UserError:
        return
    assert sorted(schema.format(levels).split(",")) == sorted(text.split(","))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("quality", "form name:level"),
        ("quality:", "form name:level"),
        ("quality: 6", "form name:level"),
        ("quality:06", "form name:level"),
        ("quality:-1", "form name:level"),
        ("quality:²", "form name:level"),
        ("quality:6,", "form name:level"),
        ("qualty:6", "did you mean 'quality'"),
        ("quality:6,quality:6", "occurs twice"),
        ("quality:10", r"integer in 0\.\.9"),
    ],
)
def test_parse_refuses(text: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        oasst().parse(text)


def test_format_refuses() -> None:
    for levels, match in (({"qualty": 1}, "did you mean"), ({"quality": 10}, "0..9"), ({"quality": 6.0}, "integer")):
        with pytest.raises(UserError, match=match):
            oasst().format(levels)  # type: ignore[arg-type]


def test_check_values() -> None:
    oasst().check_values({"quality": 6.75, "humor": 0})
    for values, match in (
        ({"funny": 1}, "unknown attribute 'funny'"),
        ({"quality": math.nan}, "not a number"),
        ({"quality": 9.1}, r"outside 0\.\.9"),
        ({"quality": -0.1}, r"outside 0\.\.9"),
        ({"quality": math.inf}, r"outside 0\.\.9"),
        ({"quality": "6"}, "not a number"),
        ({"quality": 10**400}, "not a number"),
    ):
        with pytest.raises(UserError, match=match):
            oasst().check_values(values)


def test_vector_has_nan_where_missing() -> None:
    vector = oasst().vector({"humor": 2, "quality": 6.75})
    assert vector[0] == 6.75 and vector[2] == 2.0
    assert all(math.isnan(vector[i]) for i in (1, 3, 4, 5, 6))
    assert all(math.isnan(value) for value in oasst().vector(None))


def test_levels_refuses_unknown() -> None:
    with pytest.raises(UserError, match="unknown attribute 'x'"):
        oasst().levels({"quality": 1, "x": 1})


def test_complete_is_best_overridden() -> None:
    assert oasst().complete(None) == {"quality": 9, "toxicity": 0, "helpfulness": 9}
    assert list(oasst().complete({"humor": 3, "quality": 5}).items()) == [
        ("quality", 5), ("toxicity", 0), ("humor", 3), ("helpfulness", 9),
    ]  # fmt: skip
    assert AttributeSchema("own", ("depth", "tone"), 3, "depth").complete({}) == {"depth": 3}
    with pytest.raises(UserError, match="did you mean 'humor'"):
        oasst().complete({"humour": 3})
    with pytest.raises(UserError, match="integer in"):
        oasst().complete({"humor": 99})


def test_schema_without_names_conditions_on_nothing() -> None:
    none = AttributeSchema("none", (), 9)
    assert none.levels({"quality": 3.0}) == {} and none.complete(None) == {} and none.format({}) == ""
    assert none.vector({"quality": 3.0}) == []
    none.check_values({"quality": 300.0})
    with pytest.raises(UserError, match="has no attributes"):
        none.complete({"quality": 3})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"names": ["a b"]}, "a name is letters"),
        ({"names": ["a:b"]}, "a name is letters"),
        ({"names": ["<extra_id_1>"]}, "a name is letters"),
        ({"names": [""]}, "a name is letters"),
        ({"names": ["quality", "quality"]}, "repeats"),
        ({"max_level": 0}, "max_level=0"),
        ({"max_level": 2.5}, "max_level=2.5"),
        ({"quality": "helpfulness"}, "must be one of"),
        ({"best": {"qualit": 1}}, "did you mean 'quality'"),
        ({"best": {"quality": 10}}, r"0\.\.9"),
        ({"scale": 3}, "unknown key"),
    ],
)
def test_bad_schema(change: dict[str, object], match: str) -> None:
    data = {"name": "own", "names": ["quality", "humor"], "max_level": 9, "quality": "quality", "best": {}}
    with pytest.raises(UserError, match=match):
        AttributeSchema.from_dict({**data, **change})


def test_dict_round_trip_and_hash() -> None:
    schema = oasst()
    assert AttributeSchema.from_dict(schema.to_dict()) == schema
    assert len({schema, AttributeSchema.from_dict(schema.to_dict())}) == 1
    assert AttributeSchema.from_config(AttributesConfig(names=["quality"])) == AttributeSchema("oasst", ("quality",), 9)


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_schemas(file: Path) -> None:
    cfg = OmegaConf.load(file)
    assert set(cfg) == set(AttributesConfig.__dataclass_fields__)
    schema = AttributeSchema.from_config(cfg)
    assert schema.name == file.stem
    assert schema == AttributeSchema.from_config(OmegaConf.merge(OmegaConf.structured(AttributesConfig), cfg))
    assert list(schema.complete(None)) == list(schema.names)


def test_shipped_scales() -> None:
    load = lambda name: AttributeSchema.from_config(OmegaConf.load(CONF / f"{name}.yaml"))  # noqa: E731
    assert load("oasst").names == NAMES and load("oasst").max_level == 9
    assert load("oasst").format(load("oasst").complete(None)) == (
        "quality:9,toxicity:0,humor:0,creativity:0,violence:0,helpfulness:9,not_appropriate:0"
    )
    assert load("helpsteer").format(load("helpsteer").complete(None)) == (
        "quality:4,toxicity:0,humor:0,creativity:0,helpfulness:4,correctness:4,coherence:4,complexity:4,verbosity:4"
    )
    assert load("none").names == ()
