"""Users and methods' answers by hand, for the stage that compares methods."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from tasks.lamp.definitions import get_task
from tasks.prepare import OPTIMUM_FILE
from tasks.results.models import Answers, Prepared
from tasks.results.store import store
from tests.unit.stages.vectors import NO_FILE

# user -> group; u2 and u3 share content, so three groups.
USERS = {"u1": "g1", "u2": "g2", "u3": "g2", "u4": "g4"}
# query -> user, gold. Two queries of u1, one of the others.
QUERIES = {
    "a": ("u1", "comedy"),
    "b": ("u1", "action"),
    "c": ("u2", "comedy"),
    "d": ("u3", "classic"),
    "e": ("u4", "action"),
}
BASE = dict.fromkeys(QUERIES, "comedy")  # right: a, c
MTA = BASE | {"b": "action", "d": "classic"}  # right: a, b, c, d


def prepared(
    lamp_task: str, groups: Mapping[str, str], optimum: pl.DataFrame | None = None
) -> Prepared:
    """Few-shot users and their groups; optimum: the best answers, where the world has some."""
    with store().new("prepare") as folder:
        users = {"user_id": list(groups), "group": list(groups.values())}
        pl.DataFrame(users).write_parquet(folder.path / "few_shot.parquet")
        if optimum is not None:
            optimum.write_parquet(folder.path / OPTIMUM_FILE)
    return Prepared(
        task=get_task(lamp_task),
        base=NO_FILE,
        anchor=NO_FILE,
        few_shot=folder.file("few_shot.parquet"),
        pooled=NO_FILE,
        optimum=None if optimum is None else folder.file(OPTIMUM_FILE),
        few_shot_ids=tuple(groups),
        instruction="",
        longest_candidate=1,
        counts={},
        dropped={},
        audit={},
    )


def answered(queries: Mapping[str, tuple[str, str]], predictions: Mapping[str, str]) -> Answers:
    """A method's answers in one batch. queries: query -> user, gold; predictions: query -> text."""
    rows = pl.DataFrame(
        [
            {"user_id": user, "query_id": query, "gold": gold, "prediction": predictions[query]}
            for query, (user, gold) in queries.items()
        ]
    )
    with store().new("answers") as folder:
        users = rows.group_by("user_id", maintain_order=True).all()
        users.write_parquet(folder.path / "predictions.parquet")
    file = folder.file("predictions.parquet")
    return Answers(users=tuple(users["user_id"]), predictions=file, work=NO_FILE)
