"""A summary of the user's history in the prompt (PAG, profile-augmented generation).

The base model writes it, once per user (Richardson et al. 2023, arXiv 2310.20081). It stands before
every question. The tiny model cannot write sentences: for it the summary is the user's commonest
labels, or words of answers, with their counts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import TYPE_CHECKING

import polars as pl

from tasks.lamp.definitions import LampTask
from tasks.log import log
from tasks.methods.method import Method
from tasks.model import loaded_model
from tasks.record import File, key_of, library_versions
from tasks.results.rows import Rows
from tasks.results.store import store
from tasks.text.loading import LIBRARIES
from tasks.text.questions import User, content

if TYPE_CHECKING:
    from tasks.lora.base import Base
    from tasks.lora.batches import Encoded
    from tasks.stacking import Batch

VERSION = 2
# A written summary: its tokens at most; words shown of an item to write it, at most and at least.
TOKENS, WORDS, FEWEST = 64, 60, 8
# A counted summary: how many labels or words.
COUNTED = 5
FILE = "summaries.parquet"
# A summary, and the seconds it took.
Summary = tuple[str, float]


def summaries(batch: Batch) -> list[Summary]:
    """Per user a summary; a user who did not change keeps the one from before."""
    base, task = batch.setting.base, batch.setting.questions.task
    if base.model == "tiny":
        return [(counted(task, user), 0.0) for user in batch.users]
    how = (base, batch.how.quantisation, batch.setting.questions.prompt.chat)
    shared = key_of("summaries", VERSION, library_versions(LIBRARIES), task, how)
    keys = [key_of(shared, content(user["profile"])) for user in batch.users]
    rows: Rows[Summary] = Rows("summaries", keys, _read)
    if rows.missing:
        rows.add(written(batch, [batch.users[number] for number in rows.missing]))
        with rows.folder() as folder:
            table = pl.DataFrame(rows.all(), ["summary", "seconds"], orient="row")
            table.write_parquet(folder.path / FILE)
    return rows.all()


def counted(task: LampTask, user: User) -> str:
    """The user's commonest labels, or words of answers, with counts; of a tie the first."""
    answers = [item["answer"] for item in user["profile"]]
    said = answers if task.labels else [word for one in answers for word in one.split()]
    commonest = Counter(said).most_common(COUNTED)
    return f"{task.cue}: " + ", ".join(f"{what} {count}" for what, count in commonest)


def written(batch: Batch, users: list[User]) -> list[Summary]:
    """What the base model, without any LoRA, says the user prefers."""
    task = batch.setting.questions.task
    with loaded_model(batch.setting, batch.how.quantisation) as model:
        fitted = [fitting(model.base, task, user) for user in users]
        asked, engine = [[one] for one, _ in fitted], model.engine
        with engine.grouped(model.base.model, []) as layers:
            texts = engine.answer_users(model.base, layers, asked, lambda _: (None, None), TOKENS)
        each = model.seconds_each(len(users))
    cut = sum(one.truncated for one, _ in fitted)
    if short := sum(words < WORDS for _, words in fitted):
        log(
            f"{task.name}: profile_summary: of {len(users)} histories {short} are shown by fewer "
            f"than {WORDS} words an item, to fit base.max_tokens={model.base.max_tokens}; "
            f"{cut} lost their first items"
        )
    return [(f"### User Profile:\n{' '.join(text.split())}", each) for (text,) in texts]


def fitting(base: Base, task: LampTask, user: User) -> tuple[Encoded, int]:
    """The question with as many words of each item as the model takes, and how many these are.

    If even FEWEST are too many, its start is cut: the first items.
    """
    from tasks.lora.batches import encode

    def asked(words: int) -> Encoded:
        return encode(base, question(task, user, words), None)

    if not (whole := asked(WORDS)).truncated:
        return whole, WORDS
    cut = bisect_left(range(WORDS + 1), True, FEWEST, key=lambda words: asked(words).truncated)
    words = max(cut - 1, FEWEST)
    return asked(words), words


def question(task: LampTask, user: User, words: int = WORDS) -> str:
    """What the base model is asked. words: the most of an item's text.

    The last items stand nearest to the end, which is never cut.
    """
    items = []
    for item in user["profile"]:
        text = " ".join(item["text"].split()[:words])
        items.append(f"{task.text_field}: {text} {task.cue}: {item['answer']}")
    shown = "\n".join(items)
    return (
        f"{shown}\nThese are the {task.text_field}s of one user, each with the {task.cue} that the "
        f"user gave. In one sentence, how does this user choose a {task.cue}? Answer:"
    )


def _read(folder: File) -> list[Summary]:
    return list(pl.read_parquet(store().path(folder) / FILE).iter_rows())


METHOD = Method("profile_summary", order=12, about=summaries, default=False)
