"""The picture of the users: two principal components, clusters by colour, anchors marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from tasks.results.models import Anchors, MetaLora
from tasks.results.store import store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of Okabe and Ito (2008): they stay distinct with any of the common colour blindnesses.
COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D31", "#000000"
)  # fmt: skip
MARKERS = "os^Dv"


def draw_map(path: Path, title: str, chosen: Anchors, loras: Sequence[MetaLora]) -> None:
    """Write the map as a PNG. The same users give the same bytes. loras: those of the bank."""
    table = pl.read_parquet(store().path(chosen.table))
    few_shot = len(table.filter(pl.col("role") == "few_shot"))
    text = (
        f"{title}: {chosen.candidates} anchor candidates in {chosen.clusters} clusters,\n"
        f"{len(loras)} anchors in the bank, {few_shot} few-shot users"
    )
    figure = users_map(table, {one.anchor: one.members for one in loras}, text)
    # No creation time or version in the file.
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})


def users_map(table: pl.DataFrame, members: Mapping[str, Sequence[str]], title: str) -> Figure:
    """Users on two principal components: clusters by colour and marker, anchors ringed.

    table: as anchors.parquet (tasks/anchors.py). members: anchor of the bank -> its users. The ring
    of an anchor of several users is at their mean.
    """
    figure, axes = new_axes(6.4, 4.6)
    few_shot, candidates = (table.filter(pl.col("role") == role) for role in ("few_shot", "anchor"))
    axes.scatter(few_shot["x"], few_shot["y"], s=14, c="0.75", marker="x", label="few-shot user")
    for (cluster,), part in sorted(candidates.group_by("cluster"), key=lambda item: item[0]):
        name, colour, marker = "noise", "0.55", "."
        if cluster != -1:
            turn, place = divmod(cluster, len(COLOURS))
            name, colour = f"cluster {cluster}", COLOURS[place]
            marker = MARKERS[turn % len(MARKERS)]
        label = f"{name} ({len(part)})"
        axes.scatter(part["x"], part["y"], s=26, c=colour, marker=marker, alpha=0.8, label=label)
    for whole, size, name in ((True, 260, "anchor, a whole cluster"), (False, 110, "anchor")):
        groups = [users for users in members.values() if (len(users) > 1) == whole]
        if not groups:
            continue
        parts = [candidates.filter(pl.col("user_id").is_in(users)) for users in groups]
        middles = pl.concat(part.select("x", "y").mean() for part in parts)
        axes.scatter(
            middles["x"], middles["y"], s=size, facecolors="none", edgecolors="black",
            linewidths=1.3, label=f"{name} ({len(groups)})",
        )  # fmt: skip
    axes.set(xlabel="first principal component", ylabel="second principal component")
    axes.set_title(title, loc="left", fontsize=9)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def new_axes(width: float, height: float) -> tuple[Figure, Any]:
    """A figure of this size in inches, with axes at the left and the bottom."""
    from matplotlib.figure import Figure

    # No pyplot: it keeps global state, and stages run in threads.
    figure = Figure(figsize=(width, height), dpi=120)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
