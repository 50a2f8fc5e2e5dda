"""Answers of models that are not drawn here, from files: a baseline such as that which the SteerLM paper compares with.

Owns: the two forms of such a file, and finding the answer to each prompt. Does not own: judging. Invariant: every
prompt has an answer to each of its turns, or the file is refused.

A row is FastChat's (``question_id`` and ``choices[0].turns``, a text per turn), or a record as ``steerlm generate``
writes it (``id`` and ``messages``, of which the assistant's messages after the prompt's own are the answers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steerlm_megatron.errors import UserError
from steerlm_megatron.evaluate.protocol import Answers
from steerlm_megatron.evaluate.questions import follow_ups
from steerlm_megatron.steer.records import Conversation, from_json, read_json_lines


def read_answers(path: str, prompts: Sequence[Conversation], key: str) -> Answers:
    """Return the answers of a file to ``prompts``, found by the prompts' ids. ``key`` is the configuration's.

    Raises:
        UserError: the file cannot be read, a row is of neither form, or a prompt has no answer to one of its turns.
    """
    rows = {name: turns for where, row in read_json_lines(path) for name, turns in [_row(row, where, prompts)]}
    lacking = [p.id for p in prompts if len(rows.get(p.id, ())) < 1 + len(follow_ups(p))]
    if lacking:
        raise UserError(
            f"{key}={path} lacks answers to {len(lacking)} of {len(prompts)} prompts, such as {lacking[0]}: an answer "
            "to each turn is found by the prompt's id"
        )
    turns = max(1 + len(follow_ups(prompt)) for prompt in prompts)
    texts = [[*rows[prompt.id][: 1 + len(follow_ups(prompt))], *[""] * turns][:turns] for prompt in prompts]
    first, *later = (list(column) for column in zip(*texts, strict=True))
    return Answers(None, first, [], [], {}, later)


def _row(row: Mapping[str, Any], where: str, prompts: Sequence[Conversation]) -> tuple[str, list[str]]:
    """Return the id of the prompt that a row answers, and its answers by turn."""
    if "messages" in row:
        record = from_json(row, where)
        own = next((len(prompt.messages) for prompt in prompts if prompt.id == record.id), 0)
        return record.id, [message.content for message in record.messages[own:] if message.role == "assistant"]
    try:
        name, turns = row["question_id"], row["choices"][0]["turns"]
    except (KeyError, IndexError, TypeError):
        name, turns = None, None
    if isinstance(name, bool) or not isinstance(name, int | str) or not isinstance(turns, list):
        raise UserError(f"{where}: the row is no answer: it needs question_id and choices, or id and messages")
    if not all(isinstance(text, str) for text in turns):
        raise UserError(f"{where}: choices[0].turns must be a list of texts")
    return str(name), turns
