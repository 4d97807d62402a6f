"""Users' questions as token ids: made once per user, kept in the store, mapped by every stage.

Adapting, embedding, anchors' training, evidence, stacking and scoring ask the same questions again
and again. Their tokens are kept user by user, by what they depend on: the user's items or queries,
the options of prompts, the tokenizer. Whether they were found or made changes nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tasks.base_model import prompt_parts
from tasks.config import RunConfig
from tasks.lamp.definitions import get_task
from tasks.questions import content, encode_all, profile_questions, user_queries
from tasks.running.progress import Progress
from tasks.store.artifacts import Store
from tasks.store.pieces import digest, library_versions

if TYPE_CHECKING:
    from tasks.lora.base import Base
    from tasks.lora.batches import Encoded
    from tasks.lora.tokens import Samples

VERSION = 1
FILE = "tokens.safetensors"
# A piece holds the users of about this many tokens (4 MB): it is hashed when one is wanted.
PIECE_TOKENS = 2**20
# From this many users on there is something to watch.
SHOWN_USERS = 1000
# profile: each item asked about itself, with its answer. queries: without an answer; golds: with
# the gold; choices: with each of the task's labels, query by query.
Kind = Literal["profile", "queries", "golds", "choices"]
User = Mapping[str, Any]


def tokens_of(
    options: RunConfig,
    where: Store,
    lamp_task: str,
    instruction: str,
    base: dict[str, Any],
    loaded: Base,
    kind: Kind,
    users: Iterable[User],
) -> list[Samples]:
    """Each user's samples of a kind, in order: found in the store, or made and put there.

    base: the `base_model` result that `loaded` comes from. users: records with `profile` and, for
    all kinds but `profile`, `query`; gone through twice, so that
    they need not be in memory together.
    """
    from tasks.lora.tokens import read_tokens

    shared = digest(
        {
            "version": VERSION,
            "libraries": library_versions(("transformers", "tokenizers")),
            "lamp_task": lamp_task,
            "kind": kind,
            # The tokenizer comes with the model, adapted to the task or not.
            "base": base["ref"]["sha256"],
            "max_tokens": loaded.max_tokens,
            **prompt_parts(options, instruction),
        }
    )
    keys = [digest([shared, *_content(options, kind, user)]) for user in users]
    found: dict[str, Samples] = {}
    files: dict[Path, list[Samples]] = {}
    for key, (piece, number) in where.find_rows("tokens", keys).items():
        if piece.folder not in files:
            files[piece.folder] = read_tokens(piece.folder / FILE)
        found[key] = files[piece.folder][number]
    encoded = (
        (key, _encode(options, lamp_task, instruction, loaded, kind, user))
        for key, user in _unknown(f"{lamp_task}: tokenising users", keys, users, found)
    )
    for part in _portions(encoded):
        found |= _keep(where, part)
    return [found[key] for key in keys]


def _content(options: RunConfig, kind: Kind, user: User) -> list[Any]:
    """What of a user decides the tokens, beside what is the same for all users."""
    if kind == "profile":
        return [content(user["profile"])]
    asked = [[item["input"], item["gold"] if kind == "golds" else None] for item in user["query"]]
    return [asked, content(user["profile"]) if options.prompt.history_items else None]


def _encode(
    options: RunConfig, lamp_task: str, instruction: str, loaded: Base, kind: Kind, user: User
) -> list[Encoded]:
    if kind == "profile":
        asked = profile_questions(options, lamp_task, instruction, user["profile"])
        return encode_all(loaded, asked, answers=True)
    asked = user_queries(options, lamp_task, instruction, user)
    if kind == "choices":
        labels = get_task(lamp_task).labels
        asked = [replace(one, answer=label) for one in asked for label in labels]
    return encode_all(loaded, asked, answers=kind != "queries")


def _unknown(
    title: str, keys: list[str], users: Iterable[User], found: Iterable[str]
) -> Iterator[tuple[str, User]]:
    """The users whose key is not found, one per key."""
    todo = set(keys).difference(found)
    if not todo:
        return
    progress = Progress("tokens", title, len(todo)) if len(todo) >= SHOWN_USERS else None
    for key, user in zip(keys, users, strict=True):
        if key in todo:
            yield key, user
            todo.remove(key)
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


def _keep(where: Store, part: Mapping[str, list[Encoded]]) -> dict[str, Samples]:
    """The users' samples as a piece of the store, by key; `part` may then be forgotten."""
    from tasks.lora.tokens import read_tokens, write_tokens

    def make(out: Path) -> dict[str, Any]:
        write_tokens(out / FILE, list(part.values()))
        return {"rows": list(part), "samples": sum(map(len, part.values()))}

    piece = where.get("tokens", digest(list(part)), make)
    return dict(zip(part, read_tokens(piece.folder / FILE), strict=True))
