"""Forced-format decoding gives the probabilities that a plain loop over whole label strings gives."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from steerlm_megatron.data.label_tokens import Ids, LabelTokens
from steerlm_megatron.generate.label_writer import LabelWriter, LevelTree, NotFinite
from tests.helpers.fake_model import TURN, VOCAB, FakeModel

MARKER, END = 63, 1
LEVELS: dict[str, tuple[Ids, ...]] = {
    "one token each": ((5,), (6,), (7,), (8,)),
    "digits apart, up to 12": tuple(tuple(20 + int(digit) for digit in str(level)) for level in range(13)),
    "one of two tokens": ((5,), (6,), (5, 6)),
    "several depths": ((4, 4), (4, 5, 6), (4, 5, 7), (9,), (9, 9)),
}


def labels_of(levels: tuple[Ids, ...]) -> LabelTokens:
    return LabelTokens(MARKER, ((10, 11), (12,), (13, 14, 15)), ((2, 10, 11), (2, 12), (2, 13)), levels, (END,))


def conversations(count: int, seed: int = 1) -> list[list[list[int]]]:
    rng = random.Random(seed)
    return [
        [[*(rng.randrange(VOCAB - 2) for _ in range(rng.randint(1, 25))), MARKER] for _ in range(rng.randint(1, 3))]
        for _ in range(count)
    ]


@torch.inference_mode()
def log_probability(model: FakeModel, before: Sequence[int], after: Sequence[int]) -> float:
    """Return that of the tokens ``after``, by one pass over everything, without a cache."""
    ids = torch.tensor([[*before, *after]])
    logits_TV = model(ids, torch.arange(ids.shape[1])[None], None)[0, :, :VOCAB]
    scores_TV = torch.log_softmax(logits_TV, -1)
    start = len(before) - 1
    return sum(float(scores_TV[start + number, token]) for number, token in enumerate(after))


def by_hand(model: FakeModel, labels: LabelTokens, attributes: list[int], contexts: list[list[int]]) -> list[list]:
    """Return the probabilities of the levels by a loop over whole strings."""
    before: list[int] = []
    found: list[list] = []
    for context in contexts:
        before += context
        found.append([])
        for number, attribute in enumerate(attributes):
            before += labels.later[attribute] if number else labels.first[attribute]
            last = number + 1 == len(attributes)
            follows = labels.end[0] if last else labels.later[attributes[number + 1]][0]
            scores = []
            for level in labels.levels:
                begins_another = any(other[: len(level)] == level and other != level for other in labels.levels)
                scores.append(log_probability(model, before, [*level, follows] if begins_another else level))
            exact = np.exp(np.array(scores) - max(scores))
            found[-1].append(exact / exact.sum())
            before += labels.levels[int(np.argmax(scores))]
        before += labels.end
    return found


@pytest.mark.parametrize("name", LEVELS)
def test_equals_a_loop_over_whole_strings(name: str) -> None:
    model, labels = FakeModel(), labels_of(LEVELS[name])
    model.out.data *= 0.3  # or every choice would be certain
    for attributes in ([0, 1, 2], [0, 2], [1]):
        given = conversations(4, seed=len(attributes))
        writer = LabelWriter(model, labels, attributes, VOCAB)
        found = writer.write(given)
        spread = []
        for contexts, ours in zip(given, found, strict=True):
            expected = by_hand(model, labels, attributes, contexts)
            np.testing.assert_allclose(np.array(ours), np.array(expected), rtol=1e-9, atol=1e-12)
            spread += [float(one.max()) for turn in ours for one in turn]
        assert max(spread) - min(spread) > 0.1, "probabilities that could differ"


def test_company_changes_nothing_and_a_cache_is_used_again() -> None:
    writer = LabelWriter(FakeModel(), labels_of(LEVELS["several depths"]), [0, 1, 2], VOCAB)
    given = conversations(9)
    together = writer.write(given)
    for contexts, expected in zip(given, together, strict=True):
        (alone,) = writer.write([contexts])
        np.testing.assert_allclose(np.array(alone), np.array(expected), rtol=1e-9)
    assert writer.write([[], given[0]])[0] == [] and writer.write([]) == []


@pytest.mark.parametrize("name", LEVELS)
def test_passes_and_tokens_are_as_promised(name: str) -> None:
    model, labels = FakeModel(), labels_of(LEVELS[name])
    writer, given = LabelWriter(model, labels, [0, 1, 2], VOCAB), conversations(6)
    writer.write(given)
    turns, inner = max(map(len, given)), len(LevelTree(labels.levels).inner)
    assert len(model.calls) == turns * 3 * inner
    decoding = sum(len(contexts) for contexts in given) * 3 * (inner - 1)
    assert sum(model.calls) - decoding <= sum(map(writer.tokens_of, given)), "each token once"


def test_no_level_is_the_beginning_of_another() -> None:
    for levels in LEVELS.values():
        tree = LevelTree(levels)
        paths = [[(tree.inner[node], token) for node, token in path] for path in tree.paths]
        for one, other in itertools.permutations(paths, 2):
            assert other[: len(one)] != one
        assert tree.inner[0] == () and tree.inner == sorted(tree.inner)


def test_nan_is_said_and_does_not_reach_others() -> None:
    model = FakeModel()
    writer, given = LabelWriter(model, labels_of(LEVELS["one token each"]), [0, 1], VOCAB), conversations(5)
    given[3][0][0] = TURN  # nobody else has it
    expected = writer.write(given[:3])
    with torch.no_grad():
        model.embedding[TURN] = float("nan")
    with pytest.raises(NotFinite) as caught:
        writer.write(given)
    assert caught.value.args == (3,)
    for ours, before in zip(writer.write(given[:3]), expected, strict=True):
        np.testing.assert_array_equal(np.array(ours), np.array(before))
