"""Users of the usual shape, by far the most, read a block at a time, as columns.

polars parses a block several times as fast as the standard library, but it makes strings of numbers
and of true, and null of what is missing, and of a repeated key it takes the first. So a block is
taken only where that is ruled out: no value is null, it has as many keys as its objects have
fields, and as many quotes as strings need, or no value that looks like anything but a string or a
whole number. Any other block is no error here: it is looked at value by value
(tasks/lamp/formats.py). Both ways keep the same (test_records.py).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from tasks.lamp.definitions import LampTask

# What `str.strip` strips; polars' own idea of white space is a little smaller.
WHITE_SPACE = "".join(c for c in map(chr, range(0x3001)) if c.isspace())

# What reads the same whether it was a string or a number, and what may not have been a string.
_INTEGER = r"^(?:[0-9]{1,18}|-[1-9][0-9]{0,17})$"
_DOUBTFUL = r"^(?:[-+.0-9eE]+|true|false|-?inf|NaN)$"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_PAIR = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
# Bytes compared at once: the masks stay in the processor's cache.
_STEP = 1 << 17


class Shape(NamedTuple):
    """The fields of a user, of a profile item and of a query."""

    user: tuple[str, ...]
    profile: tuple[str, ...]
    query: tuple[str, ...]

    def schema(self) -> dict[str, Any]:
        kinds: dict[str, Any] = dict.fromkeys(self.user, pl.String)
        for name in ("profile", "query"):
            if name in kinds:
                fields = getattr(self, name)
                kinds[name] = pl.List(pl.Struct(dict.fromkeys(fields, pl.String)))
        return kinds


class Block(NamedTuple):
    """Users [U] with their items [N], all strings.

    users: the fields of users but the profile; query is a list of structs. lengths: [U], the items
    of each. clean: no item is to be dropped, and no profile is empty.
    """

    users: pl.DataFrame
    lengths: np.ndarray
    ids: pl.Series
    texts: pl.Series
    answers: pl.Series
    clean: bool


class Usual:
    """Reads blocks of users of the shape that was seen last.

    asked: the fields of a user that must be there, beside the profile.
    """

    def __init__(self, task: LampTask, *asked: str) -> None:
        self._asked = asked
        self._names = ("id", task.text_field, task.answer_field)
        self._labels = pl.Series(task.labels, dtype=pl.String)
        self.shape: Shape | None = None

    def learn(self, user: Any) -> None:
        """Take the shape of a user, as JSON has it and without fault, if it can be read here."""
        queries = user.get("query", [])
        known = self.shape.query if self.shape else ("id", "input", "gold")
        if user["profile"]:
            query = tuple(queries[0]) if queries else known
            shape = Shape(tuple(user), tuple(user["profile"][0]), query)
            if {*self._names} <= {*shape.profile}:
                self.shape = shape

    def read(self, block: bytes, shape: Shape) -> Block | None:
        """The users of a JSON list, or None if it is not certain that all are of that shape."""
        try:
            users = pl.read_json(block, schema=shape.schema())
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, UnicodeError):
            return None
        lists = [name for name in ("profile", "query") if name in shape.user]
        if users.is_empty() or any(users[name].null_count() for name in lists):
            return None
        flat = {name: users[name].explode(empty_as_null=False) for name in lists}
        ids, texts, answers = (flat["profile"].struct.field(name) for name in self._names)
        strings = [ids, texts, answers, *(users[name] for name in self._asked)]
        if "query" in lists:
            strings += [flat["query"].struct.field(name) for name in ("id", "input", "gold")]
        if any(column.null_count() for column in strings) or _blank(ids):
            return None
        objects = [(users.height, len(shape.user))]
        objects += [(len(flat[name]), len(getattr(shape, name))) for name in lists]
        keys = sum(count * fields for count, fields in objects)
        scalars = keys - users.height * len(lists)
        found = _Characters(block)
        if not found.sure or found.keys != keys:
            return None
        if found.quotes != 2 * (keys + scalars) and any(map(_doubtful, strings)):
            return None
        lengths = users["profile"].list.len().to_numpy()
        known = answers.is_in(self._labels.implode()) if len(self._labels) else None
        clean = (known.all() if known is not None else not _blank(answers)) and not (
            _blank(texts) or _repeated(texts, lengths) or not lengths.all()
        )
        return Block(users.drop("profile"), lengths, ids, texts, answers, bool(clean))


class _Characters:
    """What the bytes of a block of JSON say of it.

    keys: those with their colon right behind them. quotes: those that begin or end a string, or
    fewer. sure: there is no other key, and no escape that is half a character.
    """

    def __init__(self, block: bytes) -> None:
        text = np.frombuffer(block, np.uint8)
        self.quotes = 0
        colons, backslashes = [], []
        for start in range(0, len(text), _STEP):
            part = text[start : start + _STEP]
            self.quotes += int(np.count_nonzero(part == ord('"')))
            colons.append(np.flatnonzero(part == ord(":")) + start)
            backslashes.append(np.flatnonzero(part == ord("\\")) + start)
        colon, escape = np.concatenate(colons), np.concatenate(backslashes)
        # The block begins with a bracket and a brace, and ends with them.
        before, second = text[colon - 1], text[colon - 2]
        # An escaped quote before a colon stands in a string, and ends no key.
        self.keys = int(np.count_nonzero((before == ord('"')) & (second != ord("\\"))))
        spaced = (before <= 32) & ((second <= 32) | (second == ord('"')))
        after = text[escape + 1]
        self.quotes -= int(np.count_nonzero(after == ord('"')))
        self.sure = not spaced.any()
        if ((after == ord("u")) & (text[escape + 2] | 32 == ord("d"))).any():
            self.sure &= len(_SURROGATE.findall(block)) == 2 * len(_PAIR.findall(block))


def _doubtful(strings: pl.Series) -> bool:
    """Does one look as if it had been something else than a string or a plain whole number?"""
    rest = strings.filter(~strings.str.contains(_INTEGER))
    return bool(rest.str.contains(_DOUBTFUL).any())


def _blank(strings: pl.Series) -> bool:
    return bool((strings.str.strip_chars(WHITE_SPACE) == "").any())


def _repeated(texts: pl.Series, lengths: np.ndarray) -> bool:
    """May a user have a text twice? By hash, so a yes is not certain."""
    users = np.repeat(np.arange(len(lengths), dtype=np.uint64), lengths)
    hashes = np.sort(texts.hash().to_numpy() ^ (users * np.uint64(0x9E3779B97F4A7C15)))
    return bool((hashes[1:] == hashes[:-1]).any())
