"""What items and queries are about, and short keys that stand for it.

Two items are about the same when their subjects (`LampTask.subject`) agree, white space normalised;
a query asks for the item that is about the same. LaMP-7's queries ask for their gold: their text is
a paraphrase, the gold is the tweet. Same author, duplicate and leak are questions of equality, so
keys answer them as well as gigabytes of text.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from tasks.lamp.citations import UNASKED
from tasks.lamp.definitions import LampTask
from tasks.lamp.tables import ITEM, QUERY, USERS, lists, row_groups

# What `str.strip` strips; polars strips a little less.
WHITE_SPACE = "".join(c for c in map(chr, range(0x3001)) if c.isspace())
_CLASS = "".join(f"\\x{{{ord(c):x}}}" for c in WHITE_SPACE)
_SPACES = f"[{_CLASS}]+"
# Texts whose white space is not single blanks between words; most texts are quickly passed over.
_UNEVEN = f"[{_CLASS.replace(chr(92) + 'x{20}', '')}]|  |^ | $"


def about(texts: pl.Series, task: LampTask | None) -> pl.Series:
    """What items' texts are about. task: None is the whole text."""
    if task and task.asks:
        texts = texts.str.splitn(task.asks, 2).struct.field("field_0").rename(texts.name)
    uneven = texts.str.contains(_UNEVEN).fill_null(False).arg_true()
    if len(uneven):
        even = texts.gather(uneven).str.replace_all(_SPACES, " ").str.strip_chars(" ")
        texts = texts.scatter(uneven, even)
    return texts


def asked(inputs: pl.Series, task: LampTask) -> pl.Series:
    """What queries are about: the item's own text (`prompts.question_text`)."""
    parts = inputs.str.splitn(task.marker, 2).struct
    own = pl.select(pl.coalesce(parts.field("field_1"), parts.field("field_0"))).to_series()
    return about(own.alias(inputs.name), task)


def told(records: pl.Series, task: LampTask | None) -> tuple[pl.Series, pl.Series]:
    """What items (id, text, answer) or queries (id, input, gold) are about, and their answers.

    Where an item's answer is its text (LaMP-7), white space in answers is normalised as well.
    task: None is the whole text, for items only.
    """
    _, text, answer = (records.struct.field(name) for name in records.struct.fields)
    if task and task.items == "completed":
        answer = about(answer, task)
    return asked(text, task) if task and text.name == "input" else about(text, task), answer


def keyed(users: Path, task: LampTask) -> pl.DataFrame:
    """Return the users of a parquet file (`formats.copy_users`) with keys instead of texts.

    The columns of `formats.Loaded.users`, but an item's text and a query's input are keys, short
    numbers as text; so are answers and golds where the task has no labels. An id is the number of
    the item, or of the query, in the file (`sides.write_sides`). Keys come from hashes of 64 bits:
    among ten million texts, two have the same key with a probability of three in a million.
    """
    owners: list[pl.DataFrame] = []
    found: dict[str, list[pl.DataFrame]] = {"profile": [], "query": []}
    for table in row_groups(users):
        frame = pl.DataFrame(pl.from_arrow(table))
        # Own copies: a part of a string column would keep all of the block's texts.
        own = [pl.Series(name, frame[name].to_list(), pl.String) for name in ("user_id", "role")]
        owners.append(pl.DataFrame([*own, *(frame[name].list.len() for name in found)]))
        for name, parts in found.items():
            parts.append(_hashed(frame[name], task))
    if not owners:
        return pl.DataFrame(pl.from_arrow(USERS.empty_table()))
    table = pl.concat(owners)
    items, queries = (pl.concat(parts) for parts in found.values())
    texts, answers = [items["text"], queries["text"]], [items["answer"], queries["answer"]]
    if task.items == "completed":
        # One numbering: a gold is looked for among texts.
        numbers = _numbered([*texts, *answers])
        texts, answers = numbers[:2], numbers[2:]
    else:
        texts = _numbered(texts)
        answers = answers if task.labels else _numbered(answers)
    keys = dict(zip(found, zip(texts, answers, strict=True), strict=True))
    return table.with_columns(_listed(table[name], *keys[name]) for name in found)


def _hashed(column: pl.Series, task: LampTask) -> pl.DataFrame:
    """Per item or query of a column of lists: hash of what it is about; label or answer's hash."""
    text, answer = told(column.explode(empty_as_null=False), task)
    labels = pl.Enum([*task.labels, UNASKED])
    short = answer.cast(labels) if task.labels else answer.hash()
    return pl.DataFrame({"text": text.hash(), "answer": short})


def _numbered(columns: list[pl.Series]) -> list[pl.Series]:
    """Numbers for hashes, the same in all columns, as short text."""
    numbers = pl.concat(columns).rank("dense").cast(pl.String)
    ends = np.cumsum([len(column) for column in columns]).tolist()
    return [numbers[end - len(own) : end] for own, end in zip(columns, ends, strict=True)]


def _listed(lengths: pl.Series, texts: pl.Series, answers: pl.Series) -> pl.Series:
    ids = pl.Series(np.arange(len(texts), dtype=np.uint32)).cast(pl.String)
    columns = [own.cast(pl.String).to_arrow() for own in (ids, texts, answers)]
    kind = ITEM if lengths.name == "profile" else QUERY
    return pl.Series(lengths.name, pl.from_arrow(lists(lengths.to_numpy(), columns, kind)))
