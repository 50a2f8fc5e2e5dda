"""The report's plots, as SVG text.

Owns: the layout and style of plots. Does not own: the numbers. Invariant: the same numbers give the same bytes (no
dates, no random ids), and nothing refers to another file.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

INK = "#1f2933"
GRID = "#e4e7eb"
BLUE = "#2563a8"
FAINT = "#9fb3c8"
BAR_COLORS = ("#9fb3c8", "#4f8fca", "#1d4f8b")
# Of runs beside each other: colour, mark and line, so that none is told by its colour alone.
RUN_STYLES = (
    ("#2563a8", "o", "-"), ("#b45309", "s", (0, (5, 2))), ("#0f766e", "^", (0, (1, 1))),
    ("#7c3aed", "D", (0, (3, 1, 1, 1))),
)  # fmt: skip
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "steerlm",
    "svg.fonttype": "path",
}


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight", transparent=True)
    return buffer.getvalue()


def _floats(values: Sequence[Any]) -> list[float]:
    return [float("nan") if value is None else float(value) for value in values]


def steering_plot(name: str, curve: Mapping[str, Any], max_level: int | None) -> str:
    """Plot mean measured over requested level, with one standard deviation and the diagonal where both are equal."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.4, 2.9))
        axes = figure.subplots()
        requested, measured = _floats(curve["requested"]), _floats(curve["measured"])
        top = max_level if max_level is not None else max([*requested, *measured, 1.0])
        axes.plot([0, top], [0, top], color=FAINT, linestyle=(0, (4, 3)), linewidth=1.2, label="measured = requested")
        if curve.get("std"):
            spread = _floats(curve["std"])
            low = [max(mean - std, 0.0) for mean, std in zip(measured, spread, strict=True)]
            high = [min(mean + std, top) for mean, std in zip(measured, spread, strict=True)]
            axes.fill_between(requested, low, high, color=BLUE, alpha=0.13, linewidth=0, label="± 1 std over responses")
        axes.plot(requested, measured, color=BLUE, marker="o", markersize=4.5, linewidth=1.8, label="mean measured")
        if bounds := _bounds(measured, curve.get("low"), curve.get("high")):
            axes.errorbar(requested, measured, yerr=bounds, color=BLUE, capsize=3, linewidth=1.2, linestyle="none")
        axes.set(title=name, xlabel="requested level", ylabel="measured level")
        axes.set_xlim(-0.04 * top, 1.04 * top)
        axes.set_ylim(-0.04 * top, 1.04 * top)
        axes.set_aspect("equal")
        axes.legend(loc="upper left", fontsize=7, framealpha=0.75, edgecolor="none", facecolor="white")
        return _svg(figure)


def compared_steering_plot(name: str, curves: Mapping[str, Mapping[str, Any]]) -> str:
    """Plot the mean measured level over the requested one, one line per run, with the 95 % interval of each mean."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.4, 3.1))
        axes = figure.subplots()
        top = max([1.0, *(_finite([*curve["requested"], *curve["measured"]]) for curve in curves.values())])
        axes.plot([0, top], [0, top], color=FAINT, linestyle=(0, (4, 3)), linewidth=1.2, label="measured = requested")
        for place, (run, curve) in enumerate(curves.items()):
            color, marker, line = RUN_STYLES[place % len(RUN_STYLES)]
            requested, measured = _floats(curve["requested"]), _floats(curve["measured"])
            axes.plot(requested, measured, color=color, marker=marker, linestyle=line, markersize=4.5, label=run)
            if bounds := _bounds(measured, curve.get("low"), curve.get("high")):
                axes.errorbar(requested, measured, yerr=bounds, color=color, capsize=3, linewidth=1, linestyle="none")
        axes.set(title=name, xlabel="requested level", ylabel="measured level")
        _legend_below(axes)
        return _svg(figure)


def _finite(values: Sequence[Any]) -> float:
    return max([float(value) for value in values if value is not None], default=0.0)


def _legend_below(axes: Any) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2), fontsize=7, frameon=False)


def training_plot(step: str, curves: Mapping[str, Mapping[str, Any]]) -> str:
    """Plot the loss over the training steps of one step of a run, or of several runs: lines are training losses, marks
    are those on the validation set.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.4, 2.6))
        axes = figure.subplots()
        for place, (run, curve) in enumerate(curves.items()):
            color, marker, line = RUN_STYLES[place % len(RUN_STYLES)]
            name = f"{run}: " if len(curves) > 1 or run else ""
            for key, title in (("loss", "training"), ("valid", "validation")):
                points = [(x, y) for x, y in curve[key] if y is not None]
                style = {"linestyle": line} if key == "loss" else {"linestyle": "none", "marker": marker}
                if points:
                    axes.plot(*zip(*points, strict=True), color=color, linewidth=1.2, markersize=4.5,
                              label=f"{name}{title}", **style)  # fmt: skip
        axes.set(title=step, xlabel="step", ylabel="loss")
        _legend_below(axes)
        return _svg(figure)


