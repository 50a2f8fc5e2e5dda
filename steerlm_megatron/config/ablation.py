"""Keys of an ablation: which models are compared, over which seeds.

Owns: the section ``ablation``. Does not own: what each row is (``stages/ablation_steps.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

from steerlm_megatron.config.fields import between, each_of, option

ROWS = ("sft", "human", "predicted", "bootstrapped", "generative", "shuffled", "partial")  # in the order of the table


@dataclass
class AblationConfig:
    """run: models that differ in one thing each, trained and measured over several seeds."""

    rows: list[str] = option(
        [], each_of(*ROWS), "models to compare (docs/ablation.md); empty: no ablation, but the four steps once"
    )
    seeds: list[int] = option([1, 2, 3], "each row is trained, and its responses are drawn, once with each of these")
    partial: float = option(0.5, between(0, 1), "share of its labels that a response keeps in the row partial")
