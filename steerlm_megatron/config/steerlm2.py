"""Keys of SteerLM 2.0 (arXiv 2406.08673 §4.5).

Owns: the section ``steerlm2``. Does not own: what the keys do (``stages/weigh.py``, ``train/group_objective.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

from steerlm_megatron.config.fields import above, at_least, one_of, option


@dataclass
class Steerlm2Config:
    """SteerLM 2.0: training on weighted groups of responses (docs/steerlm2.md)."""

    iterations: int = option(
        0, at_least(0), "run: how often to sample, weigh and train after acsft; 0: SteerLM 2.0 is left out"
    )
    responses: int = option(10, at_least(2), "run: responses to a prompt that are weighed against each other")
    base: str | None = option(
        None, "weigh: run folder or checkpoint of the plain SFT model that gives P(response | prompt)"
    )
    attributes: list[str] = option([], "weigh: attributes in P(attributes | response); empty: all that were asked for")
    concentration: float = option(
        24.0, above(0), "weigh: alpha + beta of the beta distribution of a label around its prediction"
    )
    bins: str = option(
        "nearest", one_of("nearest", "equal"),
        "weigh: a level's part of the scale: what rounds to it, or one of as many equal parts as there are levels",
    )  # fmt: skip
    normalize: str = option(
        "none", one_of("none", "tokens"),
        "train_sft: tokens divides a group's loss by its mean number of response tokens, as NeMo-Aligner does",
    )  # fmt: skip
