"""The measure ``shift``: how far training has moved a model from the one that it began with.

Owns: the divergence and its intervals. Does not own: drawing responses and their log-probabilities
(``stages/evaluate_shift.py``). Invariant: the divergence is estimated on responses that were drawn from the later model
at temperature 1 without truncation, from whose own distribution it is defined.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from steerlm_megatron.evaluate.intervals import Resamples
from steerlm_megatron.evaluate.needs import SHIFTS
from steerlm_megatron.evaluate.protocol import Material, Need, Section, Shift


class Shifts:
    """KL(model ‖ model before) at the best levels, per response and per token, in nats."""

    name = "shift"
    version = 1
    needs: tuple[Need, ...] = (SHIFTS,)

    def run(self, material: Material) -> Section:
        """See :class:`Measure`."""
        rows = [{"model": name, **_row(shift)} for name, shift in material.shifts.items()]
        return {
            "title": "Divergence from the model before",
            "words": [
                "KL(model ‖ before) = E[log P_model(y | x) − log P_before(y | x)] over responses y that the model "
                f"draws at temperature 1 at its best levels, {material.config.evaluate.shift_samples} to each prompt; "
                "responses that reached sampling.max_tokens are left out. In nats; per token: over the responses' "
                "tokens together. Intervals are 95 %, by a bootstrap over prompts. A model that is far from the one "
                "before may have learned much or forgotten much: look at quality and variety beside it."
            ],
            "rows": rows,
            "summary": [[f"{row['model']} from {row['before']}, nats a response", row["response"]] for row in rows],
            "tables": [
                {
                    "title": "Divergence",
                    "columns": ["model", "before", "nats a response", "nats a token", "responses", "left out"],
                    "rows": [
                        [row[key] for key in ("model", "before", "response", "token", "n", "cut")] for row in rows
                    ],
                }
            ],
        }


def _row(shift: Shift) -> dict[str, Any]:
    samples, prompts = shift.logprob_SP.shape
    whole = ~np.isnan(shift.logprob_SP) & ~np.isnan(shift.before_SP)
    difference = np.where(whole, shift.logprob_SP - shift.before_SP, np.nan).ravel()
    tokens = np.where(whole, shift.tokens_SP, 0.0).ravel()
    draws = Resamples(np.tile(np.arange(prompts), samples))
    sums, counts = draws.sums(np.nan_to_num(difference)), draws.sums(tokens)
    total = float(tokens.sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        per_token = np.where(counts > 0, sums / counts, np.nan)
    n = int(whole.sum())
    return {
        "before": shift.before,
        "response": draws.mean(difference),
        "token": draws.figure(float(np.nansum(difference)) / total if total else float("nan"), per_token, n),
        "n": n,
        "cut": int(whole.size - n),
    }
