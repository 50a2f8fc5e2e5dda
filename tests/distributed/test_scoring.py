"""A turn's values depend on the conversation up to it, and not on the batch, its order, its size, or the layout; and
what a generative model is asked after is what it was trained on.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steerlm_megatron.config.schema import EngineConfig, ModelConfig
from steerlm_megatron.config.schema import ParallelConfig as P
from steerlm_megatron.data.label_tokens import LabelTokens
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.data.views import build_documents, make_sample
from steerlm_megatron.model.gpt import build_model
from steerlm_megatron.model.packed_tokens import PackedTokens
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


def writer(layout: P, tokenizer: Path, decode: str, batch_tokens: int = BATCH_TOKENS) -> Scorer:
    """Return the scorer of a generative model in float64, in which a likeliest level does not change by rounding."""
    parallel.initialize(layout, 1)
    tok = Tokenizer.load(tokenizer)
    config = ModelConfig(
        num_layers=2, hidden_size=32, ffn_hidden_size=48, num_query_groups=2, init_std=0.3, max_position=MAX_TOKENS
    )
    model = build_model(config, layout, EngineConfig(), tok.vocab_size, gather_logits=True)
    initialize(model, config, tok.vocab_size, seed=4)
    model.double().eval().requires_grad_(False)
    schema, fields = corpora.SCHEMA.to_dict(), dict(vars(config))
    counts = {"quality": 3, "humor": 2, "toxicity": 0}
    meta = CheckpointMeta(1, "ap_generative", fields, tok.vocab_size, schema, {}, tok.hash, label_counts=counts)
    loaded = LoadedModel(Path(), meta, tok, meta.attributes(), corpora.STEERLM, model, layout)
    return Scorer(loaded, batch_tokens, decode)


@torch.inference_mode()
def as_trained(scorer: Scorer, given: list[Conversation], levels: Scores) -> list[dict[int, Values] | None]:
    """Return the expected levels by plain forward passes over the training samples of conversations that have these
    levels for labels; None for one that does not fit.
    """
    tok, model = scorer.loaded.tokenizer, scorer.loaded.model
    labels = LabelTokens.of(corpora.SCHEMA, tok, corpora.STEERLM.label_marker)
    columns = torch.tensor([ids for (ids,) in labels.levels])  # a token each
    out: list[dict[int, Values] | None] = []
    for conversation, found in zip(given, levels, strict=True):
        messages = tuple(replace(m, attributes=found.get(i), weight=1) for i, m in enumerate(conversation.messages))
        (document,) = build_documents([replace(conversation, messages=messages)], tok, corpora.STEERLM, corpora.SCHEMA)
        sample = make_sample(document, "ap_text", labels=labels)
        if sample is None or len(sample.tokens_T) > MAX_TOKENS:
            out.append(None)
            continue
        ids_T = torch.from_numpy(sample.tokens_T).long()
        positions_T = torch.arange(len(ids_T))
        packed = PackedTokens.from_cu_seqlens(torch.tensor([0, len(ids_T)], dtype=torch.int32), positions_T)
        logits_TV = model(ids_T[None], positions_T[None], None, labels=None, packed_seq_params=packed)[0]
        where = np.flatnonzero(sample.loss_mask_T & np.isin(sample.tokens_T, columns.numpy()))
        expected_L = torch.softmax(logits_TV[where - 1][:, columns], -1) @ torch.arange(10.0, dtype=torch.float64)
        values = iter(expected_L.tolist())
        out.append({turn: {name: next(values) for name in one} for turn, one in found.items()})
        assert next(values, None) is None
    return out


def generative(tokenizer: Path) -> dict[str, Any]:
    given = conversations()
    usual, greedy = writer(P(), tokenizer, "expected"), writer(P(), tokenizer, "greedy")
    told: list[int] = []
    found: dict[str, Any] = {"usual": usual.score(given, told.append), "truncated": usual.truncated_turns, "told": told}
    found["levels"] = greedy.score(given)
    found["as trained"] = as_trained(usual, given, found["levels"])
    found["reversed"] = usual.score(given[::-1])[::-1]
    found["one at a time"] = [usual.score([c])[0] for c in given]
    found["batch_tokens=1"] = writer(P(), tokenizer, "expected", 1).score(given)
    found["without labels"] = usual.score(
        [replace(c, messages=tuple(replace(m, attributes=None, weight=1) for m in c.messages)) for c in given]
    )
    return found


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
    found["generative"] = generative(tokenizer)
    return found


def two_ranks(tokenizer: Path) -> dict[str, Scores]:
    found = {}
    for name, layout in LAYOUTS.items():
        loaded = scorer(layout, tokenizer)
        found[name] = score_all(loaded, conversations())
        found[f"{name}, one conversation"] = score_all(loaded, conversations()[:1])
        found[f"{name}, generative"] = score_all(writer(layout, tokenizer, "expected"), conversations())
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


# Generative models


@pytest.mark.distributed
def test_a_generative_model_labels_every_turn_with_what_it_has_seen(measured: dict[str, Any]) -> None:
    found, given = measured["one"]["generative"], conversations()
    for conversation, turns, levels in zip(given, found["usual"], found["levels"], strict=True):
        assert sorted(turns) == [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
        assert all(list(values) == ["quality", "humor"] for values in turns.values()), "no label of toxicity was seen"
        assert all(value in range(10) for one in levels.values() for value in one.values())
    assert sum(found["told"]) == sum(map(len, found["usual"])) and found["truncated"] >= 3
    assert len({value for turns in found["levels"] for one in turns.values() for value in one.values()}) > 2


@pytest.mark.distributed
def test_a_label_is_predicted_after_what_it_was_trained_after(measured: dict[str, Any]) -> None:
    """The values are those of a plain forward pass over the training sample of the conversation with these labels."""
    found = measured["one"]["generative"]
    pairs = [pair for pair in zip(found["as trained"], found["usual"], strict=True) if pair[0]]
    assert len(pairs) > 10, "conversations that fit"
    assert largest([a for a, _ in pairs], [b for _, b in pairs]) <= TOLERANCE


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["reversed", "one at a time", "batch_tokens=1", "without labels"])
def test_company_does_not_change_a_written_label(name: str, measured: dict[str, Any]) -> None:
    found = measured["one"]["generative"]
    assert largest(found[name], found["usual"]) <= TOLERANCE


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_does_not_change_a_written_label(name: str, measured: dict[str, Any]) -> None:
    for found in measured["two"]:
        assert largest(found[f"{name}, generative"], measured["one"]["generative"]["usual"]) <= TOLERANCE
