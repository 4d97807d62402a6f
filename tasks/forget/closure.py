"""What of a store goes with a user: what holds the user, and all that was made of it.

Each result says which stored folders it was made of and which it gave; what goes is the closure of
that. A folder that no result points to always goes: nothing tells whose it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from tasks.forget.holding import Marks, has_mark, strings
from tasks.results.store import MEMO, RESULTS, Store

MODELS = ("tiny_model", "task_adapt")
# What learns from all base users together.
OF_BASE_USERS = (*MODELS, "experts")
# Folders of these stages do not spoil a result of that stage because they name the user: each
# anchor and few-shot user is trained alone, and what the user was trained into counts by itself.
APART = {
    "tiny_model": ("prepare",),
    "task_adapt": ("prepare",),
    "meta_lora": ("prepare",),
    "experts": ("prepare", "bank"),
    "answers": ("prepare", "bank", "fusion"),
}
FOLDER = re.compile(r"[a-z_]+/[0-9a-f]{2}/[0-9a-f]{64}(?=/|$)")


@dataclass(frozen=True)
class Kept:
    """A result that Prefect keeps; one that cannot be read counts as one that names the user."""

    file: Path
    made_of: frozenset[str] = frozenset()
    gave: frozenset[str] = frozenset()
    names_user: bool = True

    def spoiled(self, gone: Container[str], taught: Container[str]) -> bool:
        """Whether it was made of what goes. taught: tables whose base side has the user."""
        stage = self.file.name.rpartition("-")[0]
        apart = APART.get(stage, ())
        return any(
            (stage in OF_BASE_USERS and uri in taught)
            or (uri in gone and stage_of(uri) not in apart)
            for uri in self.made_of
        )


@dataclass(frozen=True)
class Going:
    """What of a store goes: folders, by uri, and files.

    taught: of the folders, tables whose base side has the user.
    """

    folders: set[str] = field(default_factory=set)
    files: list[Path] = field(default_factory=list)
    taught: set[str] = field(default_factory=set)


def marks_of(store: Store, user_id: str, texts: set[str]) -> Marks:
    """What is searched for: the id, rows with the user's items, and texts, there and in files."""
    names, found = {user_id}, set(texts)
    for file in store.root.glob("prepare/??/*/*.parquet"):
        try:
            rows = pl.scan_parquet(file).filter(pl.col("user_id") == user_id).collect().to_dicts()
        except (OSError, pl.exceptions.PolarsError):
            continue  # damaged: its folder goes as a whole
        for row in rows:
            names |= {row["row"]} if "row" in row else set()
            found |= {item["text"] for item in row.get("profile", ())}
            found |= {item["input"] for item in row.get("query", ())}
    return Marks(frozenset(names), frozenset(text for text in found if text.strip()))


def what_goes(store: Store, marks: Marks) -> Going:
    """What was made of the user; nothing where nothing in the store holds a mark."""
    places = {place.relative_to(store.root).as_posix(): place for place in store.folders()}
    results = [_result(file, marks) for file in sorted((store.root / RESULTS).glob("*"))]
    files = [file for file in sorted((store.root / MEMO).glob("*")) if has_mark(file, marks)]
    gone = {uri for uri, place in places.items() if has_mark(place, marks)}
    if not (gone or files or any(result.names_user for result in results)):
        return Going()
    taught = {uri for uri in gone if has_mark(store.root / uri / "base.parquet", marks)}
    gone |= places.keys() - {uri for result in results for uri in result.gave}
    before: set[str] = set()
    while before != gone:
        before = set(gone)
        gone.update(*(result.gave for result in results if result.spoiled(gone, taught)))
    files += [
        result.file
        for result in results
        if result.names_user or result.gave & gone or result.spoiled(gone, taught)
    ]
    return Going(gone & places.keys(), files, taught)


def folders_in(value: Any) -> set[str]:
    """The stored folders that a JSON value points to, or to a file in them."""
    return {found.group() for text, _ in strings(value) if (found := FOLDER.match(text))}


def stage_of(uri: str) -> str:
    return uri.partition("/")[0]


def _result(file: Path, marks: Marks) -> Kept:
    try:
        values = json.loads(json.loads(file.read_text(encoding="utf-8"))["result"])["data"]
        made_of = frozenset(values["made_of"])
    except (OSError, ValueError, KeyError, TypeError):
        return Kept(file)
    gave = frozenset(folders_in(values) - made_of)
    return Kept(file, made_of, gave, marks.in_values(strings(values)))