def distributions_plot(name: str, steps: Mapping[str, Mapping[str, Any]]) -> str:
    """Plot which share of the responses of each step has each level of an attribute; at most the first four steps."""
    some = dict(list(steps.items())[: len(RUN_STYLES)])
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.4, 2.6))
        axes = figure.subplots()
        width = 0.8 / len(some)
        for place, (step, one) in enumerate(some.items()):
            total = sum(one["levels"]) or 1
            shares = [count / total for count in one["levels"]]
            middles = [level + (place + 0.5) * width - 0.4 for level in range(len(shares))]
            color, hatch = RUN_STYLES[place][0], ("", "//", "..", "xx")[place]
            axes.bar(middles, shares, width=width, color=color, hatch=hatch, edgecolor="white", linewidth=0, label=step)
        axes.set(title=name, xlabel="level", ylabel="share of responses")
        axes.set_xticks(range(max(len(one["levels"]) for one in some.values())))
        axes.grid(visible=False, axis="x")
        _legend_below(axes)
        return _svg(figure)


def quality_plot(
    means: Mapping[str, float | None], detail: Mapping[str, Mapping[str, Any]], titles: Sequence[str]
) -> str:
    """Plot one bar per model, with the 95 % interval of its mean (with its standard error where there is no interval);
    ``titles`` are in the order of ``means``.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(4.6, 1.3 * len(means)), 2.9))
        axes = figure.subplots()
        heights = _floats(list(means.values()))
        sides = [[detail.get(name, {}).get(key) for name in means] for key in ("low", "high")]
        bounds = _bounds(heights, *sides)
        errors = _floats([detail.get(name, {}).get("sem") for name in means])
        below, above = bounds or (errors, errors)
        places = list(range(len(heights)))
        colors = [BAR_COLORS[min(place, len(BAR_COLORS) - 1)] for place in places]
        axes.bar(places, heights, width=0.55, color=colors)
        for place, height, down, up in zip(places, heights, below, above, strict=True):
            if height != height:
                continue  # NaN has no bar, and the table says so
            bar_top = height
            if up == up:
                axes.errorbar(place, height, yerr=[[down], [up]], color=INK, capsize=4, linewidth=1)
                bar_top += up
            axes.annotate(
                f"{height:.2f}", (place, bar_top), xytext=(0, 3), textcoords="offset points", ha="center", color=INK
            )
        axes.set_xticks(places, titles)
        axes.set_ylabel(f"mean quality ({'95 % interval' if bounds else '± standard error'})")
        axes.margins(y=0.15)
        axes.grid(visible=False, axis="x")
        return _svg(figure)


def _bounds(
    values: Sequence[float], low: Sequence[Any] | None, high: Sequence[Any] | None
) -> tuple[list[float], list[float]] | None:
    """Return how far the bounds are below and above the values, None where no value has an interval."""
    if not low or not high:
        return None
    below = [max(value - bound, 0.0) for value, bound in zip(values, _floats(low), strict=True)]
    above = [max(bound - value, 0.0) for value, bound in zip(values, _floats(high), strict=True)]
    return (below, above) if any(one == one for one in above) else None


def calibration_plot(
    name: str, calibration: Mapping[str, Any], max_level: int, points: Sequence[Sequence[float]] = ()
) -> str:
    """Plot labels over predictions: the mean of each bin with its 95 % interval, the diagonal on which a calibrated
    model lies, and single responses (``points``: prediction and label of each). Labels are levels, so points are moved
    up or down by at most 0.18 of a level: else they would cover each other.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.4, 2.9))
        axes = figure.subplots()
        bins = calibration["bins"]
        predicted, labels = _floats([one["predicted"] for one in bins]), [one["label"] for one in bins]
        means = _floats([label["value"] for label in labels])
        axes.plot([0, max_level], [0, max_level], color=FAINT, linestyle=(0, (4, 3)), linewidth=1.2, label="calibrated")
        if points:
            # Multiples of the golden ratio are spread evenly and are the same in each run, unlike random numbers.
            moved = [label + 0.36 * ((place * 0.6180339887) % 1 - 0.5) for place, (_, label) in enumerate(points)]
            axes.plot(
                [prediction for prediction, _ in points], moved, color=FAINT, marker=".", markersize=3, alpha=0.7,
                linestyle="none", label="responses",
            )  # fmt: skip
        bounds = _bounds(means, [label["low"] for label in labels], [label["high"] for label in labels])
        axes.errorbar(
            predicted, means, yerr=bounds, color=BLUE, marker="o", markersize=4, capsize=3, linewidth=1.2,
            label="mean label, 95 % interval",
        )  # fmt: skip
        axes.set(title=name, xlabel="predicted value", ylabel="label")
        margin = max(0.04 * max_level, 0.25 if points else 0.0)
        axes.set_xlim(-0.04 * max_level, 1.04 * max_level)
        axes.set_ylim(-margin, max_level + margin)
        axes.set_aspect("equal")
        axes.legend(loc="upper left", fontsize=7, framealpha=0.75, edgecolor="none", facecolor="white")
        return _svg(figure)


