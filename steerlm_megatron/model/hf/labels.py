"""What ``config.json`` of a classifier says of its values.

Owns: the labels' names, what we write there of our own, and which classifiers give values at all. Does not own: the
model's shape (``config_json.py``), what values mean (``steer/attributes.py``).

``transformers`` has no place for what a value's scale is, or for a head's bias. Both stand in a section of our own,
``steerlm``, which it keeps as it keeps every key that it does not know.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SECTION = "steerlm"
_LABELS_BY_DEFAULT = 2  # of ``PretrainedConfig`` without any key that says it


@dataclass(frozen=True)
class Labels:
    """The values that a classifier gives.

    Args:
        names: one for each value, in order; ``LABEL_0``, … where nobody named them.
        bias: what is to be added to them, since no class for sequence classification has a bias; None: nothing.
    """

    names: tuple[str, ...]
    bias: tuple[float, ...] | None = None


def labels_of(config: Mapping[str, Any], count: int | None = None) -> tuple[Labels, list[str]]:
    """The values that a classifier's ``config.json`` describes, and what of it is not understood.

    Args:
        count: how many there are, where the class says it in its own way.
    """
    problems: list[str] = []
    kind = config.get("problem_type")
    if kind not in (None, "regression"):
        problems.append(f"problem_type={kind}: its outputs are scores of classes, and not values")
    names = _names(config, problems)
    if count is not None and len(names) != count:
        names = unnamed(count)
    if len(set(names)) != len(names):
        problems.append(f"id2label has one name for several labels: {' '.join(names)}")
    section = config.get(SECTION)
    bias = section.get("head_bias") if isinstance(section, Mapping) else None
    if bias is None:
        return Labels(tuple(names)), problems
    if not isinstance(bias, list) or len(bias) != len(names) or not all(map(_finite, bias)):
        problems.append(f"{SECTION}.head_bias is not a list of {len(names)} numbers, one for each label")
        return Labels(tuple(names)), problems
    return Labels(tuple(names), tuple(float(value) for value in bias)), problems


def unnamed(count: int) -> list[str]:
    """What ``transformers`` calls so many labels that nobody named."""
    return [f"LABEL_{number}" for number in range(count)]


def _names(config: Mapping[str, Any], problems: list[str]) -> list[str]:
    found = config.get("id2label")
    if found is None:
        count = config.get("num_labels", _LABELS_BY_DEFAULT)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            problems.append(f"num_labels={count!r} is not a whole number above 0")
            return []
        return unnamed(count)
    if not isinstance(found, Mapping) or sorted(map(str, found)) != sorted(map(str, range(len(found)))) or not found:
        problems.append("id2label is not an object from the numbers 0, 1, … to names")
        return []
    by_number = {int(number): name for number, name in found.items()}
    return [str(by_number[number]) for number in range(len(by_number))]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def classifier_keys(names: Sequence[str]) -> dict[str, Any]:
    """The keys of ``config.json`` by which ``transformers`` builds a classifier with these labels."""
    return {
        "problem_type": "regression",
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }
