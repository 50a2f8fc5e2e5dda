"""What one round of bootstrapping changed: statistics of the annotated responses and of those that it kept.

Owns: the content of ``bootstrap.json``. Does not own: the measures of text (``observe/diversity.py``) and of agreement
(``observe/stats.py``), how a report shows them (``steerlm_megatron/report``). Invariants: measures that depend on the
number of texts are of equally many on both sides; asked and measured values are of all scored responses, since those
that filters kept are no fair sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steerlm_megatron.observe import diversity, stats
from steerlm_megatron.steer.attributes import AttributeSchema

STATISTICS_FILE = "bootstrap.json"  # its name in the run folder
_MOST_TEXTS = 1000  # responses of either side whose words are counted
_MOST_FOR_BLEU = 32  # of these, the responses that are compared with each other
_BINS = 12  # of the histogram of lengths
Values = Mapping[str, float]
Response = tuple[str, Values]  # text, measured values


def statistics(
    before: Sequence[Response],
    kept: Sequence[Response],
    asked: Sequence[tuple[Mapping[str, int], Values]],
    schema: AttributeSchema,
    seed: int,
) -> dict[str, Any]:
    """Return the content of ``bootstrap.json`` but for the counts.

    Args:
        before: the annotated responses that the input trains; ``kept``: the drawn ones that are written.
        asked: per scored response, whether it was kept or not, the levels asked for and the measured values.
        seed: of the samples of texts.

    Returns:
        ``sample`` (how many texts ``text`` is of), ``text`` (per side: distinct_1 … self_bleu, quantiles of the number
        of words), ``lengths`` (a histogram of both sides), ``attributes`` (per name and side: mean and the count of
        each level; asked: mean asked, mean measured, mae, pearson, n), ``max_level``.
    """
    size = min(len(before), len(kept), _MOST_TEXTS)
    texts = {
        side: [responses[i][0] for i in diversity.sample(len(responses), size, seed)]
        for side, responses in (("before", before), ("after", kept))
    }
    lengths = {side: [len(diversity.words(text)) for text in some] for side, some in texts.items()}
    return {
        "sample": {"texts": size, "texts_for_self_bleu": min(size, _MOST_FOR_BLEU), "seed": seed},
        "text": {side: _of_texts(some, lengths[side], seed) for side, some in texts.items()},
        "lengths": _histogram(lengths),
        "attributes": {
            name: {
                "before": _levels([values for _, values in before], name, schema),
                "after": _levels([values for _, values in kept], name, schema),
                "asked": _asked(asked, name),
            }
            for name in schema.seen
        },
        "max_level": schema.max_level,
    }


def _of_texts(texts: Sequence[str], lengths: Sequence[int], seed: int) -> dict[str, Any]:
    some = [texts[i] for i in diversity.sample(len(texts), _MOST_FOR_BLEU, seed)]
    low, median, high = np.percentile(lengths, (10, 50, 90)) if lengths else [float("nan")] * 3
    return {
        **{f"distinct_{n}": diversity.distinct(texts, n) for n in (1, 2, 3)},
        "self_bleu": diversity.self_bleu(some),
        "vocabulary": diversity.vocabulary(texts),
        "words_mean": float(np.mean(lengths)) if lengths else float("nan"),
        "words_p10": float(low),
        "words_median": float(median),
        "words_p90": float(high),
    }


def _histogram(lengths: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return equal bins from 0 to the longest of both sides, and how many texts of each side are in each bin."""
    top = max((length for some in lengths.values() for length in some), default=1)
    edges = np.linspace(0, max(top, 1), _BINS + 1)
    counts = {side: np.histogram(some, edges)[0].tolist() for side, some in lengths.items()}
    return {"edges": edges.round(2).tolist(), **counts}


def _levels(values: Sequence[Values], name: str, schema: AttributeSchema) -> dict[str, Any]:
    """Return the mean of an attribute, and how often it has each level, over the responses with a value of it."""
    found = [one[name] for one in values if name in one]
    counts = [0] * (schema.max_level + 1)
    for value in found:
        counts[schema.level(value)] += 1
    return {"mean": float(np.mean(found)) if found else float("nan"), "levels": counts}


def _asked(asked: Sequence[tuple[Mapping[str, int], Values]], name: str) -> dict[str, Any]:
    pairs = [(values[name], levels[name]) for levels, values in asked if name in levels and name in values]
    measured, wanted = [float(pair[0]) for pair in pairs], [float(pair[1]) for pair in pairs]
    return {
        "mean": float(np.mean(wanted)) if pairs else float("nan"),
        "measured_mean": float(np.mean(measured)) if pairs else float("nan"),
        "mae": stats.mae(measured, wanted),
        "pearson": stats.pearson(measured, wanted),
        "n": len(pairs),
    }
