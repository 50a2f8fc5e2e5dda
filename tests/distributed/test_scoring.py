"""A turn's values depend on the conversation up to it, and not on the batch, its order, its size, or the layout."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steerlm_megatron.config.schema import EngineConfig, ModelConfig
from steerlm_megatron.config.schema import ParallelConfig as P
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.model.gpt import build_model
from steerlm_megatron.model.weights import fill, initialize
from steerlm_megatron.runtime import parallel
from steerlm_megatron.stages.scoring import Scorer, Values, score_all
from steerlm_megatron.stages.session import LoadedModel
from steerlm_megatron.steer.records import Conversation, Message
from steerlm_megatron.train.meta import CheckpointMeta
from tests.helpers import corpora
from tests.helpers.dist import once, run_ranks
from tests.helpers.engines import head_weights

MAX_TOKENS, BATCH_TOKENS = 160, 512
# Values are rounded to four digits, and a rounding difference may change the last one.
TOLERANCE = 1.01e-4
LAYOUTS = {"TP2": P(tensor=2), "PP2": P(pipeline=2), "DP2": P()}
Scores = list[dict[int, Values]]


def conversations() -> list[Conversation]:
    """Return conversations of several turns, with weights 0, with and without labels, some ending with the user, some
    too long.
    """
    rng = random.Random(1)
    long = [
        Conversation(
            f"long{i}",
            tuple(
                Message(role, corpora.sentence(rng, words)) for words in (20, 25, 30) for role in ("user", "assistant")
            ),
        )
        for i in range(3)
    ]
    return [*corpora.conversations(21, seed=3), *long]


def scorer(layout: P, tokenizer: Path, batch_tokens: int = BATCH_TOKENS) -> Scorer:
    parallel.initialize(layout, 1)
    tok = Tokenizer.load(tokenizer)
    config = ModelConfig(
        num_layers=2, hidden_size=32, ffn_hidden_size=48, num_query_groups=2, init_std=0.3, max_position=MAX_TOKENS
    )
    model = build_model(config, layout, EngineConfig(), tok.vocab_size, len(corpora.SCHEMA.names))
    initialize(model, config, tok.vocab_size, seed=4)
    if model.post_process:
        fill(head_weights(model, scale=0.3, bias=4.5))
    model.eval().requires_grad_(False)
    fields = dict(vars(config))
    meta = CheckpointMeta(1, "ap_regression", fields, tok.vocab_size, corpora.SCHEMA.to_dict(), {}, tok.hash)
    return Scorer(LoadedModel(Path(), meta, tok, corpora.SCHEMA, corpora.STEERLM, model, layout), batch_tokens)


def one_rank(tokenizer: Path) -> dict[str, Any]:
    given = conversations()
    usual = scorer(P(), tokenizer)
    found: dict[str, Any] = {"usual": usual.score(given), "truncated": usual.truncated_turns}
    found["again"] = usual.score(given)
    for tokens in (1, 200, 100_000):
        found[f"batch_tokens={tokens}"] = scorer(P(), tokenizer, tokens).score(given)
    found["reversed"] = usual.score(given[::-1])[::-1]
    found["one at a time"] = [usual.score([c])[0] for c in given]
    found["in company"] = usual.score(given[:5] + given * 2)[5 : 5 + len(given)]
    found["without labels"] = usual.score(
        [replace(c, messages=tuple(replace(m, attributes=None, weight=1) for m in c.messages)) for c in given]
    )
    # A conversation that is cut after a turn gives that turn the same score, since later turns are not seen.
    found["cut"] = [
        {
            i: usual.score([replace(c, messages=c.messages[: i + 1])])[0][i]
            for i, m in enumerate(c.messages)
            if m.role == "assistant"
        }
        for c in given
    ]
    found["none"] = usual.score([])
    return found


def two_ranks(tokenizer: Path) -> dict[str, Scores]:
    found = {}
    for name, layout in LAYOUTS.items():
        loaded = scorer(layout, tokenizer)
        found[name] = score_all(loaded, conversations())
        found[f"{name}, one conversation"] = score_all(loaded, conversations()[:1])
    return found


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    def compute() -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
        corpora.tokenizer("trained").save(folder)
        return {
            "one": run_ranks(1, one_rank, folder)[0],
            "two": run_ranks(2, two_ranks, folder),
        }

    return once(tmp_path_factory, "scoring", compute)


def largest(a: Scores, b: Scores) -> float:
    """Return the largest difference between two scorings of the same turns."""
    assert [{i: list(v) for i, v in turns.items()} for turns in a] == [
        {i: list(v) for i, v in turns.items()} for turns in b
    ]
    return max(
        abs(value - theirs[i][name])
        for ours, theirs in zip(a, b, strict=True)
        for i, values in ours.items()
        for name, value in values.items()
    )


@pytest.mark.distributed
def test_every_assistant_turn_is_scored(measured: dict[str, Any]) -> None:
    usual = measured["one"]["usual"]
    for conversation, turns in zip(conversations(), usual, strict=True):
        assert sorted(turns) == [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
        assert all(list(values) == list(corpora.SCHEMA.names) for values in turns.values())
    values = [value for turns in usual for scores in turns.values() for value in scores.values()]
    assert all(0.0 <= value <= 9.0 for value in values)
    assert len(set(values)) > 0.9 * len(values) and max(values) - min(values) > 1.0, "values that could differ"
    assert measured["one"]["truncated"] >= 3
    assert measured["one"]["none"] == []


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name",
    ["batch_tokens=1", "batch_tokens=200", "batch_tokens=100000", "reversed", "one at a time", "in company"]
    + ["without labels", "again"],
)
def test_company_does_not_change_a_turn(name: str, measured: dict[str, Any]) -> None:
    assert largest(measured["one"][name], measured["one"]["usual"]) <= TOLERANCE


@pytest.mark.distributed
def test_later_turns_do_not_change_a_turn(measured: dict[str, Any]) -> None:
    """Conversations that fit are compared; longer ones are scored turn by turn in any case."""
    assert largest(measured["one"]["cut"], measured["one"]["usual"]) <= TOLERANCE


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_does_not_change_a_turn(name: str, measured: dict[str, Any]) -> None:
    for found in measured["two"]:  # every rank gets all of them
        assert largest(found[name], measured["one"]["usual"]) <= TOLERANCE
        assert largest(found[f"{name}, one conversation"], measured["one"]["usual"][:1]) <= TOLERANCE
