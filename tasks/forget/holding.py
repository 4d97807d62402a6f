"""Whether a file holds something of a user: an id as a whole value, or a text within a value.

Ids are not looked for in fields of content: a user "4" is not every rating of 4. What is for
reading (HTML, tables, logs) is searched as text, ids there as whole words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from html import unescape
from pathlib import Path
from typing import Any

import polars as pl
from safetensors import safe_open

from tasks.errors import label
from tasks.lamp.definitions import TASKS
from tasks.results.store import RESULTS

# Shorter texts ("ok") stand within others by chance; as whole values they are found all the same.
LEAST_WITHIN = 12
# Fields that hold no users' ids: texts, answers, labels; and ids of items and queries and counts of
# items, which look as users' ids do.
CONTENT = {
    "text", "answer", "input", "gold", "output", "prediction", "audit", "instruction",
    "profile", "query", "query_id", "golds", "curve", "task",
} | {name for task in TASKS.values() for name in (task.text_field, task.answer_field)}  # fmt: skip
WRITTEN = (".html", ".txt", ".csv", ".log")
# Tokens of a model; short numbers are tokens as often as users' ids.
VOCABULARY = "tokenizer.json"


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
