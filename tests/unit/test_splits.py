"""Conversations are assigned to the same split in every version, and all answers to a prompt to one split."""

from __future__ import annotations

import pytest

from steerlm_megatron.steer.messages import Message
from steerlm_megatron.steer.records import Conversation
from steerlm_megatron.steer.splits import assign_split


def conversation(prompt: str | None, reply: str = "Yes.", name: str = "7") -> Conversation:
    asked = [] if prompt is None else [Message("user", prompt)]
    return Conversation(name, (Message("system", "Be kind."), *asked, Message("assistant", reply)))


def test_shares_and_sides_are_those_of_the_first_version() -> None:
    """A changed rule would mix the validation set of a corpus that was split earlier into its training set."""
    said = "".join(assign_split(conversation(f"prompt {i}"), 0.25, 17)[0] for i in range(60))
    assert said == "ttvtvttttvtttttvttvttttvttttvtttttttttvtvvtvtttttttvttttvttt"
    dealt = [assign_split(conversation(f"p{i}"), 0.1, 3) for i in range(5000)]
    assert 0.08 < dealt.count("valid") / 5000 < 0.12


def test_a_prompt_is_on_one_side_and_an_id_stands_for_a_missing_one() -> None:
    for i in range(40):
        sides = {assign_split(conversation(f"p{i}", reply, name), 0.5, 1) for reply, name in (("a", "1"), ("b", "2"))}
        assert len(sides) == 1
        assert assign_split(conversation(None, name=f"p{i}"), 0.5, 1) in sides


@pytest.mark.parametrize("seed", [0, 1])
def test_without_a_fraction_all_are_for_training(seed: int) -> None:
    assert {assign_split(conversation(f"p{i}"), 0.0, seed) for i in range(200)} == {"train"}
