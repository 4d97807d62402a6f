"""What of a store goes with a user: what holds the user, and all that was made of it.

A file holds a user by an id as a whole value, or by a text within a value. Ids are not looked for
in fields of content: a user "4" is not every rating of 4. What is for reading (HTML, tables, logs)
is searched as text, ids there as whole words.

Each result says which stored folders it was made of and which it gave; what goes is the closure of
that. A folder that no result points to always goes: nothing tells whose it is.
"""

import json
import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from html import unescape
from pathlib import Path
from typing import Any

import polars as pl
from safetensors import safe_open

from tasks.errors import label
from tasks.lamp.definitions import TASKS
from tasks.results.store import MEMO, RESULTS, Store

# Shorter texts ("ok") stand within others by chance; as whole values they are found all the same.
LEAST_WITHIN = 12
# Fields without users' ids: texts, answers, labels; also ids of items and queries, and counts of
# items, which look like users' ids.
CONTENT = {
    "text", "answer", "input", "gold", "output", "prediction", "audit", "instruction",
    "profile", "query", "query_id", "golds", "curve", "task",
} | {name for task in TASKS.values() for name in (task.text_field, task.answer_field)}  # fmt: skip
WRITTEN = (".html", ".txt", ".csv", ".log")
# Tokens of a model; short numbers are tokens as often as users' ids.
VOCABULARY = "tokenizer.json"
MODELS = ("tiny_model", "task_adapt")
# What learns from all base users together.
OF_BASE_USERS = (*MODELS, "experts")
# By stage: a result of it is not spoiled by folders of these stages that name the user. Each anchor
# and few-shot user is trained alone, and what learned from the user counts by itself.
APART = {
    "tiny_model": ("prepare",),
    "task_adapt": ("prepare",),
    "meta_lora": ("prepare",),
    "experts": ("prepare", "bank"),
    "answers": ("prepare", "bank", "fusion"),
}
FOLDER = re.compile(r"[a-z_]+/[0-9a-f]{2}/[0-9a-f]{64}(?=/|$)")


@dataclass(frozen=True)
class Marks:
    """What is searched for: ids as whole values, texts as whole values or within longer ones."""

    ids: frozenset[str]
    texts: frozenset[str] = frozenset()

    @cached_property
    def whole(self) -> frozenset[str]:
        return self.ids | self.texts

    @cached_property
    def within(self) -> list[str]:
        return sorted(text for text in self.texts if len(text) >= LEAST_WITHIN)

    @cached_property
    def words(self) -> re.Pattern[str]:
        """The ids, as they are shown, where they stand as whole words in a text."""
        names = sorted({*self.ids, *map(label, self.ids)}, key=len, reverse=True)
        return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, names))})(?![\w-])")

    def in_values(self, values: Iterable[tuple[str, bool]]) -> bool:
        """Whether a mark is among values, each with whether it is content (as `strings` gives)."""
        return any(
            value in (self.texts if content else self.whole)
            or any(text in value for text in self.within)
            for value, content in values
        )

    def in_text(self, text: str) -> bool:
        plain = unescape(text)
        return bool(self.words.search(plain)) or any(part in plain for part in self.within)


def holds(file: Path, marks: Marks) -> bool:
    """Whether a file holds one of the marks. Raises OSError, ValueError for what cannot be read."""
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return any(_column_holds(column, marks) for column in pl.read_parquet(file))
    if file.name == VOCABULARY:
        return False
    if suffix == ".json" or file.parent.name == RESULTS:
        return marks.in_values(strings(json.loads(file.read_text(encoding="utf-8"))))
    if suffix == ".safetensors":
        with safe_open(file, framework="numpy") as opened:
            return marks.in_values(strings([opened.metadata(), *opened.keys()]))
    if suffix in WRITTEN:
        return marks.in_text(file.read_text(encoding="utf-8", errors="replace"))
    return False


def has_mark(place: Path, marks: Marks) -> bool:
    """Whether a file, or any in a folder, holds a mark, or is there and cannot be read."""
    files = place.rglob("*") if place.is_dir() else [place]
    try:
        return any(holds(file, marks) for file in files if file.is_file())
    except Exception:
        return True


def strings(value: Any, content: bool = False) -> Iterator[tuple[str, bool]]:
    """Every string in a JSON value, names of fields too, and whether it is below a CONTENT field.

    JSON within a string is read as well; a whole number counts as the string that users' ids are.
    """
    if isinstance(value, str):
        yield value, content
        if value[:1] in ("{", "["):
            try:
                inner = json.loads(value)
            except ValueError:
                return
            yield from strings(inner, content)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key), content
            if key in ("user_id", "id") and isinstance(item, int):
                yield str(item), content
            yield from strings(item, content or key in CONTENT)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item, content)


def _column_holds(column: pl.Series, marks: Marks, content: bool = False) -> bool:
    content = content or column.name in CONTENT
    if isinstance(column.dtype, pl.List | pl.Array):
        return _column_holds(column.explode(), marks, content)
    if isinstance(column.dtype, pl.Struct):
        return any(_column_holds(inner, marks, content) for inner in column.struct.unnest())
    if column.dtype != pl.String:
        return False
    values = column.unique()
    within = marks.within and values.str.contains_any(marks.within).any()
    return bool(within or values.is_in(list(marks.texts if content else marks.whole)).any())


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

    @property
    def base_model(self) -> bool:
        """Whether a base model goes, and with it all that was trained on it."""
        return any(stage_of(uri) in MODELS for uri in self.folders)

    @property
    def learned(self) -> set[str]:
        """Folders a bank would have numbers of; the stored bank goes for the map beside it."""
        trained = (*MODELS, "meta_lora")
        return self.taught | {uri for uri in self.folders if stage_of(uri) in trained}

    def named_in(self, run: Any, marks: Marks) -> bool:
        """Whether a run as JSON names the user or what goes; None is one that cannot be read."""
        named = run is None or marks.in_values(strings(run))
        return named or bool(folders_in(run) & self.folders)


def marks_of(store: Store, user_id: str, texts: set[str]) -> Marks:
    """What is searched for: the id, rows with the user's items, and texts, there and in files."""
    names, of_user = {user_id}, set(texts)
    for file in store.root.glob("prepare/??/*/*.parquet"):
        try:
            rows = pl.scan_parquet(file).filter(pl.col("user_id") == user_id).collect().to_dicts()
        except (OSError, pl.exceptions.PolarsError):
            continue  # damaged: its folder goes as a whole
        for row in rows:
            names |= {row["row"]} if "row" in row else set()
            of_user |= {item["text"] for item in row.get("profile", ())}
            of_user |= {item["input"] for item in row.get("query", ())}
    return Marks(frozenset(names), frozenset(text for text in of_user if text.strip()))


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
    return {match.group() for text, _ in strings(value) if (match := FOLDER.match(text))}


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
