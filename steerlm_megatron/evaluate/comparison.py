"""Two runs or more side by side: quality, steering and attribute prediction, and their differences from the first run.

Owns: which responses of two runs are pairs, the differences with their intervals, and the sections in which a report
shows them. Does not own: reading run folders (``stages/report_runs.py``), the configurations that differ, the page.
Invariants: a difference is paired only over prompts that both runs answered; values of different judges are never
subtracted from each other; what one of two runs lacks is named and never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from steerlm_megatron.evaluate.intervals import NAN, Resamples, figure, verdict
from steerlm_megatron.evaluate.protocol import Section

_PAIRED_SHARE = 0.5  # of the smaller number of prompts, that both runs must have answered for paired differences
Values = Mapping[str, float]  # prompt's id → value


@dataclass(frozen=True)
class Side:
    """What one of the compared runs measured.

    Args:
        name: what the report calls the run.
        evaluation: the content of its ``evaluation.json``; empty where it has none.
        responses: the lines of its ``responses.jsonl``; empty where it has none.
        prompts: id → text of the prompts that it answered; empty where the run did not keep them.
        own_judge: what tells the attribute-prediction model among the judges from that of another run; None where it
            is no judge.
        max_level: the highest level of the schema; None where nobody knows.
    """

    name: str
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    responses: Sequence[Mapping[str, Any]] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)
    own_judge: str | None = None
    max_level: int | None = None

    @cached_property
    def judges(self) -> dict[str, str]:
        """What reports call each judge → its name in ``responses``; the judge of ``measured`` comes first."""
        named = self.evaluation.get("judges") or {}
        first = self.evaluation.get("judge")
        return ({first: ""} if first else {}) | {words: name for name, words in named.items() if words != first}

    @property
    def quality(self) -> str:
        """The attribute by which models are compared."""
        return str(self.evaluation.get("quality_attribute") or "quality")

    def best(self, model: str) -> Mapping[str, int] | None:
        """Return the levels that a model was asked for at its best; None without attributes or responses."""
        return next((line["asked"] for line in self.responses if line["model"] == model and line["best"]), None)

    @cached_property
    def models(self) -> list[str]:
        """The models, in the order of training."""
        answered = dict.fromkeys(line["model"] for line in self.responses)
        return list(answered or self.evaluation.get("quality_detail") or ())

    def measured(self, line: Mapping[str, Any], judge: str) -> Mapping[str, float]:
        """Return what a judge, named as reports name it, measured of a response."""
        name = self.judges[judge]
        found: Mapping[str, float] = line["measured"] if not name else (line.get("judges") or {}).get(name, {})
        return found

    def at_best(self, judge: str) -> dict[tuple[str, str], dict[str, float]]:
        """Return of each model and measured attribute the value of each prompt's response at the best levels."""
        found: dict[tuple[str, str], dict[str, float]] = {}
        for line in self.responses:
            if line["best"]:
                for name, value in self.measured(line, judge).items():
                    if value is not None:
                        found.setdefault((line["model"], name), {})[line["prompt"]] = float(value)
        return found

    def slopes(self, judge: str) -> dict[str, dict[str, float]]:
        """Return per attribute with a curve the slope of the measured value per level asked, of each prompt that was
        measured at every level of the curve: of the line by least squares, whose mean over prompts is the slope of the
        means.
        """
        return {
            name: {prompt: slope(points) for prompt, points in by_prompt.items()}
            for name, by_prompt in self._points(judge).items()
        }

    def _points(self, judge: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
        points: dict[str, dict[str, dict[int, float]]] = {}
        for model in self.models:
            lines = [line for line in self.responses if line["model"] == model and line["asked"]]
            best: Mapping[str, int] = next((line["asked"] for line in lines if line["best"]), {})
            for line in lines:
                value = self.measured(line, judge)
                for name in curves_of(line["asked"], best):
                    if value.get(name) is not None:
                        of_prompt = points.setdefault(name, {}).setdefault(line["prompt"], {})
                        of_prompt[line["asked"][name]] = float(value[name])
        found = {}
        for name, by_prompt in points.items():
            levels = set().union(*by_prompt.values())
            whole = {prompt: sorted(one.items()) for prompt, one in by_prompt.items() if set(one) == levels}
            if len(levels) > 1 and whole:
                found[name] = whole
        return found


def labels(sides: Iterable[Side]) -> dict[str, str]:
    """Return what reports call a judge → its short name, as far as some run has it."""
    return {words: name for side in sides for name, words in (side.evaluation.get("judges") or {}).items()}


def curves_of(asked: Mapping[str, int], best: Mapping[str, int]) -> Iterable[str]:
    """Return the attributes whose curve a request is on: all others are asked for at their best level."""
    differing = [name for name in asked if asked[name] != best.get(name)]
    return differing if len(differing) == 1 else asked if not differing else ()


def slope(points: Sequence[tuple[int, float]]) -> float:
    """Return the slope of the line by least squares through points (level, value), of two levels or more."""
    x, y = (np.array(side, dtype=np.float64) for side in zip(*points, strict=True))
    centred = x - x.mean()
    return float(centred @ y / (centred @ centred))


def mean(values: Values) -> dict[str, Any]:
    """Return the mean over prompts with its interval."""
    return Resamples(range(len(values))).mean(np.array(list(values.values()), dtype=np.float64))


def unpaired(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figure ``second`` minus ``first``, as of samples that are independent of each other.

    The distances of both figures from their bounds are put together as a root of squares (MOVER: Zou and Donner,
    Construction of confidence intervals about effect measures, Statistics in Medicine 27(10), 2008). Where the samples
    are of the same prompts or labels, the interval is wider than a paired one.
    """
    a, low_a, high_a, b, low_b, high_b = (
        NAN if one.get(key) is None else float(one[key]) for one in (first, second) for key in ("value", "low", "high")
    )
    return figure(b - a, b - a - math.hypot(b - low_b, high_a - a), b - a + math.hypot(high_b - b, a - low_a))


def same_prompts(first: Side, second: Side) -> set[str]:
    """Return the ids of the prompts that both runs answered; the texts must be equal where both runs kept them."""
    ids = {line["prompt"] for line in first.responses} & {line["prompt"] for line in second.responses}
    if first.prompts and second.prompts:
        return {one for one in ids if one in first.prompts and first.prompts[one] == second.prompts.get(one)}
    return ids


def difference(first: Values, second: Values, same: set[str]) -> dict[str, Any]:
    """Return ``{difference, paired, verdict}`` of two runs' values: the second mean minus the first one.

    It is paired over the prompts in ``same`` where these are at least half of the smaller side's; else it is that of
    two independent samples. ``n`` of the difference is the number of pairs, None without.
    """
    common = [prompt for prompt in first if prompt in second and prompt in same]
    paired = bool(common) and len(common) >= _PAIRED_SHARE * min(len(first), len(second))
    if paired:
        found = mean({prompt: second[prompt] - first[prompt] for prompt in common})
    else:
        found = unpaired(mean(first), mean(second))
    return {"difference": found, "paired": paired, "verdict": verdict(found)}


def compare(sides: Sequence[Side]) -> dict[str, Any]:
    """Return what a report says of two runs or more.

    Returns:
        ``runs`` (their names), ``words`` (how the differences are to be read), ``sections`` (each as
        :class:`~steerlm_megatron.evaluate.protocol.Measure` describes one), ``quality``, ``steering`` and
        ``prediction`` (the differences from the first run: per entry ``run``, ``against``, what it is of,
        ``difference``, ``paired``, ``verdict``), and ``curves`` (attribute → run → curve).
    """
    first, others = sides[0], sides[1:]
    said = [*_of_prompts(first, others), *_of_judges(first, others), *_of_levels(first, others)]
    quality = [row for side in others for row in _quality(first, side)]
    steering = [row for side in others for row in _steering(first, side)]
    prediction = [row for side in others for row in _prediction(first, side)]
    names = dict.fromkeys(name for side in sides for name in side.evaluation.get("steering") or {})
    return {
        "runs": [side.name for side in sides],
        "words": said,
        "sections": [
            _section("Quality of the models, by run", (), _means(sides), quality, ("judge", "model", "measured")),
            _section("Steering, by run", _steered(sides), [_slopes(sides)], steering, ("judge", "attribute")),
            _section("Attribute prediction, by run", _OF_PREDICTION, [_errors(sides)], prediction, ("attribute",)),
        ],
        "quality": quality,
        "steering": steering,
        "prediction": prediction,
        "curves": {
            name: {
                s.name: s.evaluation["steering"][name] for s in sides if name in (s.evaluation.get("steering") or {})
            }
            for name in names
        },
    }


_OF_PREDICTION = (
    "Squared errors on each run's held-out labels; lower is better. Predictions of single responses are not kept, so "
    "these differences are not paired, and their intervals are wider than they need be.",
)


def _of_prompts(first: Side, others: Sequence[Side]) -> list[str]:
    """Say of each run whether it answered the same prompts as the first one."""
    said = [
        f"Differences are a run's figure minus that of {first.name}, with 95 % intervals over prompts. Not told apart: "
        "the interval includes zero. The intervals know nothing of the luck of a training: the same training with "
        "another seed may differ by more."
    ]
    counts = {side.name: len({line["prompt"] for line in side.responses}) for side in (first, *others)}
    for side in others:
        both, mine, its = len(same_prompts(first, side)), counts[side.name], counts[first.name]
        if not mine or not its:
            lacking = " and ".join(name for name in (side.name, first.name) if not counts[name])
            said.append(f"{lacking}: no responses were kept, so differences are not paired.")
            continue
        by_id = "" if side.prompts and first.prompts else " (by their ids: a run did not keep their texts)"
        if both >= _PAIRED_SHARE * min(mine, its):
            some = f"the same {both} prompts" if both == mine == its else f"{both} prompts in common ({mine} and {its})"
            said.append(f"{side.name} and {first.name} answered {some}{by_id}: differences are paired.")
        else:
            said.append(
                f"{side.name} and {first.name} answered other prompts ({mine} and {its}, {both} in common){by_id}: "
                "differences are not paired, which gives wider intervals."
            )
    return said


def _of_judges(first: Side, others: Sequence[Side]) -> list[str]:
    said = []
    for side in others:
        if not _one_scale(first, side):
            said.append(
                f"Levels of {side.name} are 0 to {side.max_level}, those of {first.name} 0 to {first.max_level}: "
                "values of different scales are not subtracted."
            )
        elif side.judges and first.judges and not _common(first, side):
            said.append(
                f"{side.name} was measured by {next(iter(side.judges))}, {first.name} by {next(iter(first.judges))}: "
                "values of different judges are not subtracted."
            )
        elif side.own_judge and first.own_judge and side.own_judge != first.own_judge:
            said.append(
                f"The judge ap is another attribute-prediction model in {side.name} than in {first.name}: a difference "
                "by ap may be one of the judges. Evaluate both with one ap_checkpoint, or with another judge, to tell."
            )
    common = dict.fromkeys(words for side in others for words in _common(first, side))
    if known := [f"{name} is {words}" for words, name in labels((first, *others)).items() if words in common]:
        said.append(f"Judges: {'; '.join(known)}.")
    return said


def _of_levels(first: Side, others: Sequence[Side]) -> list[str]:
    """Say where a model of two runs was asked for other levels at its best."""
    said = []
    for side in others:
        for model in first.models:
            one, other = first.best(model), side.best(model)
            if one and other and one != other:
                names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
                levels = [
                    ", ".join(f"{name} {best.get(name, 'not at all')}" for name in names) for best in (other, one)
                ]
                said.append(
                    f"At its best, {model} was asked for {levels[0]} in {side.name}, {levels[1]} in {first.name}."
                )
    return said


def _one_scale(first: Side, second: Side) -> bool:
    return first.max_level is None or second.max_level is None or first.max_level == second.max_level


def _common(first: Side, second: Side) -> list[str]:
    """Return the judges that both runs have, as reports call them; none where the runs have other scales."""
    if not _one_scale(first, second):
        return []
    return [words for words in first.judges if words in second.judges]


def _headings(sides: Sequence[Side]) -> list[str]:
    return [side.name for side in sides]


def _section(
    title: str,
    words: Sequence[str],
    tables: Sequence[dict[str, Any] | None],
    rows: Sequence[Mapping[str, Any]],
    of: Sequence[str],
) -> Section:
    """Return a section of the figures side by side, and the differences below; those of the attribute that models are
    compared by stand first, the others are folded away.
    """
    shown = [table for table in tables if table is not None]
    first = [row for row in rows if row.get("headline", True)]
    for name, some, folded in (
        ("Differences", first, False),
        ("Other differences", [row for row in rows if row not in first], True),
    ):
        if some:
            columns = ["run", "against", *of, "difference", "prompts", "is"]
            shown.append(
                {"title": name, "columns": columns, "rows": [_cells(row, of) for row in some], "folded": folded}
            )
    said = list(words) if shown else ["No run has measured this."]
    return {"title": title, "words": said, "tables": shown, "summary": _short(rows)}


def _cells(row: Mapping[str, Any], of: Sequence[str]) -> list[Any]:
    pairs = str(row["difference"]["n"]) if row["paired"] else "not paired"
    return [row["run"], row["against"], *(row[key] for key in of), row["difference"], pairs, row["verdict"]]


def _short(rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Return the differences in the words of the terminal, those of the first judge alone."""
    judge = next((row["judge"] for row in rows if "judge" in row), None)
    return [
        [f"{row['run']} − {row['against']}, {_title(row)}: {row['verdict']}", row["difference"]]
        for row in rows
        if row.get("judge") == judge and row.get("headline", True)
    ]


def _title(row: Mapping[str, Any]) -> str:
    return " ".join(str(row[key]) for key in ("model", "measured", "attribute") if key in row)


def _of_run(side: Side, against: Side, what: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    return {"run": side.name, "against": against.name, **what, **found}


def _quality(first: Side, second: Side) -> list[dict[str, Any]]:
    """Return the differences of the models that both runs have, and of their last models where these have other
    names.
    """
    rows = []
    pairs = [(name, name) for name in first.models if name in second.models]
    if first.models and second.models and first.models[-1] != second.models[-1]:
        pairs.append((first.models[-1], second.models[-1]))
    same, named = same_prompts(first, second), labels((first, second))
    for judge in _common(first, second):
        ours, theirs = first.at_best(judge), second.at_best(judge)
        for low, high in pairs:
            for attribute in dict.fromkeys(name for _, name in ours):
                if (low, attribute) not in ours or (high, attribute) not in theirs:
                    continue
                what = {
                    "model": low if low == high else f"{high} − {low}", "measured": attribute,
                    "judge": named.get(judge, judge), "headline": attribute in (first.quality, second.quality),
                }  # fmt: skip
                found = difference(ours[low, attribute], theirs[high, attribute], same)
                rows.append(_of_run(second, first, what, found))
        if not ours or not theirs:
            rows += _by_detail(first, second, named.get(judge, judge), pairs)
            break
    return sorted(rows, key=lambda row: not row["headline"])


def _by_detail(first: Side, second: Side, judge: str, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return differences of the mean quality of runs without responses, from the figures alone."""
    rows = []
    details = [side.evaluation.get("quality_detail") or {} for side in (first, second)]
    for low, high in pairs if first.quality == second.quality else ():
        if low in details[0] and high in details[1]:
            one, other = ({**row, "value": row.get("mean")} for row in (details[0][low], details[1][high]))
            found = unpaired(one, other)
            model = low if low == high else f"{high} − {low}"
            what = {"model": model, "measured": first.quality, "judge": judge, "headline": True}
            rows.append(_of_run(second, first, what, {"difference": found, "paired": False, "verdict": verdict(found)}))
    return rows


def _steering(first: Side, second: Side) -> list[dict[str, Any]]:
    same, named, rows = same_prompts(first, second), labels((first, second)), []
    for judge in _common(first, second):
        ours, theirs = first.slopes(judge), second.slopes(judge)
        for name in ours:
            if name in theirs:
                what = {"attribute": name, "judge": named.get(judge, judge)}
                rows.append(_of_run(second, first, what, difference(ours[name], theirs[name], same)))
    return rows


def _error(side: Side, name: str) -> dict[str, Any] | None:
    """Return the squared error of an attribute, with its interval where the measure ``prediction`` ran."""
    measured = ((side.evaluation.get("measures") or {}).get("prediction") or {}).get("attributes") or {}
    found = (measured.get(name) or {}).get("metrics", {}).get("mse")
    row = (side.evaluation.get("ap") or {}).get(name)
    if found is None and row is not None and row.get("mse") is not None:
        found = figure(row["mse"], n=row.get("n"))
    return found


def _prediction(first: Side, second: Side) -> list[dict[str, Any]]:
    rows = []
    for name in (first.evaluation.get("ap") or {}) if _one_scale(first, second) else ():
        one, other = _error(first, name), _error(second, name)
        if one is not None and other is not None:
            found = unpaired(one, other)
            what = {"attribute": name, "difference": found, "paired": False, "verdict": verdict(found)}
            rows.append(_of_run(second, first, what, {}))
    return rows


def _table(
    title: str,
    columns: Sequence[str],
    sides: Sequence[Side],
    keys: Iterable[tuple[str, ...]],
    cell: Callable[[Side, tuple[str, ...]], Any],
) -> dict[str, Any] | None:
    """Return a table with a column for each run, None without rows."""
    rows = [[*key, *(cell(side, key) for side in sides)] for key in dict.fromkeys(keys)]
    return {"title": title, "columns": [*columns, *_headings(sides)], "rows": rows} if rows else None


def _means(sides: Sequence[Side]) -> list[dict[str, Any] | None]:
    """Return the means at the best levels: a table of the attribute that models are compared by, one of the others."""
    found: dict[tuple[str, tuple[str, ...]], Any] = {}
    named = labels(sides)
    for side in sides:
        for judge in side.judges:
            for (model, attribute), values in side.at_best(judge).items():
                found[side.name, (named.get(judge, judge), model, attribute)] = mean(values)
        if not side.responses:
            for model, row in (side.evaluation.get("quality_detail") or {}).items():
                judge = next(iter(side.judges), "not named")
                found[side.name, (named.get(judge, judge), model, side.quality)] = {**row, "value": row.get("mean")}
    keys = [key for _, key in found]
    headlines = {side.quality for side in sides}
    first = [key for key in keys if key[2] in headlines]
    columns = ("judge", "model", "measured")
    tables = []
    for title, some in (("Mean at the best levels", first), ("Other means", [key for key in keys if key not in first])):
        table = _table(title, columns, sides, some, lambda side, key: found.get((side.name, key)))
        tables.append(table and table | {"folded": some is not first})
    return tables


def _steered(sides: Sequence[Side]) -> list[str]:
    models = [
        f"{side.name}: {side.evaluation['steered_model']}" for side in sides if side.evaluation.get("steered_model")
    ]
    return [
        "Slope: how far the measured mean rises per level that is asked for; 1 is exact.",
        *([f"The model that is steered: {', '.join(models)}."] if models else []),
    ]


def _slopes(sides: Sequence[Side]) -> dict[str, Any] | None:
    found: dict[tuple[str, tuple[str, ...]], Any] = {}
    named = labels(sides)
    for side in sides:
        for judge in side.judges:
            for name, values in side.slopes(judge).items():
                found[side.name, (named.get(judge, judge), name)] = mean(values)
        if not side.responses:
            judge = next(iter(side.judges), "not named")
            for name, curve in (side.evaluation.get("steering") or {}).items():
                found[side.name, (named.get(judge, judge), name)] = curve.get("slope")
    keys = [key for _, key in found]
    return _table("Slope", ("judge", "attribute"), sides, keys, lambda side, key: found.get((side.name, key)))


def _errors(sides: Sequence[Side]) -> dict[str, Any] | None:
    keys = [(name,) for side in sides for name in side.evaluation.get("ap") or {}]
    return _table("Squared error", ("attribute",), sides, keys, lambda side, key: _error(side, key[0]))
