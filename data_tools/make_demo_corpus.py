"""The embedded corpus: conversations from a grammar, with noisy "human" labels, for the quickstart and for tests.

Owns: the grammar and the annotators' noise. Does not own: what attributes mean (``demo_judge.py``).
Invariants: the same arguments give the same bytes; no question (subject and ordered properties) is in more than one of
train, valid and held-out prompts.

A prompt asks for one to three properties of an animal. A response is courtesy, rudeness, fillers, one sentence per
asked property (its value, or that it is secret) and puns, always in this order. The amount of each is drawn
independently, so that every attribute varies while the others stay the same; and "secret" replaces a value, so that
help and length are independent too. Labels imitate annotators: the measured value plus the bias of each annotator and
an error, in full points, averaged over a few annotators of a pool; some are missing. A model that predicts the labels
averages the noise away.
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

from data_tools.demo_judge import COURTEOUS, FACTS, NAMES, PROPERTIES, PUNS, RUDE, fact, measure
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.records import Conversation, Message, to_json, write_records

# Each has six words, which is one level of verbosity.
FILLERS = (
    "Many people like this animal much.",
    "Good books can tell you more.",
    "Children love to hear about it.",
    "There is always more to say.",
)
_FORMS = ("Tell me the {p} of the {s}.", "What is the {p} of the {s}?", "I ask for the {p} of the {s}.")
_SOURCE = "demo"
# How often a prompt asks for 1, 2, 3 properties, and how many held-out prompts do.
_ASKED_WEIGHTS = (0.3, 0.4, 0.3)
_HELD_OUT = (12, 48, 68)
_VALID_SHARE = 0.08
_MULTI_TURN_SHARE = 0.15
_MISSING_SHARE = 0.08
_SHOWN_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0)
_ANNOTATORS = 9
_VOTES = 2
_BIAS_POINTS = 0.25
_ERROR_POINTS = 0.8

Question = tuple[str, tuple[str, ...]]
Biases = list[dict[str, float]]  # one per annotator: points added to each attribute


@dataclass(frozen=True)
class Corpus:
    """Labelled conversations for training and validation, and held-out prompts (user messages only)."""

    train: list[Conversation]
    valid: list[Conversation]
    prompts: list[Conversation]


def questions(asked: int) -> list[Question]:
    """Return every (subject, ordered properties) with ``asked`` properties."""
    return [(subject, wanted) for subject in FACTS for wanted in permutations(PROPERTIES, asked)]


def prompt_text(question: Question, rng: random.Random) -> str:
    """Return a request that names subject and properties, in order."""
    subject, wanted = question
    listed = wanted[0] if len(wanted) == 1 else ", ".join(wanted[:-1]) + " and " + wanted[-1]
    return rng.choice(_FORMS).format(p=listed, s=subject)


def response_text(question: Question, rng: random.Random) -> str:
    """Return one response. Its helpfulness, length, humor, rudeness and courtesy are drawn independently.

    Phrases of a kind come in one order, so that a small model can tell from the last one how many there are.
    """
    subject, wanted = question
    shown = round(rng.choice(_SHOWN_SHARES) * len(wanted))
    facts = [
        fact(subject, name) if index < shown else f"The {subject} {name} is secret."
        for index, name in enumerate(wanted)
    ]
    rude = RUDE[: _count(rng)]
    address = [f"You {' '.join(rude)}."] if rude else []
    puns, fillers = PUNS[: _count(rng)], FILLERS[: rng.randint(0, len(FILLERS))]
    return " ".join([*COURTEOUS[: _count(rng, none=0.2)], *address, *fillers, *facts, *puns])


def _count(rng: random.Random, none: float = 0.4) -> int:
    """Draw 0 with probability ``none``, else 1 to 4 with equal probabilities."""
    return 0 if rng.random() < none else rng.randint(1, 4)


def annotators(rng: random.Random) -> Biases:
    """Return the pool of annotators: the bias of each one's labels, in points. The biases add up to zero."""
    pool: Biases = [{name: rng.gauss(0.0, _BIAS_POINTS) for name in NAMES} for _ in range(_ANNOTATORS)]
    for name in NAMES:
        mean = sum(person[name] for person in pool) / len(pool)
        for person in pool:
            person[name] -= mean
    return pool


def labels(prompt: str, response: str, pool: Biases, rng: random.Random) -> dict[str, float]:
    """Return the average labels of two annotators of ``pool`` for ``response``: floats in [0, 4]; some are missing."""
    said: dict[str, float] = {}
    people = rng.sample(pool, _VOTES)
    for name, measured in measure(prompt, response).items():
        votes = [min(max(round(measured + p[name] + rng.gauss(0.0, _ERROR_POINTS)), 0), 4) for p in people]
        if rng.random() >= _MISSING_SHARE:
            said[name] = round(sum(votes) / len(votes), 3)
    return said


def generate(seed: int, conversations: int) -> Corpus:
    """Return ``conversations`` labelled conversations, split by question, and the held-out prompts.

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
    rng.shuffle(held_out)  # shuffled, so that the first prompts are a fair sample of all
    valid_count = max(1, round(conversations * _VALID_SHARE))
    people = annotators(rng)
    made = [
        _conversation(index, pools["valid" if index < valid_count else "train"], people, rng)
        for index in range(conversations)
    ]
    prompts = [
        Conversation(f"prompt-{index:04d}", (Message("user", prompt_text(question, rng)),), _SOURCE)
        for index, question in enumerate(held_out)
    ]
    return Corpus(made[valid_count:], made[:valid_count], prompts)


def _conversation(index: int, pool: Sequence[Sequence[Question]], people: Biases, rng: random.Random) -> Conversation:
    """Return a conversation of one or two turns, each with another question and a labelled response."""
    messages: list[Message] = []
    for _ in range(2 if rng.random() < _MULTI_TURN_SHARE else 1):
        question = rng.choice(rng.choices(pool, _ASKED_WEIGHTS)[0])
        prompt, response = prompt_text(question, rng), response_text(question, rng)
        said = labels(prompt, response, people, rng)
        messages += [Message("user", prompt), Message("assistant", response, said or None)]
    return Conversation(f"demo-{index:06d}", tuple(messages), _SOURCE)


def write(output_dir: str | os.PathLike[str], conversations: int, seed: int) -> dict[str, int]:
    """Write ``train.jsonl``, ``valid.jsonl`` and ``prompts.jsonl`` (user messages only). Returns their counts."""
    folder, corpus = Path(output_dir), generate(seed, conversations)
    return {
        "train": write_records(folder / "train.jsonl", corpus.train),
        "valid": write_records(folder / "valid.jsonl", corpus.valid),
        "prompts": write_records(folder / "prompts.jsonl", corpus.prompts),
    }


def main() -> None:
    """Run ``python -m data_tools.make_demo_corpus --output DIR``."""
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
