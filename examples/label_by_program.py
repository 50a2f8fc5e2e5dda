"""Label the responses of conversation records with attributes of your own, which a program measures.

    python examples/label_by_program.py texts/train.jsonl labelled.jsonl

Replace ``RATINGS`` by what you care about: a word list as here, a library, or a call of a large model. Ratings by
people go into the same place, ``attributes`` of a message.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from steerlm_megatron.steer.records import Conversation, read_records, write_records

TOP = 5.0  # max_level of examples/politeness.yaml
KIND = ("sure", "gladly", "certainly", "cheers", "thanks", "welcome")
RUDE = ("goof", "dolt", "twit", "oaf", "dummy", "grump", "nitwit", "silly")


def words(text: str) -> list[str]:
    return [word.strip(".,!?") for word in text.lower().split()]


def politeness(text: str) -> float:
    """Return 1 for a text without a kind or rude word, 1 more for each kind word, 1 less for each rude one."""
    return 1.0 + sum(word in KIND for word in words(text)) - sum(word in RUDE for word in words(text))


def brevity(text: str) -> float:
    """Return 5 for up to 12 words, and 1 less for each 8 words more."""
    return TOP - (len(words(text)) - 12) / 8


RATINGS: Mapping[str, Callable[[str], float]] = {"politeness": politeness, "brevity": brevity}


def rated(records: Iterator[Conversation]) -> Iterator[Conversation]:
    """Yield the records with the ratings of each response, clipped to the scale, in the place of other labels."""
    for record in records:
        messages = tuple(
            replace(
                message, attributes={name: min(max(rate(message.content), 0.0), TOP) for name, rate in RATINGS.items()}
            )
            if message.role == "assistant"
            else message
            for message in record.messages
        )
        yield replace(record, messages=messages)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("input", type=Path, help="conversation records")
    parser.add_argument("output", type=Path)
    options = parser.parse_args(arguments)
    count = write_records(options.output, rated(read_records(options.input)))
    print(f"{count} conversations labelled with {' '.join(RATINGS)}: {options.output}")


if __name__ == "__main__":
    main()
