"""The measure ``best_of``: the best of n responses by the attribute-prediction model, another way to spend compute.

Owns: which response is taken, and what it gains. Does not own: drawing the responses. Invariants: the first k of the n
responses stand for best-of-k, so that every k is of the same draws, and best-of-1 is the model's usual response; what
is taken is chosen by the attribute-prediction model alone, whoever measures it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from steerlm_megatron.evaluate.intervals import Floats, Resamples, verdict
from steerlm_megatron.evaluate.needs import SAMPLES
from steerlm_megatron.evaluate.protocol import Material, Need, Samples, Section
from steerlm_megatron.evaluate.quality import values_of


class BestOf:
    """Quality of the best of 1, 2, 4, … n responses, by every judge."""

    name = "best_of"
    version = 1
    needs: tuple[Need, ...] = (SAMPLES,)

    def run(self, material: Material) -> Section:
        """See :class:`Measure`."""
        draws = Resamples(range(len(material.prompts)))
        able = [name for name, judge in material.judges.items() if material.quality in judge.measured]
        rows = [
            {"model": model, "judge": judge, **row}
            for model, samples in material.samples.items()
            for judge in able
            for row in _rows(draws, samples, judge, material.quality)
        ]
        words = [
            "Of n responses to a prompt the one that the attribute-prediction model gives the highest "
            f"{material.quality} is taken. The first is drawn as in all other measures, the others at temperature "
            f"{material.config.evaluate.best_of_temperature:g}. Gain: its mean {material.quality} minus that of the "
            "first response, on the same prompts; tokens: drawn per prompt. Intervals are 95 %, by a "
            "bootstrap over prompts."
        ]
        if "ap" in able:
            words.append(
                "Measured by ap, the gain is of the model that chose, and so the most that can be hoped for: another "
                "judge says how much of it is real."
            )
        return {
            "title": "Best of n by the attribute-prediction model",
            "words": words,
            "rows": rows,
            "summary": [
                [f"{row['model']}, best of {row['n']} by {row['judge']}, gain", row["gain"]]
                for row in rows
                if row["n"] == material.config.evaluate.best_of and row["judge"] == able[0]
            ],
            "tables": [
                {
                    "title": f"{material.quality} of the best of n",
                    "columns": ["model", "judge", "n", material.quality, "gain", "is", "tokens"],
                    "rows": [
                        [row[key] for key in ("model", "judge", "n", "quality", "gain", "verdict", "tokens")]
                        for row in rows
                    ],
                }
            ],
        }


def sizes(n: int) -> list[int]:
    """Return 1, 2, 4, … up to ``n``, and ``n``."""
    return sorted({2**power for power in range(n.bit_length()) if 2**power <= n} | {n})


def _rows(draws: Resamples, samples: Samples, judge: str, quality: str) -> list[dict[str, Any]]:
    values_NP = np.stack([values_of(measured, quality) for measured in samples.measured[judge]])
    tokens_NP = np.array(samples.tokens, dtype=np.float64)
    rows: list[dict[str, Any]] = []
    for n in sizes(len(values_NP)):
        taken = best(samples.scores_NP[:n], values_NP[:n])
        gain = draws.mean(taken - values_NP[0])
        rows.append(
            {
                "n": n,
                "quality": draws.mean(taken),
                "gain": gain,
                "verdict": "–" if n == 1 else verdict(gain),
                "tokens": draws.mean(tokens_NP[:n].sum(axis=0)),
            }
        )
    return rows


def best(scores_NP: Floats, values_NP: Floats) -> Floats:
    """Return [prompts] the value of the response with the highest score; of equal scores the first."""
    return np.take_along_axis(values_NP, scores_NP.argmax(axis=0)[None], axis=0)[0]
