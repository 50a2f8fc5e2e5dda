"""Responses to the follow-ups of prompts, as MT-bench's second turns are: each model continues its own conversation.

Owns: asking for them turn after turn, at a model's best levels. Does not own: the prompts' own responses
(``evaluate_drawing.py``), judging (``steerlm_megatron/evaluate``). Invariant: a follow-up is asked after the response
that this model gave to the turn before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from steerlm_megatron.config.schema import Config
from steerlm_megatron.evaluate.protocol import Levels
from steerlm_megatron.evaluate.questions import follow_ups
from steerlm_megatron.observe.runfolder import JOURNAL
from steerlm_megatron.stages.sampling import Prompt, draw, opened_sampler, request_for
from steerlm_megatron.stages.session import OpenedCheckpoint, Session
from steerlm_megatron.steer.records import Conversation, Message


def turns_of(prompts: Sequence[Conversation]) -> int:
    """Return the largest number of follow-ups of a prompt."""
    return max((len(follow_ups(prompt)) for prompt in prompts), default=0)


def journal_of(name: str, turn: int) -> str:
    """Return the journal's name for the responses of the model ``name`` to the ``turn``-th follow-ups, from 1."""
    return f"{name}-follow-up-{turn}"


def journals_in(folder: Path, names: Iterable[str]) -> list[str]:
    """Return the names of the journals of :func:`draw_follow_ups` that a run folder has, for the models ``names``."""
    found = [path for name in names for path in folder.glob(f"{JOURNAL}{journal_of(name, 0)[:-1]}*")]
    return [path.name.removeprefix(JOURNAL) for path in found]


def check_follow_ups(
    prompt: Conversation, where: str, levels: Levels | None, opened: OpenedCheckpoint, config: Config
) -> None:
    """Refuse a prompt one of whose follow-ups does not fit into the model by itself.

    Raises:
        PromptRefused: as ``request_for``.
        UserError: its ``follow_ups`` are no texts.
    """
    for text in follow_ups(prompt):
        alone = Prompt(prompt.id, (*_system(prompt), Message("user", text)), levels, where)
        request_for(0, alone, opened, config.sampling, config.generation)


def draw_follow_ups(
    here: Session,
    opened: OpenedCheckpoint,
    prompts: Sequence[Conversation],
    texts: Sequence[str],
    levels: Levels | None,
    name: str,
) -> list[list[str]]:
    """Return responses [turns][prompts] to the follow-ups, the first turn's responses being ``texts``; empty texts
    where a prompt has no such turn. A conversation that is too long loses its oldest turns. Collective over the world.
    """
    config, later = here.config, list[list[str]]()
    talks = [(*prompt.messages, _answer(text, levels)) for prompt, text in zip(prompts, texts, strict=True)]
    for turn in range(turns_of(prompts)):
        asked = [i for i, prompt in enumerate(prompts) if len(follow_ups(prompt)) > turn]
        requests = []
        for i in asked:
            talks[i] = (*talks[i], Message("user", follow_ups(prompts[i])[turn]))
            wanted = Prompt(f"{turn + 1}/{i}", talks[i], levels, prompts[i].id)
            requests.append(request_for(i, wanted, opened, config.sampling, config.generation))
        with opened_sampler(here, opened) as sampler:
            label = f"evaluate {name}, turn {turn + 2}"
            drawn = draw(here, opened, sampler, requests, journal_of(name, turn + 1), label)
        row = [""] * len(prompts)
        for i, one in zip(asked, drawn, strict=True):
            row[i] = one.text
            talks[i] = (*talks[i], _answer(one.text, levels))
        later.append(row)
    return later


def _answer(text: str, levels: Levels | None) -> Message:
    """Return a response as the history of the next turn: under the levels that it was asked for, as in training."""
    return Message("assistant", text, attributes=dict(levels) if levels else None)


def _system(prompt: Conversation) -> tuple[Message, ...]:
    return prompt.messages[:1] if prompt.messages[0].role == "system" else ()
