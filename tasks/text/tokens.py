"""Users' questions as token ids: made once per user, kept in the store, mapped by every stage.

Adapting, embedding, training, evidence and answering ask the same questions again and again. Their
tokens are kept user by user (tasks/results/rows.py), by what they depend on: the user's items or
queries, the prompt, the tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from tasks.record import File, key_of, library_versions
from tasks.results.models import Base, Questions
from tasks.results.rows import Rows
from tasks.results.store import store
from tasks.running.progress import Progress
from tasks.text.questions import User, content, profile_questions, user_queries

if TYPE_CHECKING:
    from tasks.lora.base import Base as LoadedBase
    from tasks.lora.batches import Encoded
    from tasks.lora.tokens import Samples

VERSION = 2
FILE = "tokens.safetensors"
# A folder holds the users of about this many tokens (4 MB): it is hashed when one is wanted.
PIECE_TOKENS = 2**20
# profile: each item asked about itself, with its answer. queries: without an answer; golds: with
# the gold; choices: with each of the task's labels, query by query.
Kind = Literal["profile", "queries", "golds", "choices"]


def tokens_of(
    questions: Questions, base: Base, loaded: LoadedBase, kind: Kind, users: Iterable[User]
) -> list[Samples]:
    """Each user's samples of a kind, in order: found in the store, or made and put there.

    users: records with `profile` and, for all kinds but `profile`, `query`; gone through twice, so
    that they need not be in memory together.
    """
    from tasks.lora.tokens import write_tokens

    # The tokenizer comes with the model, adapted to the task or not.
    libraries = library_versions(("transformers", "tokenizers"))
    shared = key_of(VERSION, libraries, questions, kind, base.content, loaded.max_tokens)
    keys = [key_of(shared, _content(questions, kind, user)) for user in users]
    rows = Rows("tokens", keys, _read)
    missing = {*rows.missing}
    if missing:
        title = f"{questions.task.name}: tokenising users"
        progress = Progress("tokens", title, len(missing))
        made = (
            samples_of(questions, loaded, kind, user)
            for number, user in enumerate(users)
            if number in missing
        )
        for part in _portions(made):
            with rows.folder(first=len(part)) as folder:
                write_tokens(folder.path / FILE, part)
            rows.add(_read(folder.file()), first=len(part))
            progress.update(len(missing) - len(rows.missing))
    return rows.all()


def _content(questions: Questions, kind: Kind, user: User) -> list[Any]:
    """What of a user decides the tokens, beside what is the same for all users."""
    if kind == "profile":
        return [content(user["profile"])]
    asked = [[item["input"], item["gold"] if kind == "golds" else None] for item in user["query"]]
    before = [user["about"]] if "about" in user else []
    return [asked, content(user["profile"]) if questions.prompt.history_items else None, *before]


def samples_of(questions: Questions, loaded: LoadedBase, kind: Kind, user: User) -> list[Encoded]:
    """One user's samples of a kind."""
    from tasks.lora.batches import encode

    if kind == "profile":
        asked = profile_questions(questions, user["profile"])
    else:
        asked = user_queries(questions, user)
    if kind == "choices":
        asked = [replace(one, answer=label) for one in asked for label in questions.task.labels]
    return [encode(loaded, one.prompt, None if kind == "queries" else one.answer) for one in asked]


def by_question(samples: Sequence[Encoded], choices: int) -> list[Sequence[Encoded]]:
    """One user's samples of the kind `choices`, question by question; choices: of each."""
    return [samples[start : start + choices] for start in range(0, len(samples), choices)]


def _portions(users: Iterable[list[Encoded]]) -> Iterator[list[list[Encoded]]]:
    """Users' samples in portions of about PIECE_TOKENS, so that few are in memory at once."""
    part: list[list[Encoded]] = []
    held = 0
    for samples in users:
        part.append(samples)
        held += sum(len(sample.prompt) + len(sample.answer) for sample in samples)
        if held >= PIECE_TOKENS:
            yield part
            part, held = [], 0
    if part:
        yield part


def _read(folder: File) -> list[Samples]:
    from tasks.lora.tokens import read_tokens

    return read_tokens(store().path(folder) / FILE)
