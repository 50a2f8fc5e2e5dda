"""How varied texts are, and how much one of them repeats itself.

Owns: what a word is, and the measures that filters of responses and the report share. Does not own: BLEU (sacrebleu),
what is done with the measures (``stages/response_filters.py``, ``stages/bootstrap_stats.py``). Invariant: a measure
depends on the texts alone; where it samples, the seed and the size of the sample are arguments.

Measures of diversity fall with the number of texts and with their length, since words come back. So they compare two
sets of texts only where both have equally many.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterator, Sequence

# Kana and Han characters, which no spaces divide into words: each counts as a word.
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+|[^\w\s]")


def words(text: str) -> list[str]:
    """Return the words of ``text`` without regard to case: runs of letters and digits, and each punctuation mark, kana
    and Han character by itself.
    """
    return _WORD.findall(text.casefold())


def normalised(text: str) -> str:
    """Return what two texts have in common that differ in case, in white space and in the form of characters alone
    (Unicode's NFKC, case folded).
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def repetition(text: str, n: int) -> float:
    """Return the share of the n-grams of words in ``text`` that occurred in it before, in [0, 1):

        1 − |different n-grams| / |n-grams|

    which is seq-rep-n (Welleck et al., arXiv 1908.04319) over words. It is 0 for a text of fewer than n words.
    """
    grams = list(_ngrams(words(text), n))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: Sequence[str], n: int) -> float:
    """Return the number of different n-grams of words over the number of all n-grams in ``texts``, in (0, 1]:
    distinct-n (Li et al., arXiv 1510.03055, who divide by the number of words). NaN without any n-gram.
    """
    grams = [gram for text in texts for gram in _ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def vocabulary(texts: Sequence[str]) -> int:
    """Return the number of different words in ``texts``."""
    return len({word for text in texts for word in words(text)})


def sample(size: int, wanted: int, seed: int) -> list[int]:
    """Return ``min(size, wanted)`` of the indices 0 … ``size`` − 1 in ascending order, drawn with ``seed``."""
    return sorted(random.Random(seed).sample(range(size), wanted)) if wanted < size else list(range(size))


def self_bleu(texts: Sequence[str]) -> float | None:
    """Return the mean BLEU, in 0..100, of each text with all the others as references: self-BLEU (Zhu et al., arXiv
    1802.01886). The higher it is, the more alike the texts are. None where sacrebleu is not installed, or for
    fewer than two texts.

    BLEU is sacrebleu's of a sentence (its tokenizer 13a, exponential smoothing, effective order). The time grows with
    the square of the number of texts; 32 texts of 150 words take some 3 seconds of a CPU.
    """
    if len(texts) < 2:
        return None
    try:
        from sacrebleu.metrics import BLEU  # imported here, since it is optional and takes half a second
    except ImportError:
        return None
    bleu, texts = BLEU(effective_order=True), list(texts)
    scores = [bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts)]
    return float(sum(scores) / len(scores))


def _ngrams(sequence: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    for start in range(len(sequence) - n + 1):
        yield tuple(sequence[start : start + n])