def cross_talk_plot(judge: str, matrix: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Plot slopes as a heat map: rows are what was asked, columns what was measured. A slope whose interval includes
    zero stands in parentheses. Each column has its own scale of colours, since a judge's measures have other units.
    """
    asked, measured = list(matrix), list(next(iter(matrix.values()), {}))
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(max(3.4, 1.6 + 0.75 * len(measured)), 1.3 + 0.42 * len(asked)))
        axes = figure.subplots()
        values = [_floats([matrix[row][column]["value"] for column in measured]) for row in asked]
        tops = [
            max([abs(row[i]) for row in values if row[i] == row[i]], default=0.0) or 1.0 for i in range(len(measured))
        ]
        shares = [[value / top for value, top in zip(row, tops, strict=True)] for row in values]
        axes.imshow(shares, cmap="RdBu", vmin=-2.2, vmax=2.2, aspect="auto")  # pale enough for dark ink
        for y, row in enumerate(asked):
            for x, column in enumerate(measured):
                one = matrix[row][column]
                low, high = _floats([one["low"], one["high"]])
                text = "–" if values[y][x] != values[y][x] else f"{values[y][x]:.2f}"
                axes.text(
                    x, y, f"({text})" if low <= 0 <= high else text, ha="center", va="center", color=INK, fontsize=8
                )
        axes.set_xticks(range(len(measured)), measured, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(asked)), asked)
        axes.set(title=f"measured by {judge}", ylabel="asked")
        axes.spines[:].set_visible(False)
        return _svg(figure)


def levels_plot(name: str, attribute: Mapping[str, Any]) -> str:
    """Plot which share of the responses has each level of an attribute: those of the annotated data beside those that
    bootstrapping kept, with the mean of the levels that it asked for.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.4, 2.4))
        axes = figure.subplots()
        levels = range(len(attribute["before"]["levels"]))
        _pairs(axes, levels, attribute["before"]["levels"], attribute["after"]["levels"], 0.4)
        asked = attribute["asked"]["mean"]
        if asked is not None:
            axes.axvline(asked, color=INK, linestyle=(0, (4, 3)), linewidth=1.2, label="asked, mean")
        axes.set(title=name, xlabel="level", ylabel="share of responses")
        axes.set_xticks(list(levels))
        axes.legend(fontsize=7, frameon=False)
        return _svg(figure)


def lengths_plot(lengths: Mapping[str, Sequence[float]]) -> str:
    """Plot the histogram of the number of words in responses: annotated ones beside those that bootstrapping kept."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.4, 2.4))
        axes = figure.subplots()
        edges = _floats(lengths["edges"])
        middles = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
        _pairs(axes, middles, lengths["before"], lengths["after"], 0.4 * (edges[1] - edges[0]))
        axes.set(title="length", xlabel="words", ylabel="share of responses")
        axes.legend(fontsize=7, frameon=False)
        return _svg(figure)


def _pairs(axes: Any, places: Sequence[float], before: Sequence[float], after: Sequence[float], width: float) -> None:
    """Draw both counts at each place as bars beside each other, as shares of their sums."""
    for counts, side, color, label in ((before, -1, FAINT, "annotated"), (after, 1, BLUE, "bootstrapped")):
        total = sum(counts) or 1
        middles = [place + side * width / 2 for place in places]
        axes.bar(middles, [count / total for count in counts], width=width, color=color, label=label)
    axes.grid(visible=False, axis="x")


def ap_plot(ap: Mapping[str, Mapping[str, Any]]) -> str:
    """Plot the squared error of the attribute-prediction model beside the constant predictor's, per attribute."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 0.55 + 0.46 * len(ap)))
        axes = figure.subplots()
        places = list(range(len(ap)))
        model = _floats([row.get("mse") for row in ap.values()])
        constant = _floats([row.get("constant_mse") for row in ap.values()])
        axes.barh([place - 0.19 for place in places], model, height=0.36, color=BLUE, label="AP model")
        axes.barh([place + 0.19 for place in places], constant, height=0.36, color=FAINT, label="constant")
        axes.set_yticks(places, list(ap))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("mean squared error (lower is better)")
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
        return _svg(figure)
