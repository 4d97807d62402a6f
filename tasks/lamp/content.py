"""What items and queries are about, and short keys that stand for it.

Two items are about the same when their subjects (`LampTask.subject`) agree, white space normalised;
a query asks for the item that is about the same. LaMP-7's queries ask for their gold: their text is
a paraphrase, the gold is the tweet. Same author, duplicate and leak are questions of equality, so
keys answer them as well as gigabytes of text.
"""

from pathlib import Path

import polars as pl

from tasks.lamp.definitions import LampTask
from tasks.lamp.tables import lists, mapped

# What `str.strip` strips; polars strips a little less.
WHITE_SPACE = "".join(c for c in map(chr, range(0x3001)) if c.isspace())
_CLASS = "".join(f"\\x{{{ord(c):x}}}" for c in WHITE_SPACE)
# White space that is not a single blank.
_UNEVEN = f"[{_CLASS}]{{2,}}|[{_CLASS.replace(chr(92) + 'x{20}', '')}]"
SLICE = 100  # users whose texts are in memory at once


def about(text: pl.Expr, task: LampTask) -> pl.Expr:
    """What items' texts are about."""
    if task.asks:
        text = text.str.splitn(task.asks, 2).struct.field("field_0")
    return text.str.replace_all(_UNEVEN, " ").str.strip_chars(" ")


def asked(question: pl.Expr, task: LampTask) -> pl.Expr:
    """What queries are about: the item's own text (`prompts.question_text`)."""
    parts = question.str.splitn(task.marker, 2).struct
    return about(pl.coalesce(parts.field("field_1"), parts.field("field_0")), task)


def about_and_answer(column: str, task: LampTask) -> dict[str, pl.Expr]:
    """What items (column profile) or queries (query) are `about`, and their `answer`.

    Where an item's answer is its text (LaMP-7), white space in answers is normalised as well.
    """
    field = pl.col(column).struct.field
    if column == "query":
        text, answer = asked(field("input"), task), field("gold")
    else:
        text, answer = about(field("text"), task), field("answer")
    if task.items == "completed":
        answer = about(answer, task)
    return {"about": text, "answer": answer}


def keyed(users: Path, task: LampTask) -> pl.DataFrame:
    """Return the users of an Arrow file (`formats.copy_users`) with keys instead of texts.

    The columns of `formats.Loaded.users`, but an item's text and a query's input are hashes; so are
    answers and golds where the task has no labels. An id is the number of the item, or of the
    query, in the file (`tables.write_sides`). Hashes have 64 bits: among ten million texts, two
    have the same one with a probability of three in a million.
    """
    frame = mapped(users)
    for column, names in (("profile", ("text", "answer")), ("query", ("input", "gold"))):
        key = about_and_answer(column, task)
        answer = key["answer"] if task.labels else key["answer"].hash()
        texts = {names[0]: key["about"].hash(), names[1]: answer}
        parts = (
            part.select(pl.col(column).explode(empty_as_null=False)).select(**texts)
            for part in (frame[:0], *frame.iter_slices(SLICE))
        )
        flat = pl.concat(parts).with_row_index("id").cast(pl.String)
        keys = lists(frame[column].list.len().to_numpy(), flat.to_struct())
        frame = frame.with_columns(pl.Series(column, pl.from_arrow(keys)))
    return frame
