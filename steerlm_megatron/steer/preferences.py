"""Pairs of responses of which people chose one: JSONL files (plain, ``.gz`` or ``.zst``), read and checked.

``{"messages": [{"role": "user", "content": "…"}], "chosen": "…", "rejected": "…"}``: the conversation up to the user's
message that both texts answer, the response that was chosen, and the one that was not. ``id`` and other keys are
allowed and not used. ``python -m data_tools.preferences`` writes such files from HH-RLHF and HelpSteer.

Owns: the pair's fields and their checks. Does not own: messages (``messages.py``), opening files (``records.py``).
Invariant: every line becomes a pair, an error naming ``file:line``, or an entry of ``rejected``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.lines import OnError, Rejected, parse_lines, reject
from steerlm_megatron.steer.messages import Message, brief, has_text
from steerlm_megatron.steer.records import expand_paths, from_json, raw_lines

SIDES = ("chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Pair:
    """A conversation that ends with a user's message, and two responses to it."""

    messages: tuple[Message, ...]
    chosen: str
    rejected: str


def read_pairs(paths: str, on_error: OnError = "error", rejected: Rejected | None = None) -> Iterator[tuple[str, Pair]]:
    """Yield ``("file:line", pair)`` of one or more files or globs, in order.

    Args:
        paths: files or globs.
        on_error: ``"skip"`` appends a bad line to ``rejected`` and goes on; ``"error"`` raises.
        rejected: receives ``("file:line", reason)``.

    Raises:
        UserError: a malformed line (``on_error="error"``); a missing, unreadable or empty file (always).
    """
    for path in expand_paths(paths):
        for where, value in parse_lines(raw_lines(path), on_error, rejected):
            try:
                yield where, pair_from_json(value, where)
            except UserError as error:
                reject(error, on_error, rejected)


def pair_from_json(data: Mapping[str, Any], where: str) -> Pair:
    """Check a parsed line and return its pair. A ``UserError`` names ``where``, the value and the rule."""
    texts = []
    for side in SIDES:
        text = data.get(side)
        if not isinstance(text, str) or not has_text(text):
            raise UserError(f"{where}: {side}={brief(text)} must be a response's text; the line needs both")
        texts.append(text)
    conversation = from_json({"messages": data.get("messages")}, where, require_response=False)
    if conversation.messages[-1].role != "user":
        raise UserError(f"{where}: messages must end with the user's message that both responses answer")
    return Pair(conversation.messages, *texts)
