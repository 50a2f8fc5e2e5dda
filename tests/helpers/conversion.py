"""Convert rows by ``data_tools.convert``, for the tests of sources and of conversion."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_tools.convert import Options, convert
from data_tools.sources.base import HELPSTEER_NAMES, STEERLM_NAMES
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Conversation, read_records

SHARED = Path(os.environ.get("STEERLM_SHARED_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
HELPSTEER = AttributeSchema("helpsteer", STEERLM_NAMES, 4)
DOLLY = "prompt=instruction,context=context,response=response"
ALPACA = "prompt=instruction,context=input,response=output"  # for dolly_3k of the shared data
TOPICAL = "turns=content,text=message,speaker=agent,id=conversation_id"


def save(path: Path, rows: Sequence[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def check_sums(report: Mapping[str, Any]) -> None:
    """Check the sums that the docstring of ``data_tools.convert`` promises."""
    assert report["in"] == report["out"] + sum(report["skipped"]["conversations"].values())
    assert report["out"] == report["conversations"]
    assert report["out"] == report["train"]["conversations"] + report["valid"]["conversations"]
    parts = ("trained_replies", "context_replies", "repeated_replies_avoided", "filtered_replies")
    assert report["reply_occurrences"] == sum(report[part] for part in parts)
    assert all(report[part] >= 0 for part in parts)
    assert sum(reason == "rejected" for reason in report["skipped"]["conversations"]) == bool(
        report["rejected_lines"] and report["source"] != "oasst"
    )


def run(
    tmp_path: Path, source: str, rows: Sequence[Any], schema: AttributeSchema | None = None, **keys: Any
) -> tuple[list[Conversation], dict[str, Any]]:
    """Convert rows of a source, and return conversations and report. All go to train unless a fraction is given."""
    path = save(tmp_path / "in" / "rows.jsonl", rows)
    options = Options(**{"valid_fraction": 0.0, **keys})
    report = convert(source, [path], str(tmp_path / "out"), schema, options)
    check_sums(report)
    found = list(read_records(report["train"]["file"]))
    assert len({c.id for c in found}) == len(found)
    if report["valid"]["file"]:
        found += read_records(report["valid"]["file"])
    assert sum(m.role == "assistant" and m.weight > 0 for c in found for m in c.messages) == report["trained_replies"]
    return found, report


def roles(conversation: Conversation) -> str:
    """Write a conversation as ``u a0 a``: users, context replies, trained replies."""
    return " ".join(m.role[0] + "0" * (m.role == "assistant" and not m.weight) for m in conversation.messages)


def texts(conversation: Conversation) -> list[str]:
    return [message.content for message in conversation.messages]


def chat(*contents: str, **keys: Any) -> dict[str, Any]:
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": messages, **keys}


def rated(prompt: str, response: str, *labels: Any, **keys: Any) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, **dict(zip(HELPSTEER_NAMES, labels, strict=True)), **keys}


def shared(*names: str) -> list[str]:
    for name in names:
        if not (SHARED / name).is_file():
            pytest.skip(f"{SHARED / name} is not there (set STEERLM_SHARED_DATA)")
    return [str(SHARED / name) for name in names]
