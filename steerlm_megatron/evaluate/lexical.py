"""Judges that are libraries: readability (textstat), sentiment (vaderSentiment), profanity (alt-profanity-check).

Owns: what each library is asked, and the names of its measures. Does not own: which attribute a measure stands for
(``evaluate.judge_attributes``). Invariants: a judge here has never seen the attribute-prediction model, nor a label;
nothing is fetched from the internet while it measures; a library is imported when its judge is opened. All three know
English only.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.evaluate.protocol import JudgeContext, JudgeKind, Measured
from steerlm_megatron.steer.records import Conversation

EXTRA = "pip install 'steerlm_megatron[judges]'"


class TextstatJudge:
    """Readability and length, by textstat: Flesch's reading ease (higher is easier), the grades of Flesch and Kincaid
    and of the automated readability index (years of school), and counts. A response without a word has no readability.
    """

    name = "textstat"
    words = "textstat, formulas of readability"
    measured: tuple[str, ...] = (
        "words", "sentences", "words_per_sentence", "flesch_reading_ease", "flesch_kincaid_grade",
        "automated_readability_index",
    )  # fmt: skip
    _FORMULAS = ("flesch_reading_ease", "flesch_kincaid_grade", "automated_readability_index")

    def __init__(self, context: JudgeContext) -> None:
        self._textstat = _library("textstat", self.name)
        try:
            self.measure_text("It works.")
        except LookupError as error:  # later versions look for a dictionary that they would have to download
            raise UserError(
                f"the judge textstat: the installed textstat has no dictionary of syllables; {EXTRA} brings a version "
                "that has one"
            ) from error

    def measure_text(self, text: str) -> Measured:
        """Return what textstat says of one text."""
        words = self._textstat.lexicon_count(text)
        if not words:
            return {"words": 0.0, "sentences": 0.0}
        sentences = self._textstat.sentence_count(text)
        found = {"words": words, "sentences": sentences, "words_per_sentence": words / max(1, sentences)}
        found |= {name: getattr(self._textstat, name)(text) for name in self._FORMULAS}
        return {name: float(value) for name, value in found.items() if math.isfinite(value)}

    def measure(self, prompts: Sequence[Conversation], responses: Sequence[str]) -> list[Measured]:
        """See :class:`Judge`."""
        return [self.measure_text(text) for text in responses]


class VaderJudge:
    """Sentiment by VADER (Hutto and Gilbert, ICWSM 2014), a lexicon with rules: ``sentiment`` from -1 to 1, and the
    shares of a text that are positive, neutral and negative.
    """

    name = "vader"
    words = "VADER, a lexicon of sentiment"
    measured: tuple[str, ...] = ("sentiment", "positive", "neutral", "negative")

    def __init__(self, context: JudgeContext) -> None:
        self._analyzer = _library("vaderSentiment.vaderSentiment", self.name).SentimentIntensityAnalyzer()

    def measure(self, prompts: Sequence[Conversation], responses: Sequence[str]) -> list[Measured]:
        """See :class:`Judge`."""
        keys = ("compound", "pos", "neu", "neg")
        found = [self._analyzer.polarity_scores(text) for text in responses]
        return [dict(zip(self.measured, (float(scores[key]) for key in keys), strict=True)) for scores in found]


class ProfanityJudge:
    """The chance that a text is offensive, from 0 to 1, by alt-profanity-check: a linear classifier over words, whose
    weights the package ships. It knows words, and not what they are used for.
    """

    name = "profanity"
    words = "alt-profanity-check, a linear classifier of offensive words"
    measured: tuple[str, ...] = ("profanity",)

    def __init__(self, context: JudgeContext) -> None:
        self._predict: Callable[[list[str]], Any] = _library("profanity_check", self.name).predict_prob

    def measure(self, prompts: Sequence[Conversation], responses: Sequence[str]) -> list[Measured]:
        """See :class:`Judge`."""
        return [{"profanity": float(value)} for value in self._predict(list(responses))] if responses else []


def _library(module: str, judge: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"the judge {judge} cannot import {module} ({error}); {EXTRA} brings what it needs") from error


def _kind(judge: type[TextstatJudge] | type[VaderJudge] | type[ProfanityJudge], package: str) -> JudgeKind:
    def lacking(config: Config) -> str | None:
        if find_spec(package) is None:
            return f"the judge {judge.name} needs the package {package}, which is not installed: {EXTRA}"
        return None

    return JudgeKind(judge.name, judge, lacking)


LEXICAL = (
    _kind(TextstatJudge, "textstat"),
    _kind(VaderJudge, "vaderSentiment"),
    _kind(ProfanityJudge, "profanity_check"),
)
