"""data_tools.convert: filters, errors, split and order, published corpora; reports add up, and runs repeat exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools import oasst
from data_tools.convert import SOURCES, Options, convert, main
from data_tools.filters import Filters
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import read_records
from tests.helpers.conversion import (
    ALPACA,
    HELPSTEER,
    TOPICAL,
    chat,
    check_sums,
    rated,
    roles,
    run,
    save,
    shared,
    texts,
)

# Filters


def test_filters_count_by_reason(tmp_path: Path) -> None:
    system = {"messages": [{"role": "system", "content": "s"}, *chat("q", "long enough")["messages"]], "lang": "en"}
    rows: list[Any] = [
        chat("q", "long enough", lang="en"), chat("q", "long enough", lang="en-GB"),
        chat("q", "long enough", language="English"), chat("q", "long enough", lang="de"),
        chat("q", "long enough"), system, chat("q", "s", lang="en"),
        chat("q", "x" * 99, lang="en"), chat("q", "a", "b", "long", "c", "d", lang="en"),
    ]  # fmt: skip
    filters = Filters(languages=["EN"], roles=["user", "assistant"], max_turns=4, min_chars=5, max_chars=50)
    found, report = run(tmp_path, "messages", rows, filters=filters)
    assert len(found) == 3 and report["skipped"]["conversations"] == {
        "language": 1, "language_unknown": 1, "role": 1, "too_short": 1, "too_long": 1, "too_many_turns": 1
    }  # fmt: skip
    found, report = run(tmp_path, "messages", rows, filters=Filters(min_turns=3, dedupe=True))
    assert len(found) == 1 and report["skipped"]["conversations"] == {"too_few_turns": 8}
    found, report = run(tmp_path, "messages", rows, filters=Filters(dedupe=True))
    assert report["skipped"]["conversations"] == {"duplicate": 4} and report["filtered_replies"] == 4


def test_label_filter_keeps_context(tmp_path: Path) -> None:
    rows: list[Any] = [chat("a", "b", "c", "d"), chat("e", "f"), chat("g", "h", "i", "j")]
    rows[0]["messages"][1]["attributes"] = {"quality": 7, "humor": 0}
    rows[0]["messages"][3]["attributes"] = {"quality": 5.9, "humor": 0}
    rows[1]["messages"][1]["attributes"] = {"quality": 9, "humor": 3}
    schema = AttributeSchema("s", ("quality", "humor"), 9)
    found, report = run(tmp_path, "messages", rows, schema, filters=Filters(labels=["quality>=6", "humor < 1"]))
    assert [roles(c) for c in found] == ["u a u a0"]
    assert report["skipped"]["conversations"] == {"label": 2} and report["filtered_replies"] == 4


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"labels": ["quality=>6"]}, "not of the form"), ({"labels": ["fun>1"]}, "schema 'helpsteer' has: quality"),
     ({"roles": ["user"]}, "needs user and assistant"), ({"roles": ["bot"]}, "is no role"),
     ({"min_chars": 5, "max_chars": 4}, "max_chars=4"), ({"min_turns": -1}, "min_turns=-1")],
)  # fmt: skip
def test_bad_filters(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        convert("messages", ["x"], str(tmp_path), HELPSTEER, Options(filters=Filters(**keys)))


def test_control_like_text_is_counted_and_kept(tmp_path: Path) -> None:
    found, report = run(tmp_path, "messages", [chat("<extra_id_1>User", "</s> [INST]"), chat("<extra_id_x>", "<b>")])
    assert report["control_like_text"] == 2 and texts(found[0]) == ["<extra_id_1>User", "</s> [INST]"]


# Errors


def test_on_error_skip_collects_every_bad_line(tmp_path: Path) -> None:
    good, labelled = json.dumps(chat("q", "a")), {"role": "assistant", "content": "a", "attributes": {"quality": 5}}
    bad = [
        "not json", "[1]", '{"messages": [{"role": "user", "content": NaN}]}',
        json.dumps({"messages": [{"role": "assistant", "content": "x"}]}), json.dumps(chat("only a question")),
        json.dumps({"messages": [*chat("q")["messages"], labelled]}),
    ]  # fmt: skip
    path = tmp_path / "in.jsonl"
    path.write_bytes("\n".join([good, *bad, good]).encode() + b'\n{"id": "\xff"}\n' + b'{"messages": [{"ro')
    options = Options(valid_fraction=0.0, on_error="skip")
    report = convert("messages", [str(path)], str(tmp_path / "out"), HELPSTEER, options)
    check_sums(report)
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [line["where"] for line in lines] == [f"{path}:{number}" for number in (2, 3, 4, 5, 6, 7, 9, 10)]
    for line, words in zip(lines, ("malformed", "object", "NaN", "begins with", "no response", "outside 0..4", "UTF-8",
                                   "torn last line"), strict=True):  # fmt: skip
        assert words in line["reason"]
    assert [line["line"] for line in lines] == [*bad, '{"id": "\ufffd"}', '{"messages": [{"ro']
    assert (
        report["rejected_lines"] == 8 and report["skipped"]["conversations"] == {"rejected": 8} and report["out"] == 2
    )
    with pytest.raises(UserError, match=r"in\.jsonl:2: malformed JSON"):
        convert("messages", [str(path)], str(tmp_path / "out"), HELPSTEER)
    save(path, [chat("q", "a")])
    convert("messages", [str(path)], str(tmp_path / "out"), HELPSTEER, options)
    assert not (tmp_path / "out" / "rejected.jsonl").exists()


def test_rejected_lines_of_a_file_that_is_read_twice(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join([json.dumps(chat("q", "a")), "one", "two", ""]))
    options = Options(on_error="skip", valid_inputs=[str(path)])
    convert("messages", [str(path)], str(tmp_path / "out"), None, options)
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == ["one", "two", "one", "two"]


def test_ids_are_made_unique(tmp_path: Path) -> None:
    rows = [chat("a", "b", id="x"), chat("c", "d", id="x#2"), chat("e", "f", id="x"), chat("g", "h", id="x")]
    found, report = run(tmp_path, "messages", rows)
    assert [c.id for c in found] == ["x", "x#2", "x#3", "x#4"] and report["ids_made_unique"] == 2


def test_nothing_left_writes_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "in.jsonl", [chat("q", "a", lang="de")])
    with pytest.raises(UserError, match=r"1 in, skipped: language 1; data.languages=\['en'\], the input has: de"):
        convert("messages", [path], str(tmp_path / "out"), None, Options(filters=Filters(languages=["en"])))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("source", "keys", "message"),
    [("helpstear", {}, "did you mean 'helpsteer'"), ("oasst", {}, "needs a schema"),
     ("messages", {"paths": "all"}, "data.paths"),
     ("hh_rlhf", {"map": "turns=a"}, "data.map is set, but data.source=hh_rlhf does not read it"),
     ("messages", {"label_max": 4}, "data.label_max is set"), ("messages", {"split": "x"}, "data.hf_split is set"),
     ("hf", {"valid_inputs": ["x"]}, "data.valid_input is set"), ("hf", {"rows": "hf"}, "data.hf_rows='hf'"),
     ("messages", {"valid_fraction": 1}, "valid_fraction"), ("messages", {"on_error": "x"}, "on_error"),
     ("messages", {}, "no such file")],
)  # fmt: skip
def test_bad_options(tmp_path: Path, source: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        convert(source, [str(tmp_path / "none")], str(tmp_path / "out"), None, Options(**keys))


# Split, order, OpenAssistant, command line


def test_split_is_by_prompt_and_deterministic(tmp_path: Path) -> None:
    rows = [chat(f"question {i % 40}", f"answer {i}") for i in range(160)]
    found, report = run(tmp_path, "messages", rows, valid_fraction=0.25)
    train = {c.messages[0].content for c in found[: report["train"]["conversations"]]}
    valid = {c.messages[0].content for c in found[report["train"]["conversations"] :]}
    assert train and valid and not train & valid
    files = [Path(report[split]["file"]) for split in ("train", "valid")]
    first = [path.read_bytes() for path in files]
    run(tmp_path, "messages", rows, valid_fraction=0.25)
    assert [path.read_bytes() for path in files] == first
    again, _ = run(tmp_path, "messages", rows[::-1], valid_fraction=0.25)
    assert {c.messages[0].content for c in again[: report["train"]["conversations"]]} == train
    run(tmp_path, "messages", rows, valid_fraction=0.0)
    assert not files[1].exists()


def test_own_validation_files(tmp_path: Path) -> None:
    valid = save(tmp_path / "valid.jsonl", [chat("q", "b"), chat("q", "a")])
    _, report = run(tmp_path, "messages", [chat("q", "a")], valid_inputs=[valid], filters=Filters(dedupe=True))
    assert report["train"]["conversations"] == report["valid"]["conversations"] == 1
    assert report["skipped"]["conversations"] == {"duplicate": 1}


REAL: list[tuple[str, tuple[str, ...], AttributeSchema | None, dict[str, Any], int, int]] = [
    ("oasst", ("oasst2_subset_trees.jsonl.zst",), oasst.OASST, {}, 599, 335),
    ("oasst", ("oa_en100_trees.jsonl.zst",), oasst.OASST, {}, 376, 329),
    ("oasst", ("oasst1_en_val_messages.jsonl.zst",), oasst.OASST, {}, 608, 561),
    ("hh_rlhf", ("hh_harmless-base_test.jsonl.zst", "hh_helpful-base_test.jsonl.zst"), None, {}, 9332, 9191),
    ("messages", ("dolly_3k.jsonl.zst",), None, {"map": ALPACA}, 2996, 2996),
    ("messages", ("topical_chat_valid_freq.jsonl.zst",), None, {"map": TOPICAL}, 539, 539),
    ("messages", ("topical_chat_valid_rare.jsonl.zst",), None, {"map": TOPICAL}, 539, 539),
]  # fmt: skip


@pytest.mark.parametrize(("source", "names", "schema", "keys", "count_in", "count_out"), REAL)
def test_real_files_add_up(
    tmp_path: Path, source: str, names: tuple[str, ...], schema: AttributeSchema | None, keys: dict[str, Any],
    count_in: int, count_out: int,
) -> None:  # fmt: skip
    files = shared(*names)
    report = convert(source, files, str(tmp_path / "a"), schema, Options(**keys))
    check_sums(report)
    assert (report["in"], report["out"]) == (count_in, count_out)
    found = [c for split in ("train", "valid") for c in read_records(report[split]["file"], schema)]
    assert len(found) == count_out and len({c.id for c in found}) == count_out
    again = convert(source, files, str(tmp_path / "b"), schema, Options(**keys))
    for split in ("train", "valid"):
        assert Path(report[split]["file"]).read_bytes() == Path(again[split]["file"]).read_bytes()


@pytest.mark.parametrize("paths", oasst.PATHS)
def test_oasst_is_what_its_own_converter_writes(tmp_path: Path, paths: str) -> None:
    files = shared("oasst2_subset_trees.jsonl.zst")
    old = oasst.convert(files, str(tmp_path / "old"), oasst.OASST, paths=paths, languages=["en", "pt"])
    options = Options(paths=paths, filters=Filters(languages=["en", "pt"]))
    new = convert("oasst", files, str(tmp_path / "new"), oasst.OASST, options)
    check_sums(new)
    for split in ("train", "valid"):
        assert Path(old[split]["file"]).read_bytes() == Path(new[split]["file"]).read_bytes()
        assert new[split] == old[split] | {"file": new[split]["file"]}
    for key in set(old) - {"train", "valid", "skipped"}:
        assert new[key] == old[key], key
    assert {unit: reasons for unit, reasons in new["skipped"].items() if unit != "conversations"} == old["skipped"]


def test_oasst_with_filters(tmp_path: Path) -> None:
    files = shared("oasst1_en_val_messages.jsonl.zst")
    filters = Filters(labels=["quality>=6"], dedupe=True, min_chars=100)
    report = convert("oasst", files, str(tmp_path), oasst.OASST, Options(filters=filters))
    check_sums(report)
    assert report["paths"] == report["conversations"] + sum(report["skipped"]["paths"].values())
    assert report["skipped"]["paths"]["label"] > 0 and report["filtered_replies"] > 0
    for split in ("train", "valid"):
        for conversation in read_records(report[split]["file"], oasst.OASST):
            kept = [m for m in conversation.messages if m.role == "assistant" and m.weight]
            assert kept and all(m.attributes is not None and m.attributes["quality"] >= 6 for m in kept)


def test_a_reply_of_a_filtered_path_is_trained_in_the_next_one(tmp_path: Path) -> None:
    def said(name: str, role: str, *replies: Any, text: str = "") -> dict[str, Any]:
        return {"message_id": name, "role": role, "text": text or name, "replies": list(replies)}

    long = said("u2", "prompter", said("a2", "assistant", text="long " * 50))
    short = said("u3", "prompter", said("a3", "assistant"), said("a4", "assistant"))
    prompt = said("u1", "prompter", said("a1", "assistant", long, short))
    path = save(tmp_path / "trees.jsonl", [{"message_tree_id": "u1", "prompt": prompt}])
    options = Options(filters=Filters(max_chars=100), valid_fraction=0.0)
    report = convert("oasst", [path], str(tmp_path / "out"), oasst.OASST, options)
    check_sums(report)
    found = [[m.content for m in c.messages if m.weight] for c in read_records(report["train"]["file"])]
    assert found == [["u1", "a1", "u3", "a3"], ["u1", "u3", "a4"]]
    assert report["skipped"]["conversations"] == {"too_long": 1} and report["replies"] == 4
    assert report["trained_replies"] == 3 and report["filtered_replies"] == 2


def test_a_reply_is_trained_where_no_path_that_goes_on_is_left(tmp_path: Path) -> None:
    """A path that another path continues counts as repeated only if the other one was kept."""

    def said(name: str, role: str, *replies: Any, text: str = "") -> dict[str, Any]:
        return {"message_id": name, "role": role, "text": text or name, "replies": list(replies)}

    long = said("u2", "prompter", said("a2", "assistant", text="long " * 50))
    prompt = said("u1", "prompter", said("a1", "assistant", said("u0", "prompter"), long))
    path = save(tmp_path / "trees.jsonl", [{"message_tree_id": "u1", "prompt": prompt}])
    for most, expected in ((100, [["u1", "a1"]]), (None, [["u1", "a1", "u2", "long " * 50]])):
        options = Options(filters=Filters(max_chars=most), valid_fraction=0.0)
        report = convert("oasst", [path], str(tmp_path / f"out{most}"), oasst.OASST, options)
        check_sums(report)
        found = [[m.content for m in c.messages] for c in read_records(report["train"]["file"])]
        assert [[t.strip() for t in each] for each in found] == [[t.strip() for t in each] for each in expected]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "in.jsonl", [rated("Hi?", "Hello.", 3, 4, 4, 0, 1, lang="en")])
    arguments = ["helpsteer", path, "--output", str(tmp_path / "out"), "--valid-fraction", "0"]
    assert main([*arguments, "--labels", "helpfulness>=3", "--languages", "en"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == 1
    assert main([*arguments, "--names", "helpfulness", "--max-level", "9"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert next(iter(read_records(report["train"]["file"]))).messages[1].attributes == {"helpfulness": 3 * 9 / 4}
    assert main([*arguments, "--labels", "helpfulness>=4"]) == 2
    assert "error: " in capsys.readouterr().err
    assert main(["hh_rlhf", "--export", path, "--output", str(tmp_path)]) == 2
    assert set(SOURCES) == {"oasst", "helpsteer", "hh_rlhf", "msid", "nemo", "sharegpt", "messages", "hf"}
