"""The questions that models answered, as an LLM judge is shown them.

Owns: the keys of a prompt's record that judging reads (``category``, ``follow_ups``, ``reference``), and the turns that
a judge sees. Does not own: prompts and verdicts. Invariant: turn 0 is the prompt's last message; turn k is its k-th
follow-up, which each model got after its answer to the turn before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.records import Conversation

OTHER = "other"  # the category of a question that has none


@dataclass(frozen=True)
class Question:
    """One prompt as a judge sees it.

    Args:
        before: (question, answer) of the turns that the prompt itself has; they are the same for every model.
        asked: the messages that the models answered, one per turn.
        references: the solution of each turn, empty where there is none.
    """

    id: str
    category: str
    before: tuple[tuple[str, str], ...]
    asked: tuple[str, ...]
    references: tuple[str, ...]

    def turns(self, last: int, answers: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
        """Return the turns up to ``last``, for a prompt. ``answers``: name in the prompt → answers by turn."""
        shown = [{"question": q, "reference": "", **dict.fromkeys(answers, a)} for q, a in self.before]
        for turn in range(last + 1):
            texts = {name: each[turn] for name, each in answers.items()}
            shown.append({"question": self.asked[turn], "reference": self.references[turn], **texts})
        return shown


def question_of(prompt: Conversation) -> Question:
    """Return the question of a prompt.

    ``follow_ups`` of its record are further messages of the user, ``reference`` is a solution per turn (null where
    there is none) or one text.

    Raises:
        UserError: one of the keys holds something else.
    """
    extra = prompt.extra
    follow_ups = _texts(extra.get("follow_ups"), prompt.id, "follow_ups")
    asked = (prompt.messages[-1].content, *follow_ups)
    references = _texts(extra.get("reference"), prompt.id, "reference")[: len(asked)]
    category = extra.get("category")
    instructions, before, question = "", [], ""
    for message in prompt.messages[:-1]:
        if message.role == "system":
            instructions = f"(The assistant's instructions: {message.content})\n\n" if message.content.strip() else ""
        elif message.role == "user":
            question = f"{question}\n\n{message.content}" if question else message.content
        else:
            before.append((question, message.content))
            question = ""
    first = f"{question}\n\n{asked[0]}" if question else asked[0]
    if before:
        before[0] = (instructions + before[0][0], before[0][1])
    else:
        first = instructions + first
    return Question(
        prompt.id,
        category if isinstance(category, str) and category.strip() else OTHER,
        tuple(before),
        (first, *asked[1:]),
        (*references, *[""] * (len(asked) - len(references))),
    )


def follow_ups(prompt: Conversation) -> tuple[str, ...]:
    """Return the user's further messages of a prompt's record. Raises UserError as :func:`question_of`."""
    return _texts(prompt.extra.get("follow_ups"), prompt.id, "follow_ups")


def _texts(value: object, where: str, key: str) -> tuple[str, ...]:
    """Return a text or a list of texts as a tuple; null in a list is an empty text."""
    if value is None:
        return ()
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(item is None or isinstance(item, str) for item in items):
        raise UserError(f"evaluate.prompts: {key} of the record {where} must be a list of texts")
    return tuple(item or "" for item in items)
