"""Pictures of the report: matplotlib figures as SVG data URIs. The same input gives the same bytes.

A method has one colour and one marker everywhere. Colours are those of Okabe and Ito (2008), which
people with any of the common colour blindnesses tell apart.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

GREY, ORANGE, SKY, GREEN = "#808080", "#E69F00", "#56B4E9", "#009E73"
PINK, VERMILION, BLUE, BROWN = "#CC79A7", "#D55E00", "#0072B2", "#8C6D31"
# Colour and marker.
STYLES = {
    "base": (GREY, "s"),
    "rag": (ORANGE, "^"),
    "oppu": (SKY, "v"),
    "merge_only": (GREEN, "D"),
    "stack_only": (PINK, "P"),
    "mta": (VERMILION, "o"),
    "mta_published": (BLUE, "X"),
}
# Answers of no model: black, told apart by how the line is drawn.
LINES = {"nonpersonal": ":", "bayes": "--", "oracle": "-."}
INK, FAINT = "#222222", "#d0d0d0"
CLUSTERS = (BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, BROWN, "#000000")
CLUSTER_MARKERS = "os^Dv"


def style(method: str) -> tuple[str, str]:
    """Colour and marker of a method; brown and a star for one that has none yet."""
    return STYLES.get(method, (BROWN, "*"))


def bars(
    title: str,
    axis: str,
    estimates: Mapping[str, Mapping[str, float | None]],
    numbers: Mapping[str, str],
) -> str:
    """A bar per method with its 95% interval and its number; methods of LINES as vertical lines.

    estimates: method -> {"point", "lo", "hi"}, drawn from the top in that order; no bar where the
    point is None, no interval where a bound is. numbers: method -> what stands at the right edge,
    in one line or two.
    """
    methods = [name for name in estimates if name not in LINES]
    figure, axes = _axes(5.8, 1.25 + 0.34 * len(methods))
    ends = [value for one in estimates.values() for value in one.values() if value is not None]
    right = max([*ends, 0.0]) or 1.0
    for row, name in enumerate(methods):
        point, lo, hi = (estimates[name][key] for key in ("point", "lo", "hi"))
        # Beside the axes, where no line can run through it.
        axes.text(
            1.02, row, numbers[name], transform=axes.get_yaxis_transform(), va="center",
            fontsize=9, color=INK, linespacing=1.0,
        )  # fmt: skip
        if point is None:
            continue
        axes.barh(row, point, height=0.66, color=style(name)[0])
        if lo is not None and hi is not None:
            axes.plot(
                [lo, hi], [row, row], color=INK, linewidth=1.3, marker="|", markersize=6, zorder=3
            )
    for name, dashes in LINES.items():
        if (line := estimates.get(name, {}).get("point")) is not None:
            axes.axvline(line, color=INK, linestyle=dashes, linewidth=1.2, label=name, zorder=2)
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.set_xlim(min([*ends, 0.0]), right * 1.03)
    axes.set_xlabel(axis)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    if any(name in estimates for name in LINES):
        axes.legend(
            loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False, fontsize=9,
            borderaxespad=0.1, handlelength=1.8, columnspacing=1.2,
        )  # fmt: skip
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    return data_uri(figure)


def curves(title: str, axis: str, points: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Score over the number of items, a line per method with 95% intervals.

    points: method -> [{"items", "point", "lo", "hi"}]. The numbers of items stand at equal
    distances (they are mostly chosen as doublings), methods a little beside each other.
    """
    figure, axes = _axes(5.8, 3.9)
    items = sorted({one["items"] for own in points.values() for one in own})
    methods = [name for name in points if name not in LINES]
    for name, own in points.items():
        known = [one for one in own if one["point"] is not None]
        beside = 0.0
        if name in methods:
            beside = 0.05 * (methods.index(name) - (len(methods) - 1) / 2)
        places = [items.index(one["items"]) + beside for one in known]
        values = [one["point"] for one in known]
        if name in LINES:
            axes.plot(places, values, color=INK, linestyle=LINES[name], linewidth=1.2, label=name)
            continue
        colour, marker = style(name)
        axes.plot(places, values, color=colour, marker=marker, markersize=6, linewidth=1.6,
                  label=name)  # fmt: skip
        for place, one in zip(places, known, strict=True):
            if one["lo"] is not None and one["hi"] is not None:
                axes.plot([place, place], [one["lo"], one["hi"]], color=colour, linewidth=1.0)
    axes.set_xticks(range(len(items)), [str(number) for number in items])
    axes.set_xlim(-0.4, len(items) - 0.6)
    axes.set_xlabel("items per few-shot user (at most)")
    axes.set_ylabel(axis)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9, handlelength=2.2
    )
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    return data_uri(figure)


