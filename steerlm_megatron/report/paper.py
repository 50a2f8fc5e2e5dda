"""Figures of the paper that a report shows beside its own (arXiv 2310.05344).

Owns: the numbers as printed. Does not own: which of our rows they stand beside (``words.py``, ``page.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Table 3, its rows in order: a 43-billion-parameter model on the 80 prompts of Vicuna, judged by GPT-4: the sum of the
# model's scores as a percentage of that of ChatGPT 3.5, and the difference from the row before. The paper adds one
# thing after the other; its rows "+ HQ OASST" (98.1) and "+ HH-RLHF / M-SID" (103.7) have no row here.
TABLE_3: Mapping[str, Mapping[str, Any]] = {
    "sft": {"row": "Baseline (SFT)", "percent": 79.7, "gain": None},
    "human": {"row": "+ human-annotated attributes", "percent": 96.2, "gain": 16.5},
    "predicted": {"row": "+ attribute prediction model", "percent": 102.7, "gain": 4.6},
    "bootstrapped": {"row": "+ bootstrapping on HQ samples", "percent": 104.2, "gain": 0.5},
}
