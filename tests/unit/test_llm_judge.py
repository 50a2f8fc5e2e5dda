"""The LLM judge and its measures, against a stand-in endpoint: verdicts, faults, the cache, position bias, cost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.evaluate.answer_cache import Answer, AnswerCache, key_of
from steerlm_megatron.evaluate.grades import Grades
from steerlm_megatron.evaluate.judged import COMPARED, ENDPOINT
from steerlm_megatron.evaluate.llm_judge import LLMJudge, problems
from steerlm_megatron.evaluate.measures import run
from steerlm_megatron.evaluate.outside import read_answers
from steerlm_megatron.evaluate.protocol import Answers, Material, Section
from steerlm_megatron.evaluate.questions import OTHER, question_of
from steerlm_megatron.evaluate.verdicts import read_choice
from steerlm_megatron.evaluate.wins import Wins, pairs_of
from steerlm_megatron.steer.messages import Message
from steerlm_megatron.steer.records import Conversation
from tests.helpers.judge_endpoint import Fault, JudgeStandIn, judging, longer, shown


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steerlm_megatron.serve.chat_endpoint._BACKOFF_SEC", 0.01)


@pytest.fixture
def stand_in() -> Iterator[tuple[JudgeStandIn, str]]:
    how = JudgeStandIn()
    with judging(how) as url:
        yield how, url


def config_of(url: str | None, **changes: Any) -> Config:
    config = Config()
    config.evaluate.llm_judge.url = url
    for name, value in changes.items():
        setattr(config.evaluate.llm_judge, name, value)
    return config


def prompts(count: int, **extra: Any) -> list[Conversation]:
    return [Conversation(f"q{i}", (Message("user", f"question {i}"),), extra=extra) for i in range(count)]


def material(
    folder: Path, config: Config, answers: dict[str, Sequence[str]], asked: Sequence[Conversation] | None = None,
    later: dict[str, Sequence[Sequence[str]]] | None = None,
) -> Material:  # fmt: skip
    count = len(next(iter(answers.values())))
    drawn = {
        name: Answers(None, texts, [1] * count, [False] * count, {}, (later or {}).get(name, ()))
        for name, texts in answers.items()
    }
    return Material(config, folder, "quality", prompts=asked or prompts(count), answers=drawn)


LONG, SHORT = [f"a long answer {i}" for i in range(12)], [f"short {i}" for i in range(12)]


def model(section: Section, name: str) -> dict[str, Any]:
    return {key: section["models"][name][key] for key in ("won", "tied", "lost")}


def test_a_genuine_preference_is_found(tmp_path: Path, stand_in: tuple[JudgeStandIn, str]) -> None:
    how, url = stand_in
    section = Wins().run(material(tmp_path, config_of(url), {"sft": SHORT, "acsft": LONG}))
    assert model(section, "acsft") == {"won": 12, "tied": 0, "lost": 0}
    assert model(section, "sft") == {"won": 0, "tied": 0, "lost": 12}
    assert section["models"]["acsft"]["elo"]["value"] > 1050 > 950 > section["models"]["sft"]["elo"]["value"]
    wilson = pytest.approx(1.96**2 / (12 + 1.96**2))
    assert section["models"]["sft"]["win_rate"] == {"value": 0.0, "low": 0.0, "high": wilson, "n": 12}
    (pair,) = section["pairs"]
    assert (pair["first"], pair["verdict"], pair["undecided"]) == ("sft", "below", 0)
    assert section["position_bias"]["first_place"]["value"] == 0.5
    assert (
        section["position_bias"]["verdict"] == "not told apart" and section["position_bias"]["agreement"]["value"] == 1
    )
    assert section["cost"] == {
        "requests": 24, "cached": 0, "prompt_tokens": 2400, "completion_tokens": 240, "unmetered": 0,
        "seconds": section["cost"]["seconds"], "price_per_million": [], "money": None,
    }  # fmt: skip
    json.dumps(section)


def test_a_judge_that_prefers_the_first_place_makes_ties_and_is_found_out(
    tmp_path: Path, stand_in: tuple[JudgeStandIn, str]
) -> None:
    how, url = stand_in
    how.says = lambda messages: "[[A]]"
    section = Wins().run(material(tmp_path, config_of(url), {"sft": SHORT, "acsft": LONG}))
    assert model(section, "sft") == model(section, "acsft") == {"won": 0, "tied": 12, "lost": 0}
    bias = section["position_bias"]
    assert bias["first_place"]["value"] == 1.0 and bias["first_place"]["n"] == 24
    assert bias["verdict"] == "prefers the first place" and bias["agreement"]["value"] == 0
    few = Wins().run(material(tmp_path, config_of(url), {"sft": SHORT[:3], "acsft": LONG[:3]}))["position_bias"]
    assert few["first_place"]["value"] == 1 and few["verdict"] == "not told apart", "three questions do not show it"
    assert section["models"]["sft"]["elo"]["value"] == 1000


def test_a_preference_is_found_through_a_bias(tmp_path: Path, stand_in: tuple[JudgeStandIn, str]) -> None:
    """A judge that takes the first answer unless the second is much longer: the two orders together are right where it
    sees a difference, and tie where the place alone decides.
    """
    how, url = stand_in

    def leans(messages: list[dict[str, str]]) -> str:
        a, b = map(len, shown(messages))
        return "[[B]]" if b > a + 20 else "[[A]]"

    how.says = leans
    answers = [f"{'much longer ' * 4 * (i < 6)}{text}" for i, text in enumerate(LONG)]
    section = Wins().run(material(tmp_path, config_of(url), {"sft": SHORT, "acsft": answers}))
    assert model(section, "acsft") == {"won": 6, "tied": 6, "lost": 0}
    assert section["pairs"][0]["verdict"] == "below" and section["position_bias"]["first_place"]["value"] == 0.75
    assert section["position_bias"]["verdict"] == "prefers the first place"


def test_malformed_verdicts_are_asked_for_again_then_counted(
    tmp_path: Path, stand_in: tuple[JudgeStandIn, str]
) -> None:
    how, url = stand_in

    def mumbles(messages: list[dict[str, str]]) -> str:
        number = messages[1]["content"].partition("question ")[2].partition("\n")[0]
        said_before = len(messages) > 2
        if number == "3" or (number == "4" and not said_before):
            return "A is better, or B [[A]] [[B]]"
        return longer(messages)

    how.says = mumbles
    section = Wins().run(material(tmp_path, config_of(url), {"sft": SHORT, "acsft": LONG}))
    assert section["verdicts"] == {"malformed": 2, "refused": 0, "asked_again": 6, "identical": 0, "refusals": {}}
    assert model(section, "acsft") == {"won": 11, "tied": 0, "lost": 0} and section["pairs"][0]["undecided"] == 1
    again = [body["messages"] for body in how.asked if len(body["messages"]) == 4]
    assert len(again) == 4 and again[0][2]["content"].startswith("A is better") and "verdict" in again[0][3]["content"]
    assert section["cost"]["requests"] == 24 + 6 and section["models"]["acsft"]["win_rate"]["n"] == 11


def test_every_verdict_malformed_is_no_figure_and_no_crash(tmp_path: Path, stand_in: tuple[JudgeStandIn, str]) -> None:
    how, url = stand_in
    how.says = lambda messages: "I would rather not say."
    many = material(tmp_path, config_of(url, verdict_tries=1), {"sft": SHORT, "acsft": LONG})
    section = Wins().run(many)
    assert section["verdicts"]["malformed"] == 24 and model(section, "sft") == {"won": 0, "tied": 0, "lost": 0}
    assert section["pairs"][0]["verdict"] == "not measured" == section["position_bias"]["verdict"]
    graded = Grades().run(many)
    assert graded["verdicts"]["malformed"] == 24 and graded["models"]["sft"]["n"] == 0


def test_what_was_answered_is_not_asked_again_after_a_cut(tmp_path: Path, stand_in: tuple[JudgeStandIn, str]) -> None:
    how, url = stand_in
    how.fault_of = lambda body: "cut" if len(how.asked) > 10 else None
    work = material(tmp_path, config_of(url, max_tries=2, concurrency=1), {"sft": SHORT, "acsft": LONG})
    with pytest.raises(
        UserError, match=rf"{url}/v1 gives no answer.*10 answers of the judge are kept in .*answers.jsonl"
    ):
        Wins().run(work)
    file = tmp_path / "judged" / "answers.jsonl"
    with open(file, "ab") as torn:
        torn.write(b'{"key": "half of a li')
    how.fault_of, before = lambda body: None, len(how.asked)
    section = Wins().run(work)
    assert len(how.asked) - before == 14 == section["cost"]["requests"] and section["cost"]["cached"] == 10
    assert section["cost"]["prompt_tokens"] == 2400, "tokens of earlier runs were paid for as well"
    again = Wins().run(work)
    assert len(how.asked) - before == 14 and again["cost"]["requests"] == 0
    assert {k: v for k, v in again.items() if k not in ("cost", "tables")} == {
        k: v for k, v in section.items() if k not in ("cost", "tables")
    }
    assert all(json.loads(line) for line in file.read_bytes().splitlines())


@pytest.mark.parametrize("fault", [(429, {"Retry-After": "0.05"}, {"error": "busy"}), (500, {}, "no"), "cut", "late"])
def test_faults_on_the_way_change_nothing(tmp_path: Path, stand_in: tuple[JudgeStandIn, str], fault: Fault) -> None:
    how, url = stand_in
    how.faults = [fault, None, None, fault]
    section = Wins().run(material(tmp_path, config_of(url, timeout_sec=0.4), {"sft": SHORT[:3], "acsft": LONG[:3]}))
    assert model(section, "acsft") == {"won": 3, "tied": 0, "lost": 0}


def test_refused_conversations_are_counted_with_their_reason(
    tmp_path: Path, stand_in: tuple[JudgeStandIn, str]
) -> None:
    how, url = stand_in
    too_long: Fault = (400, {}, {"error": {"message": "context length"}})
    how.fault_of = lambda body: too_long if "question 2\n" in body["messages"][1]["content"] else None
    section = Wins().run(material(tmp_path, config_of(url), {"sft": SHORT, "acsft": LONG}))
    assert section["verdicts"]["refusals"] == {"context length": 2} and section["pairs"][0]["undecided"] == 1
    assert ["Why it refused", ["context length", 2]] in [[t["title"], t["rows"][0]] for t in section["tables"]]


def test_vicuna_scores_are_averaged_and_give_percents(tmp_path: Path, stand_in: tuple[JudgeStandIn, str]) -> None:
    how, url = stand_in

    def scores(messages: list[dict[str, str]]) -> str:
        a, b = map(len, shown(messages))
        return f"{9 if a > b else 6} {9 if b > a else 5}\nI saw two answers."  # a point more for the first place

    how.says = scores
    work = material(
        tmp_path, config_of(url, protocol="vicuna", price_per_million=[2.0, 10.0]), {"sft": SHORT, "acsft": LONG}
    )
    section = Wins().run(work)
    (pair,) = section["pairs"]
    assert pair["points"] == [12 * 5.5, 12 * 9.0] and pair["percent"]["value"] == pytest.approx(100 * 5.5 / 9)
    assert section["cost"]["money"] == pytest.approx((2400 * 2 + 240 * 10) / 1e6)
    how.usage = False
    assert Wins().run(material(tmp_path / "other", work.config, {"a": LONG, "b": SHORT}))["cost"]["money"] is None


def test_equal_answers_tie_without_a_question_and_equal_pairs_are_asked_once(
    tmp_path: Path, stand_in: tuple[JudgeStandIn, str]
) -> None:
    how, url = stand_in
    asked = [*prompts(1), *prompts(1), *prompts(1)]
    section = Wins().run(
        material(tmp_path, config_of(url), {"a": ["same", "x", "x"], "b": ["same", "yy", "yy"]}, asked)
    )
    assert model(section, "b") == {"won": 2, "tied": 1, "lost": 0} and len(how.asked) == 2
    assert section["verdicts"]["identical"] == 1 and section["position_bias"]["agreement"]["n"] == 2


def test_models_that_say_the_same_are_not_judged(tmp_path: Path, stand_in: tuple[JudgeStandIn, str]) -> None:
    how, url = stand_in
    section = Wins().run(material(tmp_path, config_of(url), {"a": LONG, "b": LONG}))
    assert model(section, "a") == {"won": 0, "tied": 12, "lost": 0} and not how.asked
    assert section["position_bias"]["verdict"] == "not measured" and not (tmp_path / "judged").exists()


def test_turns_and_categories(tmp_path: Path, stand_in: tuple[JudgeStandIn, str]) -> None:
    how, url = stand_in
    asked = [
        Conversation("a", (Message("system", "Be kind."), Message("user", "one")), extra={
            "category": "math", "follow_ups": ["and then?"], "reference": [None, "42"]}),
        Conversation("b", (Message("user", "hi"), Message("assistant", "hello"), Message("user", "two"))),
    ]  # fmt: skip
    later = {"x": [["later long long", ""]], "y": [["later", ""]]}
    section = Wins().run(material(tmp_path, config_of(url), {"x": ["s", "long"], "y": ["lo", "l"]}, asked, later))
    assert (
        section["slices"]["category"]["math"]["x"]["value"] == 0.5 and section["slices"]["turn"]["2"]["x"]["value"] == 1
    )
    assert section["slices"]["category"][OTHER]["x"]["n"] == 1
    texts = {body["messages"][1]["content"] for body in how.asked}
    assert len(texts) == 6
    second = next(text for text in texts if "and then?" in text)
    assert "42" in second and "Be kind." in second and "compare with" in second
    assert any("=== Assistant A ===\nhello" in text and "=== Assistant B ===\nhello" in text for text in texts)
    with pytest.raises(UserError, match="follow_ups of the record c must be a list of texts"):
        question_of(Conversation("c", (Message("user", "x"),), extra={"follow_ups": [1]}))


def test_three_models_and_a_baseline(tmp_path: Path, stand_in: tuple[JudgeStandIn, str]) -> None:
    how, url = stand_in
    answers = {"a": SHORT, "b": LONG, "c": [f"{text}, and more" for text in LONG]}
    section = Wins().run(material(tmp_path, config_of(url), answers))
    assert len(section["pairs"]) == 3 and section["reference"] == "a"
    rated = [section["models"][name]["bradley_terry"]["value"] for name in "abc"]
    assert rated == sorted(rated) and section["models"]["c"]["expected"] > section["models"]["b"]["expected"] > 0.5
    assert pairs_of("abc", "b") == [("a", "b"), ("c", "b")]
    alone = Wins().run(material(tmp_path, config_of(url, baseline="b"), answers))
    assert [(p["first"], p["second"]) for p in alone["pairs"]] == [("a", "b"), ("c", "b")] and alone["reference"] == "b"
    assert alone["cost"]["requests"] == 0, "both orders of every pair were asked already, whatever the pair is called"


def test_answers_from_files_are_judged_with_the_others(tmp_path: Path, stand_in: tuple[JudgeStandIn, str]) -> None:
    how, url = stand_in
    asked = [*prompts(1, follow_ups=["more"]), prompts(2)[1]]
    file = tmp_path / "chatgpt.jsonl"
    rows: list[dict[str, Any]] = [
        {"question_id": "q0", "choices": [{"turns": ["the longest answer of all", "the longest again"]}]},
        {"id": "q1", "messages": [{"role": "user", "content": "question 1"}, {"role": "assistant", "content": "no"}]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outside = {"chatgpt": read_answers(str(file), asked, "k")}
    assert outside["chatgpt"].turns(0) == ["the longest answer of all", "the longest again"]
    assert outside["chatgpt"].turns(1) == ["no", ""]
    drawn = material(tmp_path, config_of(url, baseline="chatgpt"), {"sft": ["a", "bbb"]}, asked, {"sft": [["c", ""]]})
    work = replace(drawn, outside=outside)
    section = Wins().run(work)
    assert model(section, "chatgpt") == {"won": 2, "tied": 0, "lost": 1} and section["reference"] == "chatgpt"
    how.says = lambda messages: "[[6]]"
    assert Grades().run(work)["models"]["chatgpt"]["n"] == 3
    config = config_of(url, answers={"chatgpt": str(file)})
    config.evaluate.prompts, config.evaluate.models.sft = "p", "m"
    assert COMPARED.lacking(config, None) is None
    assert "set two of evaluate.models" in (COMPARED.lacking(replace_answers(config, {}), None) or "")
    for row, told in (
        ({"question_id": "q0", "choices": []}, "chatgpt.jsonl:1: the row is no answer"),
        ({"question_id": "q0", "choices": [{"turns": [1]}]}, "must be a list of texts"),
        ({"question_id": "q0", "choices": [{"turns": ["x"]}]}, "k=.* lacks answers to 2 of 2 prompts, such as q0"),
    ):
        file.write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match=told):
            read_answers(str(file), asked, "k")


def replace_answers(config: Config, answers: dict[str, str]) -> Config:
    config.evaluate.llm_judge.answers = answers
    return config


def test_grades_are_compared_over_the_same_questions(tmp_path: Path, stand_in: tuple[JudgeStandIn, str]) -> None:
    how, url = stand_in

    def rates(messages: list[dict[str, str]]) -> str:
        answer = messages[1]["content"].partition("=== The assistant ===\n")[2].partition("\n===")[0]
        return "I do not know" if answer == "short 5" else f"Fine. [[{8 if 'long' in answer else 5}]]"

    how.says = rates
    section = Grades().run(material(tmp_path, config_of(url), {"sft": SHORT, "acsft": LONG}))
    assert section["models"]["acsft"]["value"] == 8 and section["models"]["sft"]["n"] == 11
    assert section["differences"] == [
        {"model": "acsft", "against": "sft", "verdict": "above",
         "difference": {"value": 3.0, "low": 3.0, "high": 3.0, "n": 11}}
    ]  # fmt: skip
    assert section["verdicts"]["malformed"] == 1 and "slices" in section
    both = run(["wins", "grades"], material(tmp_path, config_of(url), {"sft": SHORT, "acsft": LONG}))
    for found in both.values():
        plain = json.dumps(found)  # a figure without a value is NaN, which evaluation.json has as null
        assert found["version"] == 1 and json.dumps(json.loads(plain)) == plain
        assert all(len(row) == len(table["columns"]) for table in found["tables"] for row in table["rows"])
    rows = next(t["rows"] for t in section["tables"] if t["title"] == "What the judge wrote")
    assert rows[0] == ["question 0", "sft", "short 0", "Fine. [[5]]", 5.0]


def test_the_users_own_prompt_takes_the_place_of_ours(tmp_path: Path, stand_in: tuple[JudgeStandIn, str]) -> None:
    how, url = stand_in
    own = tmp_path / "own.j2"
    own.write_text("Q {{ question }}\n1 {{ answer_a }}\n2 {{ answer_b }}\n")
    how.says = lambda messages: "[[B]]"
    Wins().run(material(tmp_path, config_of(url, pair_prompt=str(own)), {"a": ["<b>"], "b": ["y"]}))
    assert [body["messages"] for body in how.asked][0] == [{"role": "user", "content": "Q question 0\n1 <b>\n2 y"}] or (
        how.asked[0]["messages"][0]["content"] == "Q question 0\n1 y\n2 <b>"
    )
    for text, told in (
        ("{{ question }} {{ answer_a }}", "does not show answer_b"),
        ("{% for %}", "is no Jinja2"),
    ):
        own.write_text(text)
        assert told in problems(config_of(url, pair_prompt=str(own)))[0]
    own.write_text("{{ question }} {{ answer_a }} {{ answer_b }} {{ answer_c }}")
    with pytest.raises(UserError, match="own.j2: 'answer_c' is undefined"):
        Wins().run(material(tmp_path, config_of(url, pair_prompt=str(own)), {"a": ["x"], "b": ["y"]}))


def test_all_that_is_wrong_is_said_before_anything_is_asked(tmp_path: Path) -> None:
    assert ENDPOINT.lacking(config_of(None), None) == "set evaluate.llm_judge.url, the address of the judge"
    wrong = config_of("nowhere", grade_prompt=str(tmp_path / "none.j2"), price_per_million=[1.0])
    said = ENDPOINT.lacking(wrong, None) or ""
    assert "must begin with http" in said and "none.j2 cannot be read" in said and "must be two prices" in said
    with pytest.raises(UserError, match="must be two prices"):
        LLMJudge(wrong, tmp_path)
    assert ENDPOINT.lacking(config_of("http://h", price_per_million=[1.0, 2.0]), None) is None


def test_another_model_or_setting_is_asked_anew(tmp_path: Path, stand_in: tuple[JudgeStandIn, str]) -> None:
    how, url = stand_in
    ask = [[{"role": "user", "content": "x"}]]
    how.says = lambda messages: "[[A]]"
    for changes, asked in (({}, 1), ({}, 1), ({"model": "judge-2"}, 2), ({"temperature": 0.5}, 3)):
        LLMJudge(config_of(url, **changes), tmp_path).decide(ask, read_choice, "test")
        assert len(how.asked) == asked


def test_the_cache_leaves_out_damaged_lines(tmp_path: Path) -> None:
    cache, answer = AnswerCache(tmp_path / "c"), Answer("text \ud83d", 1, None, 0.5)
    key = key_of("m", [{"role": "user", "content": "x"}], {"temperature": 0})
    assert cache.get(key) is None and len(cache) == 0
    cache.put(key, answer)
    with open(cache.path, "ab") as file:
        file.write(b'no json\n{"key": "k", "other": 1}\n[1]\n{"key": "torn')
    again = AnswerCache(tmp_path / "c")
    assert len(again) == 1 and again.get(key) == answer
    again.put("second", answer)
    assert len(AnswerCache(tmp_path / "c")) == 2
