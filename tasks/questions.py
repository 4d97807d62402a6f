"""From users' profiles and queries to token batches: where `lamp` and `lora` meet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tasks.config import RunConfig
from tasks.lamp.definitions import get_task
from tasks.lamp.prompts import Sample, profile_samples, query_samples

if TYPE_CHECKING:
    from tasks.lora.base import Base
    from tasks.lora.batches import Encoded

# What a user's row in any table is about; item ids are carried along but decide nothing.
Item = Mapping[str, str]


def content(profile: Sequence[Item]) -> list[list[str]]:
    """What of a profile decides numbers, for cache keys: (text, answer) in order."""
    return [[item["text"], item["answer"]] for item in profile]


def profile_questions(
    config: RunConfig, lamp_task: str, instruction: str, profile: Sequence[Item]
) -> list[Sample]:
    """Each profile item asked about itself, leave-one-out (METHOD, Prompts)."""
    options = config.prompt
    return profile_samples(
        profile,
        get_task(lamp_task),
        options.style,
        options.history_items,
        instruction,
        options.history_index,
    )


def user_queries(
    config: RunConfig, lamp_task: str, instruction: str, user: Mapping[str, Any]
) -> list[Sample]:
    """The questions a few-shot user is scored on."""
    options = config.prompt
    return query_samples(
        user["profile"],
        user["query"],
        get_task(lamp_task),
        options.style,
        options.history_items,
        instruction,
        options.history_index,
    )


def encode_all(base: Base, samples: Iterable[Sample], answers: bool) -> list[Encoded]:
    """Samples as token ids; `answers` adds the answer, to train on or to measure."""
    from tasks.lora.batches import encode

    return [encode(base, item.prompt, item.answer if answers else None) for item in samples]
