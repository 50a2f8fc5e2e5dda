"""Responses for the measure ``shift``, and their log-probabilities under two models.

Owns: drawing them. Does not own: the divergence (``evaluate/shift.py``), log-probabilities (``log_probabilities.py``).
Invariant: responses are drawn from the model's own distribution: at temperature 1, without top-k and top-p.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from steerlm_megatron.data.views import View
from steerlm_megatron.evaluate.intervals import Floats
from steerlm_megatron.evaluate.needs import models_of, shifts_of
from steerlm_megatron.evaluate.protocol import Levels, Shift
from steerlm_megatron.stages.log_probabilities import log_probabilities_of_all
from steerlm_megatron.stages.sampling import Drawn, Prompt, draw, open_drawing, opened_sampler, request_for
from steerlm_megatron.stages.session import Session, load_model
from steerlm_megatron.steer.records import Conversation, Message


def journal_of_shift(name: str) -> str:
    """Return the journal's name for the responses of the model ``name``."""
    return f"{name}-shift"


def draw_shifts(here: Session, prompts: Sequence[Conversation], best: Mapping[str, Levels | None]) -> dict[str, Shift]:
    """Return for each model whose model before is there as well its responses to ``prompts``, with what both give them.
    Collective over the world.

    Args:
        best: model → its best levels; None for one that takes none.
    """
    found = {}
    for name, before in shifts_of(here.config).items():
        drawn = _draw(here, prompts, best[name], name)
        own, other = (_values(here, one, prompts, drawn, best[name]) for one in (name, before))
        tokens = np.array([one.tokens for one in drawn], np.float64).reshape(-1, len(prompts))
        found[name] = Shift(before, own, other, tokens)
    return found


def _draw(here: Session, prompts: Sequence[Conversation], levels: Levels | None, name: str) -> list[Drawn]:
    """Return responses of the model ``name``: the first to each prompt, then the second to each, and so on."""
    config = here.config
    loaded = open_drawing(config, models_of(config)[name], f"evaluate.models.{name}")
    sampling = replace(config.sampling, temperature=1.0, top_k=0, top_p=1.0)
    asked = [
        Prompt(f"shift/{sample}/{number}", prompt.messages, levels, prompt.id)
        for sample in range(config.evaluate.shift_samples)
        for number, prompt in enumerate(prompts)
    ]
    requests = [request_for(i, one, loaded, sampling, config.generation) for i, one in enumerate(asked)]
    with opened_sampler(here, loaded) as sampler:
        drawn = draw(here, loaded, sampler, requests, journal_of_shift(name), f"evaluate {name}, divergence")
    loaded.free()
    return drawn


def _values(
    here: Session, name: str, prompts: Sequence[Conversation], drawn: Sequence[Drawn], levels: Levels | None
) -> Floats:
    """Return [samples, prompts] the log-probability of responses under the model ``name``; NaN where one was cut, since
    the model did not end it there, or is too long for the model.
    """
    config = here.config
    view: View = "sft" if levels is None else "acsft"
    asked = None if levels is None else {attribute: float(level) for attribute, level in levels.items()}
    whole = [
        Conversation(prompt.id, (*_context(prompt), Message("assistant", one.text, asked)))
        for prompt, one in zip(list(prompts) * (len(drawn) // len(prompts)), drawn, strict=True)
    ]
    loaded = load_model(models_of(config)[name], config, f"evaluate.models.{name}", head="lm")
    values = log_probabilities_of_all(loaded, whole, view, config.scoring.batch_tokens, here.cost)
    loaded.free()
    found = [
        np.nan if value is None or one.finish_reason == "length" else value
        for value, one in zip(values, drawn, strict=True)
    ]
    return np.array(found, np.float64).reshape(-1, len(prompts))


def _context(prompt: Conversation) -> tuple[Message, ...]:
    """Return a prompt's messages, of which none is trained."""
    return tuple(replace(m, weight=0) if m.role == "assistant" else m for m in prompt.messages)
