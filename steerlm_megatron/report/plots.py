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
        axes.set(title=name, xlabel="requested level", ylabel="measured level")
        axes.set_xlim(-0.04 * top, 1.04 * top)
        axes.set_ylim(-0.04 * top, 1.04 * top)
        axes.set_aspect("equal")
        axes.legend(loc="upper left", fontsize=7, framealpha=0.75, edgecolor="none", facecolor="white")
        return _svg(figure)


def quality_plot(
    means: Mapping[str, float | None], detail: Mapping[str, Mapping[str, Any]], titles: Sequence[str]
) -> str:
    """Plot one bar per model, with the standard error of its mean; ``titles`` are in the order of ``means``."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.6, 2.9))
        axes = figure.subplots()
        heights = _floats(list(means.values()))
        errors = _floats([detail.get(name, {}).get("sem") for name in means])
        places = list(range(len(heights)))
        colors = [BAR_COLORS[min(place, len(BAR_COLORS) - 1)] for place in places]
        axes.bar(places, heights, width=0.55, color=colors)
        for place, height, error in zip(places, heights, errors, strict=True):
            if height != height:
                continue  # NaN has no bar, and the table says so
            bar_top = height
            if error == error:
                axes.errorbar(place, height, yerr=error, color=INK, capsize=4, linewidth=1)
                bar_top += error
            axes.annotate(
                f"{height:.2f}", (place, bar_top), xytext=(0, 3), textcoords="offset points", ha="center", color=INK
            )
        axes.set_xticks(places, titles)
        axes.set_ylabel("mean quality (± standard error)")
        axes.margins(y=0.15)
        axes.grid(visible=False, axis="x")
        return _svg(figure)


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
