"""Users' questions as token ids: made once per user, kept in the store, mapped by every stage.

Adapting, embedding, training, evidence and answering ask the same questions again and again. Their
tokens are kept user by user (tasks/results/rows.py), by what they depend on: the user's items or
queries, the prompt, the tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from tasks.record import File, key_of, library_versions
from tasks.results.models import Base, Questions
from tasks.results.rows import known_rows
from tasks.results.store import store
from tasks.running.progress import Progress
from tasks.text.questions import User, content, encode_all, profile_questions, user_queries

if TYPE_CHECKING:
    from tasks.lora.base import Base as LoadedBase
    from tasks.lora.batches import Encoded
    from tasks.lora.tokens import Samples

VERSION = 2
FILE = "tokens.safetensors"
# A folder holds the users of about this many tokens (4 MB): it is hashed when one is wanted.
PIECE_TOKENS = 2**20
# From this many users on there is something to watch.
SHOWN_USERS = 1000
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
    # The tokenizer comes with the model, adapted to the task or not.
    libraries = library_versions(("transformers", "tokenizers"))
    shared = key_of(VERSION, libraries, questions, kind, base.content, loaded.max_tokens)
    keys = [key_of(shared, _content(questions, kind, user)) for user in users]
    found = known_rows("tokens", keys, _read)
    encoded = (
        (key, samples_of(questions, loaded, kind, user))
        for key, user in _unknown(f"{questions.task.name}: tokenising users", keys, users, found)
    )
    for part in _portions(encoded):
        found |= _keep(part)
    return [found[key] for key in keys]


def _content(questions: Questions, kind: Kind, user: User) -> list[Any]:
    """What of a user decides the tokens, beside what is the same for all users."""
    if kind == "profile":
        return [content(user["profile"])]
    asked = [[item["input"], item["gold"] if kind == "golds" else None] for item in user["query"]]
    return [asked, content(user["profile"]) if questions.prompt.history_items else None]


def samples_of(questions: Questions, loaded: LoadedBase, kind: Kind, user: User) -> list[Encoded]:
    """One user's samples of a kind."""
    if kind == "profile":
        return encode_all(loaded, profile_questions(questions, user["profile"]), answers=True)
    asked = user_queries(questions, user)
    if kind == "choices":
        labels = questions.task.labels
        asked = [replace(one, answer=label) for one in asked for label in labels]
    return encode_all(loaded, asked, answers=kind != "queries")


def _unknown(
    title: str, keys: list[str], users: Iterable[User], found: Iterable[str]
) -> Iterator[tuple[str, User]]:
    """The users whose key is not found, one per key."""
    missing = set(keys).difference(found)
    if not missing:
        return
    progress = Progress("tokens", title, len(missing)) if len(missing) >= SHOWN_USERS else None
    for key, user in zip(keys, users, strict=True):
        if key in missing:
            yield key, user
            missing.remove(key)
            if progress:
                progress.advance()


def _portions(
    encoded: Iterable[tuple[str, list[Encoded]]],
) -> Iterator[dict[str, list[Encoded]]]:
    """The users in portions of about PIECE_TOKENS, so that few are in memory at once."""
    part: dict[str, list[Encoded]] = {}
    held = 0
    for key, samples in encoded:
        part[key] = samples
        held += sum(len(sample.prompt) + len(sample.answer) for sample in samples)
        if held >= PIECE_TOKENS:
            yield part
            part, held = {}, 0
    if part:
        yield part


def _keep(part: Mapping[str, list[Encoded]]) -> dict[str, Samples]:
    """Store the users' samples, by key; `part` may then be forgotten."""
    from tasks.lora.tokens import write_tokens

    with store().new("tokens", list(part)) as folder:
        write_tokens(folder.path / FILE, list(part.values()))
    return dict(zip(part, _read(folder.file()), strict=True))


def _read(folder: File) -> list[Samples]:
    from tasks.lora.tokens import read_tokens

    return read_tokens(store().path(folder) / FILE)
