"""Pictures of the report: matplotlib figures as SVG data URIs. The same input gives the same bytes.

A method has one colour and one marker everywhere. The colours are those of Okabe and Ito (2008).
They stay distinct with any of the common colour blindnesses.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.errors import label
from tasks.methods import METHODS
from tasks.report.chosen import Chosen
from tasks.results.models import Compared, Estimate
from tasks.users_map import new_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Methods take these in turn, first those of every run. There are more markers than colours: no two
# methods share both. A colour that is used again has another line style.
COLOURS = ["#808080", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#8C6D31"]
MARKERS = "s^vDPoX*<>hdp8H+x1234"
STROKES = ("-", "--", ":")
# Answers of no model, from the least knowing to the most: black, each with its own line style.
LINES = {"nonpersonal": ":", "bayes": "--", "oracle": "-."}
INK = "#222222"


def style(method: str) -> tuple[str, str, str]:
    """Colour, marker and line of a method."""
    place = sorted(METHODS, key=lambda name: not METHODS[name].default).index(method)
    again, colour = divmod(place, len(COLOURS))
    return COLOURS[colour], MARKERS[place % len(MARKERS)], STROKES[again % len(STROKES)]


def bars(title: str, axis: str, names: Sequence[str], compared: Compared, metric: str) -> str:
    """A bar per method with the 95% interval of its `score`; methods of LINES as vertical lines.

    names: in order from the top; a score of None has no bar. If the main `metric` is MAE, it stands
    beside the bar, below the score.
    """
    methods = [name for name in names if name not in LINES]
    figure, axes = _axes(title, 5.8, 1.25 + 0.34 * len(methods))
    rows = np.arange(len(methods))
    points, lows, highs = _scores(compared, methods)
    axes.barh(rows, points, height=0.66, color=[style(name)[0] for name in methods])
    axes.plot(
        [lows, highs], [rows, rows], color=INK, linewidth=1.3, marker="|", markersize=6, zorder=3
    )
    for row, name in enumerate(methods):
        number = _number(compared.estimate(name))
        number += f"\nMAE {_number(compared.estimate(name, metric))}" if metric == "mae" else ""
        # Beside the axes, where no line can run through it.
        axes.text(
            1.02, row, number, transform=axes.get_yaxis_transform(), va="center",
            fontsize=9, color=INK, linespacing=1.0,
        )  # fmt: skip
    lines = [name for name in LINES if name in names]
    for name, line in zip(lines, _scores(compared, lines)[0], strict=True):
        if np.isfinite(line):
            axes.axvline(line, color=INK, ls=LINES[name], linewidth=1.2, label=name, zorder=2)
    ends = np.append(_scores(compared, names), 0.0)
    axes.set_xlim(np.nanmin(ends), (np.nanmax(ends) or 1.0) * 1.03)
    axes.set(yticks=rows, yticklabels=methods, ylim=(len(methods) - 0.4, -0.6), xlabel=axis)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    if lines:
        axes.legend(
            loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False, fontsize=9,
            borderaxespad=0.1, handlelength=1.8, columnspacing=1.2,
        )  # fmt: skip
    return data_uri(figure)


def curves(title: str, axis: str, names: Sequence[str], points: Mapping[int, Compared]) -> str:
    """Score over the number of items, a line per method of `names` with 95% intervals.

    The numbers of items stand at equal distances, since they are mostly doublings. Methods are
    drawn a little beside each other.
    """
    figure, axes = _axes(title, 5.8, 3.9)
    methods = [name for name in names if name not in LINES]
    for name in names:
        table = np.hstack([_scores(one, [name]) for one in points.values()])
        (places,) = np.nonzero(~np.isnan(table[0]))
        values, lows, highs = table[:, places]
        if name in LINES:
            axes.plot(places, values, color=INK, linestyle=LINES[name], linewidth=1.2, label=name)
            continue
        beside = places + 0.05 * (methods.index(name) - (len(methods) - 1) / 2)
        colour, marker, stroke = style(name)
        axes.plot(
            beside, values, color=colour, marker=marker, linestyle=stroke, markersize=6,
            linewidth=1.6, label=name,
        )  # fmt: skip
        axes.plot([beside, beside], [lows, highs], color=colour, linewidth=1.0)
    axes.set(xticks=range(len(points)), xticklabels=points, xlim=(-0.4, len(points) - 0.6))
    axes.set(xlabel="items per few-shot user (at most)", ylabel=axis)
    axes.grid(axis="y", color="#d0d0d0", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9, handlelength=2.2
    )
    return data_uri(figure)


def heat(chosen: Chosen) -> str:
    """Mean weights of `chosen_by_merging` as shades of blue with the numbers in them."""
    shown = chosen.weights
    rows, columns = len(shown.rows), len(shown.columns)
    title = f"{chosen.lamp_task}: {', '.join(chosen.methods)}"
    figure, axes = _axes(title, 1.6 + 0.62 * max(columns, 4), 1.5 + 0.42 * rows)
    axes.imshow(shown.weights, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    for (y, x), weight in np.ndenumerate(shown.weights):
        ink = "white" if weight > 0.55 else INK
        axes.text(x, y, f"{weight:.2f}", ha="center", va="center", color=ink, fontsize=9)
    sort = "first archetype" if chosen.by == "archetype" else chosen.by
    # Names of adapters are long, and may hold any sign.
    plain: dict[str, Any] = {"parse_math": False}
    turned = plain | ({"rotation": 30, "ha": "right"} if chosen.by == "adapter" else {})
    across = map("{} ({:.3g})".format, map(label, shown.columns), shown.anchors)
    axes.set_xticks(range(columns), across, **turned)
    axes.set_yticks(
        range(rows), map("{} ({})".format, map(label, shown.rows), shown.users), **plain
    )
    axes.set(xlabel=f"anchor's {sort} (how many)", ylabel=f"user's {sort} (how many)")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return data_uri(figure)


def gaps(title: str, methods: Sequence[str], differences: Sequence[Estimate]) -> str:
    """A point per method with the 95% interval of its difference, from the top; 0 is a line."""
    figure, axes = _axes(title, 5.8, 1.25 + 0.34 * len(methods))
    rows = np.arange(len(methods))
    points, lows, highs = _table(differences)
    axes.axvline(0.0, color=INK, linewidth=1.0)
    axes.plot([lows, highs], [rows, rows], color=INK, linewidth=1.3, marker="|", markersize=6)
    axes.scatter(points, rows, s=60, color=[style(name)[0] for name in methods], zorder=3)
    axes.set(yticks=rows, yticklabels=methods, xlabel="difference of score")
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return data_uri(figure)


def data_uri(figure: Figure) -> str:
    """The figure as an SVG in a data URI; letters are drawn, so no font is needed to read it."""
    import matplotlib

    file, metadata = io.BytesIO(), {"Date": None, "Creator": None}
    # The salt makes the ids inside the same every time; without metadata there is no date.
    with matplotlib.rc_context({"svg.hashsalt": "mta", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", bbox_inches="tight", metadata=metadata)
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"


def _scores(compared: Compared, names: Sequence[str]) -> NDArray[np.float64]:
    """Points, lower and upper bounds, [3, n]. Unknown values are nan and are not drawn."""
    return _table([compared.estimate(name) for name in names])


def _table(estimates: Sequence[Estimate]) -> NDArray[np.float64]:
    rows = [[one.point, one.lo, one.hi] for one in estimates]
    return np.array(rows, dtype=np.float64).reshape(-1, 3).T


def _number(estimate: Estimate) -> str:
    return "-" if estimate.point is None else f"{estimate.point:.3f}"


def _axes(title: str, width: float, height: float) -> tuple[Figure, Any]:
    figure, axes = new_axes(width, height)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    return figure, axes
