"""data_tools.oasst converts trees and flat files: pruning, paths, split, and a report that adds up."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from data_tools.oasst import OASST, convert, main, new_report, read, split
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Conversation, read_records, write_records

SHARED = Path(os.environ.get("STEERLM_SHARED_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
REAL = ["oasst2_subset_trees.jsonl.zst", "oa_en100_trees.jsonl.zst", "oasst1_en_val_messages.jsonl.zst"]


def node(name: str, *replies: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """Return a message, which is the assistant's if its name starts with "a"."""
    role = "assistant" if name[0] == "a" else "prompter"
    return {"message_id": name, "text": f"text of {name}", "role": role, "lang": "en", "replies": list(replies), **keys}


def tree(name: str, prompt: dict[str, Any]) -> dict[str, Any]:
    return {"message_tree_id": name, "tree_state": "ready_for_export", "prompt": prompt}


def flatten(prompt: dict[str, Any], parent: str | None = None) -> list[dict[str, Any]]:
    row = {key: value for key, value in prompt.items() if key != "replies"} | {"parent_id": parent}
    return [row, *(r for reply in prompt["replies"] for r in flatten(reply, prompt["message_id"]))]


def save(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def run(path: str | list[str], paths: str = "reply", **keys: Any) -> tuple[list[Conversation], dict[str, Any]]:
    report = new_report()
    inputs = [path] if isinstance(path, str) else path
    found = [c for _, c in read(inputs, keys.pop("schema", OASST), paths, keys.pop("languages", ()), report, **keys)]
    check_sums(report, paths)
    return found, report


def check_sums(report: dict[str, Any], paths: str) -> None:
    skipped = {unit: sum(reasons.values()) for unit, reasons in report["skipped"].items()}
    assert report["messages"] == report["messages_used"] + skipped["messages"]
    assert report["trees"] == report["trees_used"] + skipped["trees"]
    assert report["paths"] == report["conversations"] + skipped["paths"]
    assert report["reply_occurrences"] == report["trained_replies"] + report["repeated_replies_avoided"]
    assert report["labelled_replies"] <= report["replies"] <= report["trained_replies"]
    if paths == "reply":
        assert report["replies"] == report["trained_replies"]


def shape(conversations: list[Conversation]) -> list[str]:
    """Write each conversation as ``u1 a1 u2 a2*``, where * marks weight 1."""
    return [
        " ".join(m.content.split()[-1] + "*" * (m.role == "assistant" and m.weight) for m in c.messages)
        for c in conversations
    ]


FORK = node("u1", node("a1", node("u2", node("a2"), node("a3")), node("u3"), node("u4", node("a4"))), node("a5"))


def test_reply_mode_trains_each_reply_once(tmp_path: Path) -> None:
    found, report = run(save(tmp_path / "t.jsonl", [tree("t", FORK)]))
    assert shape(found) == ["u1 a1* u2 a2*", "u1 a1 u2 a3*", "u1 a1 u4 a4*", "u1 a5*"]
    assert [c.id for c in found] == ["a2", "a3", "a4", "a5"]
    assert found[0].source == "oasst" and found[0].extra == {"tree_id": "t", "lang": "en"}
    assert report["replies"] == 5 and report["paths"] == 5
    assert report["skipped"]["paths"] == {"repeated": 1} and report["skipped"]["messages"] == {"no_reply": 1}
    # a1 is context twice, and occurs once in the path that ended in u3
    assert report["repeated_replies_avoided"] == 3


def test_leaf_mode_has_every_path_in_full(tmp_path: Path) -> None:
    found, _ = run(save(tmp_path / "t.jsonl", [tree("t", FORK)]), "leaf")
    assert shape(found) == ["u1 a1* u2 a2*", "u1 a1* u2 a3*", "u1 a1*", "u1 a1* u4 a4*", "u1 a5*"]
    twice = node("u1", node("a1", node("u2"), node("u3")))
    found, report = run(save(tmp_path / "t2.jsonl", [tree("t", twice)]), "leaf")
    assert shape(found) == ["u1 a1*"] and report["skipped"]["paths"] == {"repeated": 1}
    assert shape(run(save(tmp_path / "t3.jsonl", [tree("t", twice)]))[0]) == ["u1 a1*"]


def test_deleted_empty_and_single_messages(tmp_path: Path) -> None:
    rows = [
        tree("t1", node("u1", node("a1", node("u2", node("a2"))), node("a3", node("u4", node("a4")), deleted=True))),
        tree("t2", node("u5")),
        tree("t3", node("u6", node("a6"), deleted=True)),
        tree("t4", node("u7", node("a7", text=" "))),
        tree("t5", node("a8", node("u8"))),
        tree("t6", node("u9", node("u10"))),
    ]
    found, report = run(save(tmp_path / "t.jsonl", rows))
    assert shape(found) == ["u1 a1* u2 a2*"]
    assert report["skipped"]["messages"] == {
        "deleted": 2, "below_skipped": 4, "no_reply": 4, "empty": 1, "begins_with_assistant": 1,
    }  # fmt: skip
    assert report["skipped"]["paths"] == {"single_message": 2, "no_reply": 1}
    assert report["skipped"]["trees"] == {"no_reply": 3, "pruned": 2}


def test_flat_in_any_order_equals_nested(tmp_path: Path) -> None:
    rows = flatten(FORK)
    nested = run(save(tmp_path / "t.jsonl", [tree("u1", FORK)]))[0]
    assert run(save(tmp_path / "m.jsonl", rows))[0] == nested
    backwards, _ = run(save(tmp_path / "b.jsonl", rows[::-1]))
    assert {c.id for c in backwards} == {c.id for c in nested}
    halves = [save(tmp_path / "h1.jsonl", rows[::2]), save(tmp_path / "h2.jsonl", rows[1::2])]
    assert {c.id for c in run(halves)[0]} == {c.id for c in nested}  # a parent may be in another file


def test_json_arrays_equal_lines(tmp_path: Path) -> None:
    for rows in ([tree("u1", FORK)], flatten(FORK)):
        (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
        assert run(str(tmp_path / "array.json")) == run(save(tmp_path / "lines.jsonl", rows))


def test_flat_orphans_and_cycles(tmp_path: Path) -> None:
    rows = flatten(node("u1", node("a1")))
    rows += flatten(node("a2", node("u3", node("a3"))), parent="nowhere")
    rows += [node("u8", parent_id="a8"), node("a8", parent_id="u8"), node("u9", parent_id="u9"), rows[1]]
    found, report = run(save(tmp_path / "m.jsonl", rows))
    assert shape(found) == ["u1 a1*"]
    assert report["trees"] == 1
    assert report["skipped"]["messages"] == {"orphan": 4, "below_skipped": 2, "repeated": 1}


def test_a_repeated_tree_counts_once(tmp_path: Path) -> None:
    first = save(tmp_path / "t.jsonl", [tree("t", FORK), tree("t", FORK)])
    found, report = run([first, save(tmp_path / "m.jsonl", [{**r, "message_tree_id": "t"} for r in flatten(FORK)])])
    assert len(found) == 4
    assert report["skipped"]["trees"] == {"repeated": 2} and report["skipped"]["messages"]["repeated"] == 18


@pytest.mark.parametrize(
    "labels",
    [
        {"name": ["quality", "spam", "humor"], "value": [0.75, 0, None], "count": [3, 3, 0]},
        {"quality": {"value": 0.75, "count": 3}, "spam": {"value": 0.0, "count": 3}, "humor": {"value": None}},
        {"quality": 0.75, "spam": 0, "humor": None},
        [{"name": "quality", "value": 0.75}, {"name": "spam", "value": 0.0}],
    ],
)
def test_label_shapes(tmp_path: Path, labels: Any) -> None:
    prompt = node("u1", node("a1", labels=labels), node("a2", labels={}), labels=labels)
    path = save(tmp_path / "t.jsonl", [tree("t", prompt)])
    found, report = run(path)
    assert found[0].messages[1].attributes == {"quality": 6.75}
    assert found[0].messages[0].attributes is None and found[1].messages[1].attributes is None
    assert report["labelled_replies"] == 1 and report["replies"] == 2
    assert report["notes"] == {"label_not_in_schema:spam": 1}
    found, report = run(path, schema=AttributeSchema("none", (), 9))
    assert found[0].messages[1].attributes is None and report["labelled_replies"] == 0


def test_negative_reviews_are_kept_and_counted(tmp_path: Path) -> None:
    rows = [tree("u1", node("u1", node("a1", review_result=False), node("a2", review_result=None)))]
    found, report = run(save(tmp_path / "t.jsonl", rows))
    assert len(found) == 2 and report["notes"] == {"review_result_false": 1}


def test_languages(tmp_path: Path) -> None:
    rows = [
        tree("t1", node("u1", node("a1"))),
        tree("t2", node("u2", node("a2", lang="pt-BR"), lang="pt-BR")),
        tree("t3", node("u3", node("a3", lang="de"), node("a4"))),
    ]
    path = save(tmp_path / "t.jsonl", rows)
    assert len(run(path)[0]) == 4
    found, report = run(path, languages=["en"])
    assert shape(found) == ["u1 a1*", "u3 a4*"]
    assert report["skipped"]["messages"] == {"language": 2, "below_skipped": 1}
    assert shape(run(path, languages=["PT"])[0]) == ["u2 a2*"]
    with pytest.raises(UserError, match=r"no conversation is left.*languages=\['xx'\], the files have: en pt-BR de"):
        convert([path], str(tmp_path / "out"), OASST, "reply", ["xx"])


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "malformed JSON"),
        ("[]", "expected a JSON object"),
        (json.dumps({"message_tree_id": "t"}), "prompt must be an object"),
        (json.dumps(tree("t", node("u1", text=None))), "text=None must be a string"),
        (json.dumps(tree("t", node("u1", role="bot"))), "role='bot'; legal"),
        (json.dumps(tree("t", node("u1", message_id=3))), "message_id=3"),
        (json.dumps(tree("t", node("u1", replies="a1"))), "replies of message u1"),
        (json.dumps(tree("t", node("u1", node("a1"), node("a1")))), "a1 occurs twice"),
        (json.dumps(tree("t", node("u1", node("a1", labels={"quality": 1.2})))), r"quality=1.2 must be .* \[0, 1\]"),
        (json.dumps(tree("t", node("u1", node("a1", labels={"name": ["quality"], "value": []})))), "one as long"),
        (json.dumps(tree("t", node("u1", node("a1", labels={"name": [[]], "value": [1]})))), "must be a list of names"),
        (json.dumps(tree("t", node("u1", node("a1", labels=[{"name": []}])))), "must be a mapping"),
        (json.dumps(tree("t", node("u1", role=["bot"]))), r"role=\['bot'\]; legal"),
        (json.dumps(tree("t", node("u1", message_tree_id={}))), "message_tree_id={} must be a string"),
        (json.dumps(tree("t", node("u1", node("a1", labels="good")))), "labels=good must be a mapping"),
        (json.dumps(tree("t", node("u1", text="\ud800"))), "surrogate"),
    ],
)
def test_malformed_lines_name_file_and_line(tmp_path: Path, line: str, match: str) -> None:
    path = save(tmp_path / "t.jsonl", [tree("t1", node("u8", node("a8"))), line, tree("t2", node("u9", node("a9")))])
    with pytest.raises(UserError, match=match) as caught:
        run(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    report = convert([path], str(tmp_path / "out"), OASST, "reply", [], 0.5, 10, "skip")
    assert report["rejected_lines"] == 1 and report["rejected"][0]["line"] == f"{path}:2"
    assert report["lines"] == 2 and report["conversations"] == 2
    check_sums(report, "reply")


def test_flat_malformed_parent_and_foreign_file(tmp_path: Path) -> None:
    path = save(tmp_path / "m.jsonl", [*flatten(node("u1", node("a1"))), node("a2", parent_id=5)])
    with pytest.raises(UserError, match=r"m.jsonl:3: message a2: parent_id=5"):
        run(path)
    for row in ({"messages": []}, {}):
        with pytest.raises(UserError, match=r"f.jsonl:1: neither an OpenAssistant tree"):
            run(save(tmp_path / "f.jsonl", [row]))


def test_split() -> None:
    ids = [f"t{i}" for i in range(100)]
    valid = split(ids, 0.05, 10)
    shuffled = sorted(ids)
    random.Random(10).shuffle(shuffled)
    assert valid == set(shuffled[-5:]) == split(ids[::-1], 0.05, 10)
    assert split(ids, 0.05, 11) != valid
    assert len(split(ids[:3], 0.05, 10)) == 1 and len(split(ids[:2], 0.9, 10)) == 1
    assert split(ids[:1], 0.5, 10) == split(ids, 0, 10) == set()
    for bad in (1.0, -0.1):
        with pytest.raises(UserError, match="valid_fraction"):
            split(ids, bad, 10)


def test_convert_writes_and_splits_by_tree(tmp_path: Path) -> None:
    rows = [tree(f"t{i}", node(f"u{i}", node(f"a{i}x"), node(f"a{i}y"))) for i in range(40)]
    path, out = save(tmp_path / "t.jsonl", rows), tmp_path / "out"
    report = convert([path], str(out), OASST, "reply", [], 0.1, 10, "error")
    train, valid = (list(read_records(out / f"{part}.jsonl.zst", OASST)) for part in ("train", "valid"))
    trees = [{c.extra["tree_id"] for c in part} for part in (train, valid)]
    assert not trees[0] & trees[1] and [len(t) for t in trees] == [36, 4]
    assert (len(train), len(valid)) == (72, 8) == (report["train"]["conversations"], report["valid"]["conversations"])
    assert report["conversations"] == 80 and json.dumps(report)
    before = (out / "train.jsonl.zst").read_bytes()
    assert convert([path], str(out), OASST, "reply", [], 0.1, 10, "error") == report
    assert (out / "train.jsonl.zst").read_bytes() == before
    report = convert([path], str(out), OASST, "reply", [], 0.0, 10, "error")
    assert report["valid"]["file"] is None and not (out / "valid.jsonl.zst").exists()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "t.jsonl", [tree(f"t{i}", node(f"u{i}", node(f"a{i}"))) for i in range(3)])
    assert main([path, "--output", str(tmp_path / "out"), "--languages", "en", "--seed", "3", "--paths", "leaf"]) == 0
    assert json.loads(capsys.readouterr().out)["conversations"] == 3
    assert main([str(tmp_path / "nothing.jsonl"), "--output", str(tmp_path / "out")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_options_are_checked_first(tmp_path: Path) -> None:
    for keys, match in (({"paths": "all"}, "data.paths='all'"), ({"on_error": "x"}, "data.on_error"),
                        ({"valid_fraction": 2}, "data.valid_fraction=2")):  # fmt: skip
        with pytest.raises(UserError, match=match):
            convert(["missing"], str(tmp_path), OASST, **keys)  # type: ignore[arg-type]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no corpora at {SHARED} (set STEERLM_SHARED_DATA)")
@pytest.mark.parametrize("paths", ["reply", "leaf"])
@pytest.mark.parametrize("name", REAL)
def test_real_files(tmp_path: Path, name: str, paths: str) -> None:
    report = convert([str(SHARED / name)], str(tmp_path), OASST, paths, [], 0.05, 10, "error")
    check_sums(report, paths)
    both = [list(read_records(tmp_path / f"{part}.jsonl.zst", OASST)) for part in ("train", "valid")]
    assert not {c.extra["tree_id"] for c in both[0]} & {c.extra["tree_id"] for c in both[1]}
    conversations = both[0] + both[1]
    assert len(conversations) == report["conversations"] and len({c.id for c in conversations}) == len(conversations)
    assert all(c.messages[-1].role == "assistant" and c.messages[-1].weight == 1 for c in conversations)
    roles = [[m.role for m in c.messages] for c in conversations]
    assert all(r == ["user", "assistant"] * (len(r) // 2) for r in roles)
    replies = [m for c in conversations for m in c.messages if m.role == "assistant"]
    assert sum(m.weight for m in replies) == report["trained_replies"]
    if paths == "reply" and name.startswith("oasst1"):
        assert report["replies"] == 730 and report["labelled_replies"] == 726
        assert report["skipped"]["messages"] == {"no_reply": 179, "deleted": 19, "below_skipped": 11, "orphan": 1}
    if paths == "reply" and name.startswith("oasst2"):
        assert report["replies"] == 425 and report["skipped"]["trees"]["repeated"] == 23


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no corpora at {SHARED} (set STEERLM_SHARED_DATA)")
def test_real_labels_are_on_the_scale(tmp_path: Path) -> None:
    found, _ = run(str(SHARED / REAL[2]))
    write_records(tmp_path / "all.jsonl.gz", found)
    again = list(read_records(tmp_path / "all.jsonl.gz", OASST))
    assert again == found
    labelled = [m for c in found for m in c.messages if m.attributes]
    assert max(m.attributes["quality"] for m in labelled if m.attributes) == 9.0
    assert list(labelled[0].attributes or {}) == list(OASST.names)