def heat(
    title: str,
    axes_names: tuple[str, str],
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
) -> str:
    """Numbers 0..1 [rows][columns] as shades of blue with the numbers in them.

    axes_names: what columns and rows are.
    """
    figure, axes = _axes(1.6 + 0.62 * max(len(columns), 4), 1.5 + 0.42 * len(rows))
    axes.imshow(values, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    for y, own in enumerate(values):
        for x, value in enumerate(own):
            ink = "white" if value > 0.55 else INK
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=9)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(axes_names[0])
    axes.set_ylabel(axes_names[1])
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    return data_uri(figure)


def users_map(table: pl.DataFrame, members: Mapping[str, Sequence[str]], title: str) -> Figure:
    """Users on two principal components: clusters by colour and marker, anchors ringed.

    table: the columns of anchors.parquet (tasks/anchors.py). members: of each anchor of the bank;
    one of several users is ringed in their middle.
    """
    import polars as pl

    figure, axes = _axes(6.4, 4.6)
    few_shot = table.filter(pl.col("role") == "few_shot")
    axes.scatter(few_shot["x"], few_shot["y"], s=14, c="0.75", marker="x", label="few-shot user")
    candidates = table.filter(pl.col("role") == "anchor")
    for (label,), part in sorted(candidates.group_by("cluster"), key=lambda item: item[0]):
        noise = label == -1
        turn = label // len(CLUSTERS)
        axes.scatter(
            part["x"],
            part["y"],
            s=26,
            color="0.55" if noise else CLUSTERS[label % len(CLUSTERS)],
            marker="." if noise else CLUSTER_MARKERS[turn % len(CLUSTER_MARKERS)],
            alpha=0.8,
            label=f"{'noise' if noise else f'cluster {label}'} ({len(part)})",
        )
    for whole, size, name in ((True, 260, "anchor, a whole cluster"), (False, 110, "anchor")):
        chosen = [own for own in members.values() if (len(own) > 1) == whole]
        middles = [
            candidates.filter(pl.col("user_id").is_in(own)).select("x", "y").mean().row(0)
            for own in chosen
        ]
        if middles:
            x, y = zip(*middles, strict=True)
            axes.scatter(
                x, y, s=size, facecolors="none", edgecolors="black", linewidths=1.3,
                label=f"{name} ({len(middles)})",
            )  # fmt: skip
    axes.set_xlabel("first principal component")
    axes.set_ylabel("second principal component")
    axes.set_title(title, loc="left", fontsize=9)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def data_uri(figure: Figure) -> str:
    """The figure as an SVG in a data URI; letters are drawn, so no font is needed to read it."""
    import matplotlib

    file = io.StringIO()
    # The salt makes the ids inside the same every time; without metadata there is no date.
    with matplotlib.rc_context({"svg.hashsalt": "mta", "svg.fonttype": "path"}):
        figure.savefig(
            file, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None}
        )
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue().encode()).decode()


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: it keeps global state, and stages run in threads.
    figure = Figure(figsize=(width, height), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
