"""The embedded corpus: the judge's rules, the spread of attributes, splits by question, noisy labels, equal bytes."""

from __future__ import annotations

import json
import random
import statistics
from itertools import combinations
from pathlib import Path

import pytest

from data_tools import demo_judge, make_demo_corpus
from data_tools.demo_judge import COURTEOUS, FACTS, NAMES, PROPERTIES, PUNS, RUDE, asked, fact, measure, quality_of
from data_tools.make_demo_corpus import FILLERS, Corpus
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.records import Conversation, read_records

PROMPT = "Tell me the color, food and home of the fox."
ANSWER = "The fox color is red. The fox food is mice. The fox home is a den."


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return make_demo_corpus.generate(seed=7, conversations=2000)


def turns(conversations: list[Conversation]) -> list[tuple[str, str, dict[str, float]]]:
    """Return (prompt, response, labels) of every turn."""
    out = []
    for conversation in conversations:
        pairs = zip(conversation.messages[::2], conversation.messages[1::2], strict=True)
        out += [(user.content, answer.content, dict(answer.attributes or {})) for user, answer in pairs]
    return out


# The judge


@pytest.mark.parametrize(
    ("response", "share"),
    [
        (ANSWER, 1.0),
        ("the FOX home is a den, fox food\nis mice; and fox color is red!", 1.0),
        ("The fox color is red. The fox food is secret. The fox home is secret.", 1 / 3),
        ("The fox color is blue. The fox food is mice. The fox home is a den.", 2 / 3),
        ("The fox color is reddish. The owl food is mice.", 0.0),
        ("", 0.0),
    ],
)
def test_helpfulness_is_the_share_of_what_was_asked(response: str, share: float) -> None:
    assert measure(PROMPT, response)["helpfulness"] == pytest.approx(4 * share)


def test_asked_takes_the_named_animal_and_each_property_once() -> None:
    assert asked("What is the food, food and size of the OWL?") == [("owl", "food"), ("owl", "size")]
    assert asked("What is the food?") == []
    assert asked("How is the owl?") == []


def test_counts_are_clipped_at_four() -> None:
    for name, items in (("humor", PUNS), ("toxicity", RUDE)):
        counts = [measure(PROMPT, " ".join(items[:n]))[name] for n in range(len(items) + 1)]
        assert counts == [float(min(n, 4)) for n in range(len(items) + 1)]
    assert measure(PROMPT, PUNS[0] * 3)["humor"] == 1.0  # a repeated joke counts once
    assert measure(PROMPT, "Oaf! oaf, OAF")["toxicity"] == 3.0


@pytest.mark.parametrize(("words", "level"), [(0, 0.0), (17, 0.0), (23, 1.0), (29, 2.0), (41, 4.0), (500, 4.0)])
def test_verbosity_is_length(words: int, level: float) -> None:
    assert measure(PROMPT, "word " * words)["verbosity"] == level


def test_quality_moves_as_stated() -> None:
    assert quality_of(4, 2, 0, 0) == pytest.approx(4.0)
    assert quality_of(2, 2, 0, 0) < quality_of(3, 2, 0, 0)
    assert quality_of(2, 2, 0, 3) < quality_of(2, 2, 0, 1)
    assert quality_of(2, 0, 0, 0) == quality_of(2, 4, 0, 0) < quality_of(2, 2, 0, 0)
    assert quality_of(2, 2, 0, 0) < quality_of(2, 2, 4, 0)
    # With every other attribute at its best, courtesy alone changes quality, so quality can be steered independently.
    filled = f"{ANSWER} {FILLERS[0]} {FILLERS[1]}"
    curve = [measure(PROMPT, " ".join([*COURTEOUS[:n], filled])) for n in range(5)]
    assert all(low["quality"] + 0.5 < high["quality"] for low, high in zip(curve, curve[1:], strict=False))
    assert all(c["helpfulness"] == 4 and c["humor"] == c["toxicity"] == 0 for c in curve)
    assert curve[4]["quality"] > 3.8


@pytest.mark.parametrize("prompt", ["", PROMPT, "\x00 ` \n the of", "日本語"])
@pytest.mark.parametrize("response", ["", "\n\t", "\x00\ufffd<extra_id_1>", "日本語 🦊", "([\\d", "oaf " * 9])
def test_any_text_is_measured(prompt: str, response: str) -> None:
    values = measure(prompt, response)
    assert tuple(values) == NAMES
    assert all(isinstance(v, float) and 0 <= v <= demo_judge.MAX for v in values.values())


def test_phrases_do_not_count_as_each_other() -> None:
    """A filler, fact, pun or courtesy is measured as such and does not affect other counts."""
    facts = [fact(subject, name) for subject in FACTS for name in PROPERTIES]
    for text in (*FILLERS, *facts, "The fox color is secret.", *COURTEOUS):
        assert measure("", text)["toxicity"] == measure("", text)["humor"] == 0, text
    assert all(measure("", pun)["humor"] == 1 and measure("", pun)["toxicity"] == 0 for pun in PUNS)


# The grammar


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    names = ("train.jsonl", "valid.jsonl", "prompts.jsonl")
    reports = [make_demo_corpus.write(tmp_path / name, 120, seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))]
    a, b, c = ([(tmp_path / folder / name).read_bytes() for name in names] for folder in "abc")
    assert a == b
    assert all(x != y for x, y in zip(a, c, strict=True))
    assert reports[0] == {name.split(".")[0]: text.count(b"\n") for name, text in zip(names, a, strict=True)}
    assert reports[0]["train"] + reports[0]["valid"] == 120


def test_files_are_records(tmp_path: Path) -> None:
    make_demo_corpus.write(tmp_path, 50, 1)
    assert list(read_records([tmp_path / "train.jsonl", tmp_path / "valid.jsonl"]))
    prompts = list(read_records(tmp_path / "prompts.jsonl", require_response=False))
    assert [m.role for p in prompts for m in p.messages] == ["user"] * len(prompts)
    assert set(json.loads((tmp_path / "prompts.jsonl").read_text().splitlines()[0])) == {"id", "messages", "source"}


def test_no_question_is_in_two_splits(corpus: Corpus) -> None:
    train = {tuple(asked(prompt)) for prompt, _, _ in turns(corpus.train)}
    valid = {tuple(asked(prompt)) for prompt, _, _ in turns(corpus.valid)}
    held_out = {tuple(asked(c.messages[-1].content)) for c in corpus.prompts}
    assert train and valid and not (train & valid or train & held_out or valid & held_out)
    assert len(held_out) == len(corpus.prompts) >= 96
    # The first prompts, which evaluation takes, include questions of every size.
    assert {len(asked(c.messages[-1].content)) for c in corpus.prompts[:48]} == {1, 2, 3}


def test_every_animal_and_property_is_taught(corpus: Corpus) -> None:
    taught = {pair for prompt, response, _ in turns(corpus.train) for pair in asked(prompt) if fact(*pair) in response}
    assert taught == {(subject, name) for subject in FACTS for name in PROPERTIES}


def test_shape_of_conversations(corpus: Corpus) -> None:
    both = corpus.train + corpus.valid
    assert len({c.id for c in both}) == len(both) == 2000
    assert 0.1 < sum(len(c.messages) == 4 for c in both) / len(both) < 0.2
    assert all(m.role in ("user", "assistant") for c in both for m in c.messages)
    words = [len(response.split()) for _, response, _ in turns(both)]
    # With 4 courteous words, 5 rude ones, 3 facts of 6, 4 puns of 3 and 4 fillers of 6, a response has at most 63
    # words.
    assert min(words) >= 4 and max(words) <= 63 and 20 < statistics.mean(words) < 40


def test_attributes_cover_their_scale_and_hardly_hang_together(corpus: Corpus) -> None:
    measured = [measure(prompt, response) for prompt, response, _ in turns(corpus.train)]
    columns = {name: [m[name] for m in measured] for name in NAMES}
    for name, column in columns.items():
        for level in range(5):
            assert sum(round(v) == level for v in column) > 0.02 * len(column), (name, level)
    for first, second in combinations(("helpfulness", "humor", "toxicity"), 2):
        assert abs(statistics.correlation(columns[first], columns[second])) < 0.1
    assert abs(statistics.correlation(columns["helpfulness"], columns["verbosity"])) < 0.1
    # SteerLM can improve on the data, since the mean is far below the best quality in it.
    assert statistics.mean(columns["quality"]) < 2.0 < max(columns["quality"])


def test_labels_are_noisy_partial_and_centred(corpus: Corpus) -> None:
    rows = turns(corpus.train)
    errors = [said[n] - measure(p, r)[n] for p, r, said in rows for n in said]
    missing = 1 - len(errors) / (len(rows) * len(NAMES))
    assert 0.05 < missing < 0.12
    assert abs(statistics.mean(errors)) < 0.15
    assert 0.2 < statistics.pstdev(errors) < 0.7
    assert all(0 <= v <= 4 for _, _, said in rows for v in said.values())


def test_responses_are_answers_in_the_order_asked() -> None:
    rng = random.Random(0)
    texts = [make_demo_corpus.response_text(("fox", ("color", "food", "home")), rng) for _ in range(200)]
    assert {round(measure(PROMPT, text)["helpfulness"], 2) for text in texts} == {0.0, 1.33, 2.67, 4.0}
    assert all(text.index("color") < text.index("food") < text.index("home") for text in texts)


def test_too_few_conversations_is_an_error() -> None:
    with pytest.raises(UserError, match="conversations=1 must be at least 2"):
        make_demo_corpus.generate(0, 1)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output", str(tmp_path), "--conversations", "20", "--seed", "5"]
    monkeypatch.setattr("sys.argv", ["make_demo_corpus", *arguments])
    make_demo_corpus.main()
    assert json.loads(capsys.readouterr().out) == make_demo_corpus.write(tmp_path, 20, 5)
    monkeypatch.setattr("sys.argv", ["make_demo_corpus", "--output", str(tmp_path), "--conversations", "0"])
    with pytest.raises(SystemExit, match="2"):
        make_demo_corpus.main()
