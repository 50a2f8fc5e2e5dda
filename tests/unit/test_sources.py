"""data_tools.sources: each published format gives conversations, and rows that deviate from it are handled."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from data_tools import rows
from data_tools.convert import Options, convert, main
from data_tools.oasst import OASST
from data_tools.preferences import write_pairs
from data_tools.sources import nemo
from data_tools.sources.base import HELPSTEER_NAMES, Context
from data_tools.sources.chat import look_up, parse_map
from data_tools.sources.hh_rlhf import parse_transcript
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import write_json_atomic
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.preferences import read_pairs
from steerlm_megatron.steer.records import Conversation, Message, read_records, write_records
from tests.helpers.conversion import DOLLY, HELPSTEER, TOPICAL, chat, check_sums, rated, roles, run, texts

# HelpSteer


def test_helpsteer_ratings(tmp_path: Path) -> None:
    rows = [
        rated("Hi?", "Hello.", 3, 4, 4, 0, 1),
        rated("Hi?", "No.", 0, 1, None, 2, 0),
        rated("Yo?", " ", 1, 1, 1, 1, 1),
    ]
    found, report = run(tmp_path, "helpsteer", rows, HELPSTEER)
    assert [texts(c) for c in found] == [["Hi?", "Hello."], ["Hi?", "No."]]
    values = {"helpfulness": 3.0, "correctness": 4.0, "coherence": 4.0, "complexity": 0.0, "verbosity": 1.0}
    assert found[0].messages[1].attributes == values
    assert found[1].messages[1].attributes == {"helpfulness": 0, "correctness": 1, "complexity": 2, "verbosity": 0}
    assert found[0].id == "rows.jsonl:1" and found[0].source == "helpsteer"
    assert report["skipped"]["conversations"] == {"empty_response": 1} and report["labelled_replies"] == 2


def test_helpsteer_splits_and_huge_labels(tmp_path: Path) -> None:
    for row, match in (
        (rated("a", "b", 1, 1, 1, 1, 1, split=["train"]), r"split=\['train'\]; legal: train val"),
        (rated("a", "b", 10**400, 1, 1, 1, 1), "label helpfulness=1000.* must be a number"),
    ):
        with pytest.raises(UserError, match=rf"rows\.jsonl:1: {match}"):
            run(tmp_path, "helpsteer", [row], None if "split" in row else HELPSTEER)


def test_half_a_surrogate_pair_outside_of_texts_is_kept(tmp_path: Path) -> None:
    rows = [chat("a", "b", id="\ud800", lang="\ud801", tags=["\udc00"]), chat("c", "d", id="日本"), {"\ud800": 1}]
    found, report = run(tmp_path, "messages", rows, on_error="skip", valid_fraction=0.5, seed=3)
    assert {c.id for c in found} == {"\ud800", "日本"} and report["languages"] == {"\ud801": 1, "unknown": 1}
    assert {json.dumps(c.extra) for c in found} == {'{"lang": "\\ud801", "tags": ["\\udc00"]}', "{}"}
    (line,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert "no list 'messages' (its keys: \\ud800)" in json.loads(line)["reason"]
    write_json_atomic(tmp_path / "report.json", report)
    assert json.loads((tmp_path / "report.json").read_text())["languages"] == report["languages"]


def test_helpsteer_scale_schema_and_disagreements(tmp_path: Path) -> None:
    schema = AttributeSchema("paper", ("quality", "helpfulness"), 9)
    found, report = run(tmp_path, "helpsteer", [rated("a", "b", [4, 2, 3], 1, 1, 1, 1)], schema)
    assert found[0].messages[1].attributes == {"helpfulness": 3 * 9 / 4}
    assert report["notes"] == {f"label_not_in_schema:{name}": 1 for name in HELPSTEER_NAMES[1:]}
    assert found[0].messages[1].extra == {"annotations": [{"helpfulness": value * 9 / 4} for value in (4, 2, 3)]}
    found, _ = run(tmp_path, "helpsteer", [rated("a", "b", [4, 2, 3], [1, 2], 1, 1, 1)])
    assert found[0].messages[1].extra["annotations"] == [
        {"helpfulness": 4.0, "correctness": 1.0}, {"helpfulness": 2.0, "correctness": 2.0}, {"helpfulness": 3.0}
    ]  # fmt: skip
    found, _ = run(tmp_path, "helpsteer", [rated("a", "b", 4, 1, 1, 1, 1)])
    assert found[0].messages[1].attributes == dict(zip(HELPSTEER_NAMES, (4, 1, 1, 1, 1), strict=True))


def test_pairs_of_published_preferences(tmp_path: Path) -> None:
    ask = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Tell me.\n\nAssistant:"
    hh = [
        {"chosen": f"{ask} No.", "rejected": f"{ask} What?"},
        {"chosen": f"{ask} No.", "rejected": f"{ask} No."},
        {"chosen": f"{ask} No.", "rejected": "\n\nHuman: Else?\n\nAssistant: What?"},
        {"chosen": f"{ask} No.", "rejected": f"{ask} "},
    ]
    preferred = [
        {"prompt": "a", "response_1": "x", "response_2": "y", "preference_strength": strength}
        for strength in (-2, 3, 0)
    ]
    for source, lines in (("hh_rlhf", hh), ("helpsteer", preferred)):
        (tmp_path / f"{source}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    report = write_pairs("hh_rlhf", [str(tmp_path / "hh_rlhf.jsonl")], str(tmp_path / "new/hh.jsonl"))
    assert (report["in"], report["out"]) == (4, 1)
    assert report["skipped"] == {"equal_responses": 1, "prompts_differ": 1, "empty_response": 1}
    ((_, pair),) = read_pairs(report["file"])
    assert [m.content for m in pair.messages] == ["Hi", "Yes?", "Tell me."]
    assert (pair.chosen, pair.rejected) == ("No.", "What?")
    report = write_pairs("helpsteer", [str(tmp_path / "helpsteer.jsonl")], str(tmp_path / "helpsteer_pairs.jsonl"))
    assert [(pair.chosen, pair.rejected) for _, pair in read_pairs(report["file"])] == [("x", "y"), ("y", "x")]
    assert report["skipped"] == {"no_preference": 1}
    (tmp_path / "bad.jsonl").write_text('{"chosen": 1, "rejected": "x"}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:1: chosen=1"):
        write_pairs("hh_rlhf", [str(tmp_path / "bad.jsonl")], str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="no pair is left; skipped: rejected 1"):
        write_pairs("hh_rlhf", [str(tmp_path / "bad.jsonl")], str(tmp_path / "none.jsonl"), "skip")


def test_helpsteer_marked_prompts_are_turns_not_text(tmp_path: Path) -> None:
    prompt = "First?\n<extra_id_1>Assistant\n<extra_id_2>quality:4\nOne.\nTwo."
    prompt += "\n<extra_id_1>User\nWhat is <extra_id_1>User\nin it?"
    rows = [
        rated(prompt, "End.", 4, 4, 4, 4, 4),
        rated("<extra_id_0>System\nBe.\n<extra_id_1>User\nHi", "Ho", 1, 1, 1, 1, 1),
    ]
    found, report = run(tmp_path, "helpsteer", rows, HELPSTEER)
    assert roles(found[0]) == "u a0 u a"
    assert texts(found[0]) == ["First?", "One.\nTwo.", "What is <extra_id_1>User\nin it?", "End."]
    assert found[0].messages[1].attributes is None and found[0].messages[3].attributes is not None
    assert [m.role for m in found[1].messages] == ["system", "user", "assistant"] and texts(found[1]) == [
        "Be.",
        "Hi",
        "Ho",
    ]
    assert report["notes"] == {"label_lines_removed": 1, "marked_prompts_parsed": 2}
    assert report["control_like_text"] == 1 and report["context_replies"] == 1
    with pytest.raises(UserError, match=r"rows\.jsonl:1: a <extra_id_0>System marker stands inside"):
        run(tmp_path, "helpsteer", [rated("a\n<extra_id_0>System\nb", "c", 1, 1, 1, 1, 1)], HELPSTEER)


def test_helpsteer_preferences(tmp_path: Path) -> None:
    context = [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
    ]
    rows: list[Any] = [
        {"domain": "code", "language": "python", "context": context, "response1": "r1", "response2": "r2",
         "overall_preference": -2, "individual_preference": [{"score": -2}]},
        {"context": context, "response1": "r3", "response2": "", "overall_preference": -100},
        {"prompt": "p", "response_1": "s1", "response_2": "s2", "preference_strength": 1, "split": "val"},
    ]  # fmt: skip
    found, report = run(tmp_path, "helpsteer", rows, HELPSTEER)
    assert [roles(c) for c in found] == ["u a0 u a"] * 3 + ["u a"] * 2
    assert [c.messages[-1].content for c in found] == ["r1", "r2", "r3", "s1", "s2"]
    assert (
        found[0].id == "rows.jsonl:1:response1" and found[0].extra["pair"] == found[1].extra["pair"] == "rows.jsonl:1"
    )
    assert found[0].extra["preference"] == {"strength": -2, "response": 1, "preferred": True}
    assert found[1].extra["preference"] == {"strength": -2, "response": 2, "preferred": False}
    assert found[2].extra["preference"] == {"strength": None, "response": 1, "preferred": None}
    assert found[0].extra["individual_preference"] == [{"score": -2}] and found[0].extra["language"] == "python"
    assert report["valid"]["conversations"] == 2 and found[4].extra["preference"]["preferred"] is True
    assert report["skipped"]["conversations"] == {"empty_response": 1} and report["notes"]["invalid_preferences"] == 1


# HH-RLHF

A, B = (
    "\n\nHuman: a1\n\nAssistant: b1\n\nHuman: a2\n\nAssistant: good",
    "\n\nHuman: a1\n\nAssistant: b1\n\nHuman: a2\n\nAssistant: bad",
)


def test_hh_pairs_train_the_shared_replies_once(tmp_path: Path) -> None:
    found, report = run(tmp_path, "hh_rlhf", [{"chosen": A, "rejected": B}, {"chosen": A, "rejected": A}])
    assert [roles(c) for c in found] == ["u a u a", "u a0 u a"]
    assert [c.id for c in found] == ["rows.jsonl:1:chosen", "rows.jsonl:1:rejected"]
    assert found[1].extra == {"pair": "rows.jsonl:1", "preference": "rejected"}
    assert report["repeated_replies_avoided"] == 5 and report["skipped"]["conversations"] == {"repeated": 2}
    found, report = run(tmp_path, "hh_rlhf", [{"chosen": A, "rejected": B}, {"chosen": A, "rejected": A}], paths="leaf")
    assert [roles(c) for c in found] == ["u a u a"] * 4 and report["repeated_replies_avoided"] == 0


@pytest.mark.parametrize(
    ("text", "wanted", "notes"),
    [
        (A, ["a1", "b1", "a2", "good"], {}),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant: d", ["a\n\nb", "c\n\nd"], {"turns_merged": 2}),
        ("\n\nHuman: a\n\nAssistant: \n\nHuman: b\n\nAssistant: c", ["a\n\nb", "c"],
         {"empty_turns_dropped": 1, "turns_merged": 1}),
        ("\n\nHuman: say Human: x\nAssistant: y\n\nAssistant: no", ["say Human: x\nAssistant: y", "no"], {}),
        ("\n\nHuman: a\n\nHumans: b\n\nAssistant: c", ["a\n\nHumans: b", "c"], {}),
        ("\n\nAssistant: a\n\nHuman: b\n\nAssistant: c", "begins_with_assistant", {}),
        ("\n\nHuman: \n\nAssistant: c", "begins_with_assistant", {"empty_turns_dropped": 1}),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "ends_with_human", {}),
        ("\n\nHuman: a\n\nAssistant:  ", "empty_response", {}),
        ("so\n\nHuman: a\n\nAssistant: b", "leading_text", {}),
        ("no turns", "no_turns", {}),
    ],
)  # fmt: skip
def test_hh_transcript_rule(text: str, wanted: Any, notes: dict[str, int]) -> None:
    context = Context("hh_rlhf")
    found = parse_transcript(text, context)
    assert (found if isinstance(found, str) else [m["content"] for m in found]) == wanted
    assert dict(context.notes) == notes


def test_hh_lists_and_bad_rows(tmp_path: Path) -> None:
    found, _ = run(tmp_path, "hh_rlhf", [{"prompt": "q", "chosen": chat("q", "a")["messages"], "rejected": A}])
    assert texts(found[0]) == ["q", "a"]
    with pytest.raises(UserError, match=r"rows\.jsonl:1: rejected=None must be a transcript"):
        run(tmp_path, "hh_rlhf", [{"chosen": A}])


# ShareGPT, M-SID


def share(*values: str, **keys: Any) -> dict[str, Any]:
    return {
        "conversations": [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)],
        **keys,
    }


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("source", ["msid", "sharegpt"])
def test_json_arrays(tmp_path: Path, source: str, indent: int | None) -> None:
    rows = [share("Who are [you]?", 'I am "V}".', id="identity_0"), share("Hi", "Ho", id="identity_1", model="x")]
    path = tmp_path / "dummy.json"
    path.write_text(json.dumps(rows, indent=indent))
    report = convert(source, [str(path)], str(tmp_path / "out"), None, Options(valid_fraction=0.0))
    check_sums(report)
    found = list(read_records(report["train"]["file"]))
    assert [c.id for c in found] == ["identity_0", "identity_1"] and found[0].source == source
    assert texts(found[0]) == ["Who are [you]?", 'I am "V}".'] and found[1].extra == {"model": "x"}


@pytest.mark.parametrize("piece_bytes", [3, 4, 7, 1 << 20])
def test_a_long_line_of_an_array_comes_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(rows, "PIECE_BYTES", piece_bytes)
    elements = [{"a": 'quoted "]}" \\', "b": ["é日", {"c": '\\"'}]}, {}, {"日": "\n", "deep": [[{}]]}, {"n": 1.5}]
    path = tmp_path / "a.json"
    for ascii_, indent in ((True, None), (False, None), (False, 1)):
        text = json.dumps(elements, ensure_ascii=ascii_, indent=indent)
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert [row for _, row in rows.read_files([str(path)], "error", None)] == elements
    path.write_bytes('[{"a": "é'.encode() + b'\xff"}]')
    with pytest.raises(UserError, match=r"a\.json:1: invalid UTF-8 at byte 10"):
        list(rows.read_files([str(path)], "error", None))


def test_json_array_errors_name_lines(tmp_path: Path) -> None:
    good = json.dumps(share("a", "b"))
    path = tmp_path / "a.json"

    def attempt(text: str, on_error: str = "error") -> dict[str, Any]:
        path.write_text(text)
        report = convert(
            "sharegpt", [str(path)], str(tmp_path / "o"), None, Options(valid_fraction=0, on_error=on_error)
        )
        check_sums(report)
        return report

    with pytest.raises(UserError, match=r"a\.json:3: malformed JSON: NaN"):
        attempt(f'[\n{good},\n{{"x": NaN}},\n{good}]')
    with pytest.raises(UserError, match=r"a\.json:1: element 3: the conversation begins with an assistant"):
        attempt(f"[{good}, {good}, {json.dumps(share('a')).replace('human', 'gpt')}]")
    report = attempt(f'[{good},{{"x": NaN}},{good}]', "skip")
    assert report["rejected"][0]["line"] == f"{path}:1" and report["rejected"][0]["reason"].startswith("element 2: mal")
    assert report["out"] == 2 and report["ids_made_unique"] == 0
    report = attempt(f'[\n{good},\n{{"x": NaN}},\n{good}]', "skip")
    assert report["out"] == 2 and report["rejected"][0]["line"] == f"{path}:3"
    with pytest.raises(UserError, match=r"a\.json:2: '7,' stands in the JSON array"):
        attempt(f"[{good},\n7,\n{good}]")
    with pytest.raises(UserError, match=r"a\.json:2: torn end"):
        attempt(f"[{good},\n{good[:9]}")
    assert attempt(f"[{good},\n{good[:9]}", "skip")["skipped"]["conversations"] == {"rejected": 1}
    with pytest.raises(UserError, match=r"a\.json:2: 'x' stands after the end"):
        attempt(f"[{good}]\nx")


def test_sharegpt_speakers(tmp_path: Path) -> None:
    row = share("a", "b")
    row["conversations"][1] |= {"from": "ChatGPT", "weight": 3}
    found, _ = run(tmp_path, "sharegpt", [row])
    assert found[0].messages[1].extra == {"original_weight": 3}
    row["conversations"][1]["from"] = "tool"
    with pytest.raises(UserError, match=r"conversations\[1\]\.from='tool'; legal: human"):
        run(tmp_path, "sharegpt", [row])
    with pytest.raises(UserError, match="begins with an assistant"):
        run(tmp_path, "sharegpt", [{"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]}])
    with pytest.raises(UserError, match="must be a list of at least one message"):
        run(tmp_path, "sharegpt", [{"conversations": []}])


# Messages and mappings


def test_openai_messages(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = {"messages": [{"role": "developer", "content": "S"}, {"role": "user", "content": parts, "name": None},
                        {"role": "assistant", "content": "c", "weight": 0}, {"role": "assistant", "content": "d"}],
           "id": "x", "source": "mine", "topic": 1}  # fmt: skip
    found, report = run(tmp_path, "messages", [row])
    assert found == [
        Conversation("x", (Message("system", "S"), Message("user", "ab"), Message("assistant", "c", weight=0),
                           Message("assistant", "d")), "mine", {"topic": 1})
    ]  # fmt: skip
    assert report["context_replies"] == 1
    for wrong, message in (
        ({"role": "tool", "content": "x"}, "calls or is a tool"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "has a part that is no text"),
    ):
        with pytest.raises(UserError, match=rf"rows\.jsonl:1: messages\[0\].*{message}"):
            run(tmp_path, "messages", [{"messages": [wrong]}])
    with pytest.raises(UserError, match="no list 'messages' .its keys: a b.; set data.source or data.map"):
        run(tmp_path, "messages", [{"a": 1, "b": 2}])


def test_map_prompt_and_response(tmp_path: Path) -> None:
    sum_up = {
        "instruction": "Sum up.",
        "context": "Long.",
        "response": "Short.",
        "category": "s",
        "source": "w",
        "n": None,
    }
    rows = [sum_up, {"instruction": "Hi.", "context": "", "response": "Ho."}]
    found, _ = run(tmp_path, "messages", rows, map=DOLLY)
    assert [texts(c) for c in found] == [["Sum up.\n\nLong.", "Short."], ["Hi.", "Ho."]]
    assert found[0].extra == {"category": "s", "original_source": "w"} and found[0].source == "messages"
    row = {"q": {"text": "Hi"}, "a": ["no", "yes"], "v": {"quality": 3}, "l": "de", "key": 7, "s": "Be."}
    mapping = "prompt=q.text,response=a.1,attributes=v,lang=l,id=key,system=s"
    found, report = run(tmp_path, "messages", [row], AttributeSchema("s", ("quality",), 4), map=mapping)
    assert texts(found[0]) == ["Be.", "Hi", "yes"] and found[0].messages[2].attributes == {"quality": 3}
    assert found[0].id == "7" and found[0].extra == {"lang": "de"} and report["languages"] == {"de": 1}
    with pytest.raises(
        UserError, match=r"rows\.jsonl:1: data\.map has response=reply, which is None here; its keys: a"
    ):
        run(tmp_path, "messages", [{"a": "x"}], map="prompt=a,response=reply")
    with pytest.raises(UserError, match="no conversation is left for training: 1 in, skipped: empty_response 1"):
        run(tmp_path, "messages", [{"a": "x", "b": " "}], map="prompt=a,response=b")


def test_map_turns(tmp_path: Path) -> None:
    turns = [{"message": "a", "agent": "x", "mood": 1}, {"message": "b", "agent": "y"}, {"message": "c", "agent": "x"}]
    row = {"conversation_id": "t1", "content": turns, "config": "A"}
    found, _ = run(tmp_path, "messages", [row], map=TOPICAL)
    assert roles(found[0]) == "u a u" and found[0].id == "t1" and found[0].extra == {"config": "A"}
    assert found[0].messages[0].extra == {"mood": 1}
    found, _ = run(tmp_path, "messages", [row], map=TOPICAL + ",user=z|x")
    assert roles(found[0]) == "u a u"
    with pytest.raises(UserError, match="begins with an assistant"):
        run(tmp_path, "messages", [row], map=TOPICAL + ",user=y")
    found, _ = run(tmp_path, "messages", [{"turns": ["a", "b", "c", "d"]}], map="turns=turns")
    assert roles(found[0]) == "u a u a"
    turns[2]["agent"] = "z"
    with pytest.raises(UserError, match="more than two speakers"):
        run(tmp_path, "messages", [row], map=TOPICAL)


@pytest.mark.parametrize(
    ("text", "message"),
    [("prompt", "not of the form"), ("promt=a", "did you mean 'prompt'"), ("prompt=a", "lacks response"),
     ("prompt=a,prompt=b", "twice"), ("turns=a,prompt=b", "mixes"), ("prompt=a,response=b,text=c", "mixes"),
     ("turns=a,user=b", "needs speaker")],
)  # fmt: skip
def test_bad_maps(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_map(text)


def test_key_paths() -> None:
    data = {"a": [{"b": 1}, 2]}
    assert [look_up(data, path) for path in ("a.0.b", "a.1", "a.2", "a.x", "c", "a.1.b")] == [
        1,
        2,
        None,
        None,
        None,
        None,
    ]


# NeMo-Aligner


def nemo_row(*turns: tuple[str, str, str | None], **keys: Any) -> dict[str, Any]:
    conversations = [{"from": speaker, "value": value, "label": label} for speaker, value, label in turns]
    return {"system": "Be.", "mask": "User", "type": "VALUE_TO_TEXT", "conversations": conversations, **keys}


def test_nemo_in(tmp_path: Path) -> None:
    rows = [
        nemo_row(("User", "a", "quality:1"), ("Assistant", "b", "quality:4,humor:-100,spam:0,lang:en"), tree_id="t"),
        nemo_row(
            ("Me", "x\n<extra_id_1>Assistant\ny\n<extra_id_1>User\nz", None), ("You", "w", None), mask="Me", system=""
        ),
    ]
    found, report = run(tmp_path, "nemo", rows, HELPSTEER)
    assert roles(found[0]) == "s u a" and found[0].messages[2].attributes == {"quality": 4.0}
    assert found[0].extra["tree_id"] == "t" and found[0].extra["lang"] == "en"
    assert roles(found[1]) == "u a0 u a" and texts(found[1]) == ["x", "y", "z", "w"]
    assert report["notes"] == {"label_not_in_schema:spam": 1, "marked_prompts_parsed": 1, "user_labels_dropped": 1}
    with pytest.raises(UserError, match=r"conversations\[1\]: label quality=5.0 must be a number in 0..4"):
        run(tmp_path, "nemo", [nemo_row(("User", "a", None), ("Assistant", "b", "quality:5"))], HELPSTEER)
    with pytest.raises(UserError, match="'quality' is not of the form name:number"):
        run(tmp_path, "nemo", [nemo_row(("User", "a", None), ("Assistant", "b", "quality"))], HELPSTEER)
    paper = AttributeSchema("p", ("quality",), 9)
    found, _ = run(
        tmp_path, "nemo", [nemo_row(("User", "a", None), ("Assistant", "b", "quality:2"))], paper, label_max=4
    )
    assert found[0].messages[2].attributes == {"quality": 4.5}


def test_nemo_regression_form(tmp_path: Path) -> None:
    text = "<extra_id_0>System\nBe.\n<extra_id_1>User\na\nb\n<extra_id_1>Assistant\nc\n"
    text += "<extra_id_1>User\nd\n<extra_id_1>Assistant\ne\n\n<extra_id_2>"
    label = [4.0, -100.0, -100, -100, 3.0, 2.0, 1.0, 0.0, 1.0]
    found, _ = run(tmp_path, "nemo", [{"text": text, "label": label}], HELPSTEER)
    assert roles(found[0]) == "s u a0 u a" and texts(found[0]) == ["Be.", "a\nb", "c", "d", "e\n"]
    assert found[0].messages[4].attributes == {
        "quality": 4, "helpfulness": 3, "correctness": 2, "coherence": 1, "complexity": 0, "verbosity": 1
    }  # fmt: skip
    with pytest.raises(UserError, match="must be 9 numbers"):
        run(tmp_path, "nemo", [{"text": text, "label": [1]}], HELPSTEER)


def test_nemo_round_trip(tmp_path: Path) -> None:
    first = (Message("system", "Be."), Message("user", "q"), Message("assistant", "r", {"quality": 3.4}, 0))
    long = (*first, Message("user", "<extra_id_1> s"), Message("assistant", "t", {"humor": 2.0}))
    records = [
        Conversation("a", long, "nemo", {"lang": "en", "mask": "User", "type": "VALUE_TO_TEXT"}),
        Conversation("b", long[3:], "nemo", {"mask": "User", "type": "VALUE_TO_TEXT"}),
    ]
    write_records(tmp_path / "train.jsonl.zst", records)
    assert main(["nemo", "--export", str(tmp_path / "train.jsonl.zst"), "--output", str(tmp_path / "nemo")]) == 0
    out = tmp_path / "nemo" / "train.jsonl"
    row = json.loads(out.read_text().splitlines()[0])
    assert row["conversations"][1] == {"from": "Assistant", "value": "r", "label": "quality:3", "weight": 0}
    assert row["conversations"][0]["label"] is None and row["system"] == "Be." and row["mask"] == "User"
    report = convert("nemo", [str(out)], str(tmp_path / "back"), HELPSTEER, Options(valid_fraction=0.0))
    found = list(read_records(report["train"]["file"]))
    assert [texts(c) for c in found] == [texts(c) for c in records] and [roles(c) for c in found] == [
        roles(c) for c in records
    ]
    assert [c.extra for c in found] == [c.extra for c in records] and [c.id for c in found] == ["a", "b"]
    assert found[0].messages[2].attributes == {"quality": 3.0}
    summary = nemo.export([str(tmp_path / "train.jsonl.zst")], str(tmp_path / "nemo"), HELPSTEER)
    assert summary["in"] == summary["out"] == 2 and summary["context_only_replies"] == 1
    with pytest.raises(UserError, match="which another input needs"):
        nemo.export([str(out)], str(tmp_path / "nemo"), HELPSTEER)


# Hugging Face datasets, with a stand-in for the package's results


def fake_datasets(monkeypatch: pytest.MonkeyPatch, result: Any) -> list[Any]:
    calls: list[Any] = []
    module = types.ModuleType("datasets")

    def load(*args: Any, **keys: Any) -> Any:
        calls.append((args, keys))
        if isinstance(result, Exception):
            raise result
        return result

    module.load_dataset = load  # type: ignore[attr-defined]
    module.load_from_disk = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [rated("a", "b", 1, 2, 3, 4, 0), rated("c", "d", 1, 2, 3, 4, float("nan"))]
    calls = fake_datasets(monkeypatch, {"train": rows[:1], "test": rows, "validation": rows[:1]})
    report = convert("hf", ["nvidia/HelpSteer2"], str(tmp_path), HELPSTEER, Options(rows="helpsteer", subset="x"))
    check_sums(report)
    assert calls == [(("nvidia/HelpSteer2", "x"), {"split": None})]
    assert report["train"]["conversations"] == report["valid"]["conversations"] == 1
    assert report["notes"] == {"split_not_read:nvidia/HelpSteer2:test": 2}
    assert next(iter(read_records(report["train"]["file"]))).id == "HelpSteer2:train:1"
    fake_datasets(monkeypatch, rows)
    with pytest.raises(UserError, match=r"x/y:test:2: label verbosity=nan must be a number in 0..4"):
        convert("hf", ["x/y"], str(tmp_path), HELPSTEER, Options(rows="helpsteer", split="test"))
    report = convert("hf", ["x/y"], str(tmp_path), HELPSTEER, Options(rows="helpsteer", split="test", on_error="skip"))
    check_sums(report)
    assert report["rejected"] == [{"line": "x/y:test:2", "reason": "label verbosity=nan must be a number in 0..4"}]
    fake_datasets(monkeypatch, {"a": rows})
    with pytest.raises(UserError, match="has no split 'train'; name one with data.hf_split: a"):
        convert("hf", ["x/y"], str(tmp_path), None)


def test_hf_has_openassistants_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(name: str, parent: str | None, **keys: Any) -> dict[str, Any]:
        role = "assistant" if parent else "prompter"
        return {"message_id": name, "parent_id": parent, "role": role, "text": name, "lang": "en", **keys}

    labels = {"name": ["spam", "quality"], "value": [0.0, 0.75], "count": [3, 3]}
    split = [message("a", "u", labels=labels), message("u", None)]
    fake_datasets(monkeypatch, {"train": split, "validation": [message("v", None), message("b", "v")]})
    report = convert("hf", ["OpenAssistant/oasst1"], str(tmp_path), OASST, Options(rows="oasst", valid_fraction=0.5))
    assert report["in"] == report["out"] == 2 and report["notes"] == {"label_not_in_schema:spam": 1}
    assert report["train"]["conversations"] == report["valid"]["conversations"] == 1
    found = {c.id: c for name in ("train", "valid") for c in read_records(report[name]["file"])}
    assert found["a"].messages[1].attributes == {"quality": 6.75} and found["b"].source == "oasst"
    fake_datasets(monkeypatch, {"train": [*split, {**split[0], "message_id": 3}]})
    with pytest.raises(UserError, match=r"x/y:train:3: message_id=3 must be a string"):
        convert("hf", ["x/y"], str(tmp_path), OASST, Options(rows="oasst"))
    report = convert("hf", ["x/y"], str(tmp_path), OASST, Options(rows="oasst", on_error="skip", valid_fraction=0.0))
    assert report["out"] == 1 and report["rejected_lines"] == 1


def test_hf_folder_offline_and_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text("{}")
    calls = fake_datasets(monkeypatch, {"train": [chat("a", "b")], "dev": [chat("c", "d")]})
    report = convert(
        "hf", [str(tmp_path / "saved")], str(tmp_path / "o"), None, Options(split="dev", valid_fraction=0.0)
    )
    assert calls == [((str(tmp_path / "saved"),), {})] and report["out"] == 1
    fake_datasets(monkeypatch, ConnectionError("no route to huggingface.co"))
    with pytest.raises(UserError, match=r"x/y: .*ConnectionError: no route.*without network give a local folder"):
        convert("hf", ["x/y"], str(tmp_path / "o"), None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the package datasets; pip install datasets"):
        convert("hf", ["x/y"], str(tmp_path / "o"), None)
