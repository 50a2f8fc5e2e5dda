"""The measure ``diversity``: how varied, how long and how repetitive each model's responses are.

Owns: intervals of measures of a set of texts. Does not own: these measures (``observe/diversity.py``). Invariant: all
models are measured on as many responses, to the same prompts, since measures of variety depend on the number of texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import NormalDist
from typing import Any

import numpy as np

from steerlm_megatron.evaluate.intervals import COVERAGE, NAN, Floats, Resamples, figure, verdict
from steerlm_megatron.evaluate.needs import ANSWERS
from steerlm_megatron.evaluate.protocol import Answers, Material, Need, Section
from steerlm_megatron.observe import diversity

_FOR_BLEU = 32  # responses that are compared with each other, which takes the square of their number
_NGRAM = 4  # of repetition within a response
_SEED = 0
_SETS = ("distinct_1", "distinct_2", "distinct_3", "vocabulary")  # measures of a set of texts
_MEANS = ("words", "characters", "tokens", "repetition", "cut")  # means over texts
_TITLES = {
    "distinct_1": "distinct-1", "distinct_2": "distinct-2", "distinct_3": "distinct-3", "vocabulary": "different words",
    "words": "words", "characters": "characters", "tokens": "tokens", "repetition": "repetition",
    "cut": "reached max_tokens", "self_bleu": "self-BLEU",
}  # fmt: skip


class Diversity:
    """distinct-n, self-BLEU, vocabulary, lengths and repetition of each model's responses at its best levels."""

    name = "diversity"
    version = 1
    needs: tuple[Need, ...] = (ANSWERS,)

    def run(self, material: Material) -> Section:
        """See :class:`Measure`."""
        draws = Resamples(range(len(material.prompts)))
        sets = {name: _sets(answers.texts) for name, answers in material.answers.items()}
        means = {name: _means(answers) for name, answers in material.answers.items()}
        models: dict[str, dict[str, Any]] = {}
        for name, answers in material.answers.items():
            found = {key: jackknife(*one) for key, one in sets[name].items()}
            found |= {key: draws.mean(values) for key, values in means[name].items()}
            some = [answers.texts[i] for i in diversity.sample(len(answers.texts), _FOR_BLEU, _SEED)]
            bleu = diversity.self_bleu(some)
            models[name] = {**found, "self_bleu": figure(NAN if bleu is None else bleu, n=len(some))}
        differences = _differences(draws, sets, means)
        return {
            "title": "Variety, length and repetition of responses",
            "words": [
                f"Responses to the same {len(material.prompts)} prompts at each model's best levels. distinct-n: "
                "different n-grams of words over all. Repetition: share of a response's 4-grams of words that occurred "
                "in it before. Intervals are 95 %, by a jackknife over responses for distinct-n and different words, "
                "by a bootstrap for means. self-BLEU (BLEU of a response with the others as references, over "
                f"{_FOR_BLEU} responses at most) has no interval: its terms share their texts. A dash: not measured; "
                "self-BLEU needs sacrebleu."
            ],
            "models": models,
            "differences": differences,
            "tables": _tables(models, differences),
        }


def jackknife(value: float, without: Floats) -> dict[str, Any]:
    """Return a figure of a set with the 95 % interval that its values ``without`` each one of the members give: value ±
    z · sqrt((n − 1) / n · Σ (without − mean)²) (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, §11.2).

    A bootstrap would draw some texts twice, and so find fewer different words than there are.
    """
    n = len(without)
    if n < 2 or np.isnan(without).any():
        return figure(value, n=n)
    spread = float(np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum()))
    half = NormalDist().inv_cdf(0.5 + COVERAGE / 2.0) * spread
    return figure(value, value - half, value + half, n)


def _sets(texts: Sequence[str]) -> dict[str, tuple[float, Floats]]:
    """Return each measure of a set of texts: of all, and [texts] without each one."""
    found = {f"distinct_{n}": without_each(texts, n) for n in (1, 2, 3)}
    return {
        **{name: (_share(*all_of), _shares(*each)) for name, (all_of, each) in found.items()},
        "vocabulary": (float(found["distinct_1"][0][0]), found["distinct_1"][1][0]),
    }


def without_each(texts: Sequence[str], n: int) -> tuple[tuple[float, float], tuple[Floats, Floats]]:
    """Return the numbers of different and of all n-grams of words: of all texts, and [texts] without each text."""
    grams = [Counter(_grams(text, n)) for text in texts]
    texts_with: Counter[tuple[str, ...]] = Counter(gram for one in grams for gram in one)
    different, total = len(texts_with), sum(one.total() for one in grams)
    alone = np.array([sum(texts_with[gram] == 1 for gram in one) for one in grams], dtype=np.float64)
    sizes = np.array([one.total() for one in grams], dtype=np.float64)
    return (different, total), (different - alone, total - sizes)


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = diversity.words(text)
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _share(different: float, total: float) -> float:
    return different / total if total else NAN


def _shares(different: Floats, total: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, different / total, NAN)


def _means(answers: Answers) -> dict[str, Floats]:
    return {
        "words": np.array([len(diversity.words(text)) for text in answers.texts], dtype=np.float64),
        "characters": np.array([len(text) for text in answers.texts], dtype=np.float64),
        "tokens": np.array(answers.tokens, dtype=np.float64),
        "repetition": np.array([diversity.repetition(text, _NGRAM) for text in answers.texts]),
        "cut": np.array(answers.cut, dtype=np.float64),
    }


def _differences(
    draws: Resamples, sets: Mapping[str, Mapping[str, tuple[float, Floats]]], means: Mapping[str, Mapping[str, Floats]]
) -> list[dict[str, Any]]:
    """Return for each two models, the earlier one first, the later one's figures minus the earlier one's."""
    rows = []
    for low, high in combinations(sets, 2):
        for key in _SETS:
            (of_low, without_low), (of_high, without_high) = sets[low][key], sets[high][key]
            rows.append((low, high, key, jackknife(of_high - of_low, without_high - without_low)))
        rows += [(low, high, key, draws.mean(means[high][key] - means[low][key])) for key in _MEANS]
    return [
        {"low": low, "high": high, "measured": key, "difference": found, "verdict": verdict(found)}
        for low, high, key, found in rows
    ]


def _tables(models: Mapping[str, Mapping[str, Any]], differences: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    tables: list[dict[str, Any]] = [
        {
            "title": "Responses of each model",
            "columns": ["measured", *models],
            "rows": [[title, *(found[key] for found in models.values())] for key, title in _TITLES.items()],
        }
    ]
    if differences:
        tables.append(
            {
                "title": "Differences of models",
                "columns": ["measured", "model", "against", "difference", "is"],
                "rows": [
                    [_TITLES[row["measured"]], row["high"], row["low"], row["difference"], row["verdict"]]
                    for row in differences
                ],
                "folded": True,
            }
        )
    return tables
