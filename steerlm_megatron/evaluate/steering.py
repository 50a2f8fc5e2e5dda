"""The measure ``steering``: what asking for a level does to the attribute itself, to the others, and to quality.

Owns: curves, their monotonicity and range, the cross-talk matrix, combinations, each with intervals. Does not own: who
measured (the judges), plots (``report``). Invariant: intervals are of draws of prompts; all levels of a draw are of the
same prompts, so that what makes a prompt special cancels out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steerlm_megatron.evaluate.intervals import NAN, Floats, Resamples, verdict
from steerlm_megatron.evaluate.needs import STEERED
from steerlm_megatron.evaluate.protocol import Judge, Material, Need, Section, Steered


class Curves:
    """The steering curves of one model, as one judge measured them."""

    def __init__(self, steered: Steered, judge: str) -> None:
        self.steered = steered
        self.rows = steered.measured[judge]
        self.draws = Resamples(range(len(self.rows[0])))

    def requested(self, asked: str) -> list[int]:
        """Return the levels of the curve of an attribute, ascending."""
        return [self.steered.asks[place][asked] for place in self.steered.curves[asked]]

    def values(self, places: Sequence[int], name: str) -> Floats:
        """Return [requests, prompts] what was measured of ``name``; NaN where the judge gave no value."""
        return np.array([[one.get(name, NAN) for one in self.rows[place]] for place in places], dtype=np.float64)

    def measured(self, asked: str, name: str) -> Floats:
        """Return [levels, prompts] what was measured of ``name`` on the curve of ``asked``."""
        return self.values(self.steered.curves[asked], name)

    def means(self, asked: str, name: str) -> tuple[Floats, Floats]:
        """Return the means [levels] of ``name`` on the curve of ``asked``, and those of each draw [draws, levels]."""
        values = self.measured(asked, name)
        return _nanmean(values), self.draws.means(values.T)

    def standing_for(self, asked: str, judge: Judge, attributes: Mapping[str, str]) -> list[str]:
        """Return what of the judge's measures is of the attribute ``asked``: the one of that name, and those that
        ``attributes`` (``evaluate.judge_attributes``) maps to it.
        """
        return [name for name in judge.measured if name == asked or attributes.get(name) == asked]

    def mean_bounds(self, asked: str, name: str) -> tuple[Floats, Floats]:
        """Return the bounds [levels] of the intervals of the means."""
        return self.draws.bounds(self.means(asked, name)[1])

    def slope(self, asked: str, name: str) -> dict[str, Any]:
        """Return how far ``name`` rises per level that is asked of ``asked``: the slope of the least-squares line
        through the means of the curve.
        """
        levels = np.array(self.requested(asked), dtype=np.float64)
        means, drawn = self.means(asked, name)
        return self.draws.figure(float(_slopes(levels, means)), _slopes(levels, drawn))

    def monotonicity(self, asked: str, name: str) -> dict[str, Any]:
        """Return ``spearman`` (of level and mean), ``in_order`` (share of neighbouring levels whose means rise) and
        ``range`` (highest mean minus lowest) of what was measured of ``name`` on the curve of ``asked``, with
        intervals.
        """
        levels = np.array(self.requested(asked), dtype=np.float64)
        means, drawn = self.means(asked, name)
        pick = self.draws.figure
        return {
            "spearman": pick(float(_spearmans(levels, means)), _spearmans(levels, drawn)),
            "in_order": pick(float(_in_order(means)), _in_order(drawn)),
            "range": pick(float(np.ptp(means)), np.ptp(drawn, axis=-1)),
        }

    def change(self, asked: str, name: str) -> list[dict[str, Any]]:
        """Return per level of the curve of ``asked`` how far the mean of ``name`` is from its mean at the best levels,
        with the interval of the paired difference.
        """
        base = self.values([0], name)[0]
        return [self.draws.mean(row - base) for row in self.measured(asked, name)]


def _nanmean(values: Floats) -> Floats:
    """Return means over the last axis, NaN where there is no value."""
    counts = np.count_nonzero(~np.isnan(values), axis=-1)
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, np.nansum(values, axis=-1) / counts, NAN)


def _slopes(levels: Floats, means: Floats) -> Floats:
    """Return the least-squares slope of ``means`` [..., levels] over ``levels``; NaN for fewer than two levels."""
    if len(levels) < 2:
        return np.full(means.shape[:-1], NAN)
    from_mean = levels - levels.mean()
    return np.asarray(means @ from_mean / (from_mean @ from_mean))


def _spearmans(levels: Floats, means: Floats) -> Floats:
    """Return the rank correlation of ``means`` [..., levels] with ``levels``; NaN where all means are equal."""
    first, second = _ranks(np.broadcast_to(levels, means.shape)), _ranks(means)
    first, second = first - first.mean(-1, keepdims=True), second - second.mean(-1, keepdims=True)
    scale = np.sqrt((first**2).sum(-1) * (second**2).sum(-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, (first * second).sum(-1) / scale, NAN)


def _ranks(values: Floats) -> Floats:
    """Return ranks over the last (short) axis, where equal values share their mean rank."""
    one, other = values[..., :, None], values[..., None, :]
    ranks = (one > other).sum(-1) + ((one == other).sum(-1) + 1) / 2.0
    return np.where(np.isnan(values), NAN, ranks)


def _in_order(means: Floats) -> Floats:
    """Return the share of neighbouring levels whose means rise; NaN for fewer than two levels."""
    if means.shape[-1] < 2:
        return np.full(means.shape[:-1], NAN)
    return np.asarray((np.diff(means, axis=-1) > 0).mean(-1))


class Steering:
    """Curves by every judge, monotonicity, range, cross-talk, quality kept, and combinations."""

    name = "steering"
    version = 1
    needs: tuple[Need, ...] = (STEERED,)

    def run(self, material: Material) -> Section:
        """See :class:`Measure`."""
        steered = material.steered
        assert steered is not None
        judges = {
            name: _of_judge(Curves(steered, name), judge, material.quality, material.config.evaluate.judge_attributes)
            for name, judge in material.judges.items()
        }
        combinations = {name: _combinations(Curves(steered, name), judge) for name, judge in material.judges.items()}
        return {
            "title": f"Steering of {steered.model}, by every judge",
            "words": [
                f"Responses to {len(material.prompts)} held-out prompts, one attribute varied at a time, the others at "
                "their best levels. Intervals are 95 %, by a bootstrap over prompts.",
                "Slope: how far the measured mean rises per level that is asked for; 1 is exact on the attribute's own "
                "scale, and an interval that includes zero means that no effect is told apart from none. The range is "
                "of means, of which the highest is above the lowest by chance alone, so its interval cannot include "
                "zero.",
            ],
            "model": steered.model,
            "prompts": len(material.prompts),
            "judges": judges,
            "combinations": combinations,
            "summary": _summary(judges),
            "tables": [*_tables(judges, material.quality), *_combination_tables(combinations)],
        }  # fmt: skip


def _of_judge(curves: Curves, judge: Judge, quality: str, attributes: Mapping[str, str]) -> dict[str, Any]:
    """Return ``curves`` (attribute → its means by level, and what :meth:`Curves.monotonicity` says), ``cross_talk``
    (asked → measured → slope) and ``quality`` (asked → change of quality by level).

    A measure of another name that stands for an attribute (``attributes``) has a curve named ``attribute (measure)``.
    """
    asked = list(curves.steered.curves)
    found: dict[str, Any] = {"curves": {}, "cross_talk": {}, "quality": {}}
    for name in asked:
        found["cross_talk"][name] = {other: curves.slope(name, other) for other in judge.measured}
        for measure in curves.standing_for(name, judge, attributes):
            rows = curves.measured(name, measure)
            found["curves"][name if measure == name else f"{name} ({measure})"] = {
                "attribute": name,
                "measure": measure,
                "requested": curves.requested(name),
                "measured": [curves.draws.mean(row) for row in rows],
                **curves.monotonicity(name, measure),
            }
        if quality in judge.measured and name != quality:
            found["quality"][name] = {
                "requested": curves.requested(name),
                "change": curves.change(name, quality),
            }
    return found


def _combinations(curves: Curves, judge: Judge) -> list[dict[str, Any]]:
    """Return per requested combination its levels, and the mean of all that the judge measures."""
    return [
        {
            "asked": dict(curves.steered.asks[place]),
            "measured": {name: curves.draws.mean(curves.values([place], name)[0]) for name in judge.measured},
        }
        for place in curves.steered.combinations
    ]


def _tables(judges: Mapping[str, Mapping[str, Any]], quality: str) -> list[dict[str, Any]]:
    monotone = [
        [judge, name, row["spearman"], row["in_order"], row["range"], slope, verdict(slope)]
        for judge, found in judges.items()
        for name, row in found["curves"].items()
        for slope in [found["cross_talk"][row["attribute"]][row["measure"]]]
    ]  # fmt: skip
    levels = [
        [judge, name, level, mean, mean["n"]]
        for judge, found in judges.items()
        for name, row in found["curves"].items()
        for level, mean in zip(row["requested"], row["measured"], strict=True)
    ]
    kept = [
        [judge, name, level, change, verdict(change)]
        for judge, found in judges.items()
        for name, row in found["quality"].items()
        for level, change in zip(row["requested"], row["change"], strict=True)
    ]
    tables: list[dict[str, Any]] = [
        {
            "title": "Does each attribute follow?",
            "columns": ["judge", "attribute", "Spearman", "neighbours in order", "range", "slope", "slope is"],
            "rows": monotone,
        },
        {
            "title": "Measured mean by level",
            "columns": ["judge", "attribute", "level asked", "measured", "responses"],
            "rows": levels,
            "folded": True,
        },
    ]
    for judge, found in judges.items():
        measured = list(next(iter(found["cross_talk"].values()), {}))
        tables.append(
            {
                "title": f"Cross-talk, measured by {judge}",
                "words": ["Slope of each measured attribute (columns) per level asked of one attribute (rows)."],
                "columns": ["asked", *measured],
                "rows": [[name, *(row[other] for other in measured)] for name, row in found["cross_talk"].items()],
                "folded": True,
            }
        )
    if kept:
        tables.append(
            {
                "title": f"Change of {quality} while another attribute is steered",
                "words": [f"Mean {quality} minus that at the best levels, on the same prompts."],
                "columns": ["judge", "attribute", "level asked", f"change of {quality}", "is"],
                "rows": kept,
                "folded": True,
            }
        )
    return tables


def _summary(judges: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    """Return per judge the strongest cross-talk between attributes that the model can be asked for."""
    found: list[list[Any]] = []
    for judge, one in judges.items():
        slopes = [
            (asked, other, slope)
            for asked, row in one["cross_talk"].items()
            for other, slope in row.items()
            if other != asked and other in one["cross_talk"] and verdict(slope) in ("above", "below")
        ]
        if slopes:
            asked, other, slope = max(slopes, key=lambda each: abs(each[2]["value"]))
            found.append([f"strongest cross-talk by {judge}: {asked} moves {other} per level", slope])
    return found


def _combination_tables(combinations: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    tables: list[dict[str, Any]] = []
    for judge, rows in combinations.items():
        if rows:
            measured = list(rows[0]["measured"])
            asked = [", ".join(f"{name} {level}" for name, level in row["asked"].items()) for row in rows]
            tables.append(
                {
                    "title": f"Combinations, measured by {judge}",
                    "columns": ["asked", *measured],
                    "rows": [
                        [text, *(row["measured"][name] for name in measured)]
                        for text, row in zip(asked, rows, strict=True)
                    ],
                }
            )
    return tables
