"""The embedded corpus: conversations from a grammar, with noisy "human" labels, for the quickstart and for tests.

Owns: the grammar and the annotators' noise. Does not own: what attributes mean (``demo_judge.py``).
Invariants: the same arguments give the same bytes; no question (subject and ordered properties) is in more than one of train,
valid and held-out prompts.

A prompt asks for one to four properties of an animal. A response is courtesy, rudeness, one sentence per asked property (its value,
or that it is a secret), fillers and puns, always in this order. How much there is of each is drawn independently, so that every
attribute varies while the others stand still; and a secret is as long as a value, so that help and length are independent too.
Labels are what annotators would say: the measured value plus each one's bias and error, in whole points, averaged; some are
missing. A model that predicts the labels averages the noise away.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from data_tools.demo_judge import COURTEOUS, FACTS, PROPERTIES, PUNS, RUDE, measure, value
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.records import Conversation, Message, to_json, write_records

FILLERS = (
    "Many people like this animal very much.",
    "You can read more in good books.",
    "Children love to hear all about it.",
    "There is always much more to say.",
)
_FORMS = ("Tell me the {p} of the {s}.", "What is the {p} of the {s}?", "I ask for the {p} of the {s}.")
_SOURCE = "demo"
# How often a prompt asks for 1, 2, 3, 4 properties, and how many held-out prompts do.
_ASKED_WEIGHTS = (0.2, 0.35, 0.2, 0.25)
_HELD_OUT = (12, 36, 32, 48)
_VALID_SHARE = 0.08
_MULTI_TURN_SHARE = 0.15
_MISSING_SHARE = 0.08
_ANNOTATORS = 3
_BIAS_POINTS = 0.25
_ERROR_POINTS = 0.7
_COUNT_WEIGHTS = (0.32, 0.17, 0.17, 0.17, 0.17)

Question = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Corpus:
    """Labelled conversations for training and validation, and held-out prompts (user messages only)."""

    train: list[Conversation]
    valid: list[Conversation]
    prompts: list[Conversation]


def questions(asked: int) -> list[Question]:
    """Every (subject, ordered properties) with ``asked`` properties."""
    return [(subject, wanted) for subject in FACTS for wanted in permutations(PROPERTIES, asked)]


def prompt_text(question: Question, rng: random.Random) -> str:
    """A request that names subject and properties, in order."""
    subject, wanted = question
    listed = wanted[0] if len(wanted) == 1 else ", ".join(wanted[:-1]) + " and " + wanted[-1]
    return rng.choice(_FORMS).format(p=listed, s=subject)


def response_text(question: Question, rng: random.Random) -> str:
    """One response; how helpful, long, funny, rude and courteous it is, is drawn independently.

    Phrases of a kind come in one order, so that a small model can tell from the last one how many there are.
    """
    subject, wanted = question
    # The middle of 0..1 is drawn as often as its ends: rounding to whole properties would favour it otherwise.
    shown = round(rng.choice((0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0)) * len(wanted))
    facts = [
        f"Its {name} is {value(subject, name) if index < shown else 'secret'}." for index, name in enumerate(wanted)
    ]
    rude = RUDE[: _count(rng)]
    address = [f"You {' '.join(rude)}."] if rude else []
    fillers = FILLERS[: rng.randint(0, len(FILLERS))]
    return " ".join([*COURTEOUS[: _count(rng)], *address, *facts, *fillers, *PUNS[: _count(rng)]])


def _count(rng: random.Random) -> int:
    """0 to 4; none more often than any other."""
    return rng.choices(range(5), _COUNT_WEIGHTS)[0]


def labels(prompt: str, response: str, rng: random.Random) -> dict[str, float]:
    """What annotators say of ``response``: see the module's docstring. Between none and all attributes, floats in [0, 4]."""
    said: dict[str, float] = {}
    for name, measured in measure(prompt, response).items():
        votes = [_vote(measured, rng) for _ in range(_ANNOTATORS)]
        if rng.random() >= _MISSING_SHARE:
            said[name] = round(sum(votes) / len(votes), 3)
    return said


def _vote(measured: float, rng: random.Random) -> int:
    return min(max(round(measured + rng.gauss(0.0, _BIAS_POINTS) + rng.gauss(0.0, _ERROR_POINTS)), 0), 4)


def generate(seed: int, conversations: int) -> Corpus:
    """``conversations`` labelled conversations, split by question, and the held-out prompts.

    Raises:
        UserError: fewer than two conversations (a training and a validation one).
    """
    if conversations < 2:
        raise UserError(f"conversations={conversations} must be at least 2: one for training and one for validation")
    rng = random.Random(f"demo-{seed}")
    held_out: list[Question] = []
    pools: dict[str, list[list[Question]]] = {"train": [], "valid": []}
    for asked, count in enumerate(_HELD_OUT, 1):
        every = questions(asked)
        rng.shuffle(every)
        rest = every[count:]
        valid = max(4, round(len(rest) * _VALID_SHARE))
        held_out += every[:count]
        pools["valid"].append(rest[:valid])
        pools["train"].append(rest[valid:])
    rng.shuffle(held_out)  # any first part of the prompts is a fair sample of them
    valid_count = max(1, round(conversations * _VALID_SHARE))
    made = [
        _conversation(index, pools["valid" if index < valid_count else "train"], rng) for index in range(conversations)
    ]
    prompts = [
        Conversation(f"prompt-{index:04d}", (Message("user", prompt_text(question, rng)),), _SOURCE)
        for index, question in enumerate(held_out)
    ]
    return Corpus(made[valid_count:], made[:valid_count], prompts)


def _conversation(index: int, pool: Sequence[Sequence[Question]], rng: random.Random) -> Conversation:
    """One or two turns, each a question of its own with a labelled response."""
    messages: list[Message] = []
    for _ in range(2 if rng.random() < _MULTI_TURN_SHARE else 1):
        question = rng.choice(rng.choices(pool, _ASKED_WEIGHTS)[0])
        prompt, response = prompt_text(question, rng), response_text(question, rng)
        messages += [Message("user", prompt), Message("assistant", response, labels(prompt, response, rng) or None)]
    return Conversation(f"demo-{index:06d}", tuple(messages), _SOURCE)


def write(output_dir: str | os.PathLike[str], conversations: int, seed: int) -> dict[str, int]:
    """Write ``train.jsonl``, ``valid.jsonl`` and ``prompts.jsonl`` (user messages only); returns how many each holds."""
    folder, corpus = Path(output_dir), generate(seed, conversations)
    return {
        "train": write_records(folder / "train.jsonl", corpus.train),
        "valid": write_records(folder / "valid.jsonl", corpus.valid),
        "prompts": write_records(folder / "prompts.jsonl", corpus.prompts),
    }


def main() -> None:
    """``python -m data_tools.make_demo_corpus --output DIR``."""
    parser = argparse.ArgumentParser(description="Make the embedded corpus: labelled conversations from a grammar.")
    parser.add_argument("--output", help="folder for train.jsonl, valid.jsonl, prompts.jsonl")
    parser.add_argument("--conversations", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--show", type=int, default=0, help="print this many conversations instead of writing")
    options = parser.parse_args()
    if not options.output and not options.show:
        parser.error("give --output DIR, or --show N")
    try:
        if options.show:
            for conversation in generate(options.seed, options.conversations).train[: options.show]:
                print(json.dumps(to_json(conversation), indent=1))
        else:
            print(json.dumps(write(options.output, options.conversations, options.seed)))
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
