"""Judges that are libraries: what they measure, that they are of one form, and that a missing library is named."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from steerlm_megatron.config.inference import JUDGES as NAMES
from steerlm_megatron.config.inference import MEASURES as MEASURE_NAMES
from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.evaluate.judges import JUDGES, lacking, open_judges
from steerlm_megatron.evaluate.lexical import LEXICAL, ProfanityJudge, TextstatJudge, VaderJudge
from steerlm_megatron.evaluate.measures import MEASURES
from steerlm_megatron.evaluate.protocol import Judge, JudgeContext
from steerlm_megatron.steer.messages import Message
from steerlm_megatron.steer.records import Conversation
from tests.helpers.cli import run_here

EASY = "The cat sat on the mat. The dog ran to it."
HARD = "Notwithstanding considerable methodological heterogeneity, investigations corroborate the hypothesis."
PROMPT = Conversation("p", (Message("user", "Tell me."),))


def opened(kind: Any, package: str) -> Judge:
    pytest.importorskip(package)
    judge: Judge = kind(JudgeContext(Config(), Path()))
    return judge


def measured(judge: Judge, *texts: str) -> list[dict[str, float]]:
    found = judge.measure([PROMPT] * len(texts), texts)
    assert len(found) == len(texts) and all(set(row) <= set(judge.measured) for row in found)
    assert all(type(value) is float for row in found for value in row.values())
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_textstat_tells_easy_from_hard_and_no_words_from_some() -> None:
    judge = opened(TextstatJudge, "textstat")
    easy, hard, empty, signs = measured(judge, EASY, HARD, "", "!!!")
    assert (easy["words"], easy["sentences"], easy["words_per_sentence"]) == (11, 2, 5.5)
    assert easy["flesch_reading_ease"] > 90 > 10 > hard["flesch_reading_ease"]
    assert hard["flesch_kincaid_grade"] > 15 > 3 > easy["flesch_kincaid_grade"]
    assert empty == signs == {"words": 0.0, "sentences": 0.0}, "nothing is said of the readability of no words"
    # Flesch and Kincaid by hand: 2 sentences, 11 words, 11 syllables.
    assert easy["flesch_kincaid_grade"] == pytest.approx(0.39 * 11 / 2 + 11.8 * 11 / 11 - 15.59, abs=0.01)


def test_vader_tells_praise_from_blame() -> None:
    good, bad, neither = measured(opened(VaderJudge, "vaderSentiment"), "I love it!", "I hate this.", "")
    assert good["sentiment"] > 0.5 and bad["sentiment"] < -0.5 and neither["sentiment"] == 0
    assert bad["negative"] > 0.5 > good["negative"] == 0


def test_profanity_tells_insults_from_politeness() -> None:
    judge = opened(ProfanityJudge, "profanity_check")
    rude, polite, empty = measured(judge, "You are an idiot and an asshole.", "What a nice day.", "")
    assert rude["profanity"] > 0.9 > 0.2 > max(polite["profanity"], empty["profanity"]) and measured(judge) == []


def test_a_missing_library_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()
    config.evaluate.judge, config.evaluate.judges = "demo", ["textstat", "vader", "profanity"]
    there = importlib.util.find_spec
    monkeypatch.setattr(
        "steerlm_megatron.evaluate.lexical.find_spec", lambda name: None if name != "json" else there(name)
    )
    said = lacking(config)
    assert len(said) == 3 and all("pip install 'steerlm_megatron[judges]'" in one for one in said)
    assert [kind.name for kind in LEXICAL] == config.evaluate.judges


def test_a_textstat_that_would_download_its_dictionary_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Later:
        def lexicon_count(self, text: str) -> int:
            raise LookupError("Resource cmudict not found")

    monkeypatch.setattr("steerlm_megatron.evaluate.lexical.importlib.import_module", lambda name: Later())
    with pytest.raises(UserError, match=r"no dictionary of syllables; pip install 'steerlm_megatron\[judges\]'"):
        TextstatJudge(JudgeContext(Config(), Path()))


def test_what_stands_for_an_attribute_must_be_measured() -> None:
    config = Config()
    config.evaluate.judge, config.evaluate.judge_attributes = "demo", {"wrods": "verbosity"}
    with pytest.raises(UserError, match="evaluate.judge_attributes: no judge of evaluate.judges measures wrods"):
        open_judges(JudgeContext(config, Path()), "quality")


def test_what_a_measure_stands_for_must_be_an_attribute(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("evaluate", "attributes=helpsteer", "evaluate.judge_attributes.words=verbosty") == 2
    assert "evaluate.judge_attributes.words=verbosty is not one of attributes.names" in capsys.readouterr().err


def test_the_registries_have_the_names_of_the_configuration() -> None:
    assert tuple(JUDGES) == NAMES and tuple(MEASURES) == MEASURE_NAMES
