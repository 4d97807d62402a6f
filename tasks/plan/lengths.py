"""The data in tokens: lengths of the questions that the stages ask, nothing kept of the texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tasks.config import RunConfig
from tasks.lamp.definitions import get_task
from tasks.lamp.prompts import Sample
from tasks.lora.batches import Encoded, encode
from tasks.lora.passes import blank
from tasks.plan.model import Planned
from tasks.questions import profile_questions, user_queries

# English prose has 4 to 4.5 characters per token of a vocabulary like Llama's: this counts more.
CHARACTERS_PER_TOKEN = 4.0
# A chat template's own tokens, and those that open and close a text.
AROUND = 16

# Bytes in the store beside the tokens: of a user's key, and of a file's header and record.
KEY, FILE = 80, 1300

User = Mapping[str, Any]
# One user's questions, as blank samples of their lengths.
Lengths = list[Encoded]


class Measure:
    """Lengths of questions, by the model's tokenizer or by their characters.

    At most about `plan.max_items` profile items are looked at per call; the users between those
    looked at get lengths of theirs in turn. What was assumed is in `notes`, in order.
    """

    def __init__(
        self, options: RunConfig, lamp_task: str, instruction: str, planned: Planned
    ) -> None:
        self.options, self.lamp_task, self.instruction = options, lamp_task, instruction
        self.planned = planned
        self.notes: dict[str, None] = {}
        self._known: dict[Any, list[Lengths]] = {}
        self._kept: dict[Any, int] = {}
        if planned.base is None:
            self._note(f"no tokenizer: tokens are counted as characters / {CHARACTERS_PER_TOKEN:g}")

    def profiles(self, users: Sequence[User], history_items: int) -> list[Lengths]:
        """Per user the profile's items, each asked about itself, with its answer."""
        return self._once("profile", users, history_items, self._profiles)

    def queries(self, users: Sequence[User], history_items: int) -> list[Lengths]:
        """Per user the queries, without answers."""
        return self._once("queries", users, history_items, self._queries)

    def golds(self, users: Sequence[User], history_items: int) -> list[Lengths]:
        """Per user the queries, with their golds."""
        return self._once("golds", users, history_items, self._golds)

    def choices(self, users: Sequence[User], history_items: int) -> list[Lengths]:
        """Per user the queries with each of the task's labels."""
        return self._once("choices", users, history_items, self._choices)

    def texts(self, users: Iterable[User], most: int, own: bool) -> list[list[int]]:
        """Per user the tokens of each item's text and answer, at most `most`.

        own: by the model's tokenizer, where it is at hand; else by characters.
        """
        count = self._tokens if own else _by_characters
        return [
            [min(most, count(f"{item['text']} {item['answer']}")) for item in user["profile"]]
            for user in users
        ]

    @property
    def kept_bytes(self) -> int:
        """What the tokens of all that was asked for take in the store (tasks/lora/tokens.py)."""
        return sum(self._kept.values()) + FILE * len(self._known)

    def _once(
        self,
        kind: str,
        users: Sequence[User],
        history_items: int,
        make: Callable[[Sequence[User], RunConfig], list[Lengths]],
    ) -> list[Lengths]:
        # The profile's length is part of it: users are planned with fewer items, too.
        who = tuple((user["user_id"], len(user["profile"])) for user in users)
        key = (kind, history_items, who)
        if key not in self._known:
            prompt = self.options.prompt.model_copy(update={"history_items": history_items})
            options = self.options.model_copy(update={"prompt": prompt})
            self._known[key] = make(users, options)
            for user, own in zip(who, self._known[key], strict=True):
                ids = sum(len(one.prompt) + len(one.answer) for one in own)
                self._kept[kind, history_items, user] = 4 * ids + 13 * len(own) + KEY
        return self._known[key]

    def _profiles(self, users: Sequence[User], options: RunConfig) -> list[Lengths]:
        sizes = [len(user["profile"]) for user in users]
        stride = max(1, math.ceil(sum(sizes) / options.plan.max_items))
        looked: dict[int, Lengths] = {}
        for number in range(0, len(users), stride):
            profile = users[number]["profile"]
            asked = profile_questions(options, self.lamp_task, self.instruction, profile)
            looked[number] = [self._length(one, answer=True) for one in asked]
        pool = [one for own in looked.values() for one in own]
        if stride > 1:
            self._note(
                f"{len(pool)} of {sum(sizes)} profile items of {len(users)} users were looked at, "
                "the others are taken to be as long (plan.max_items)"
            )
        place = 0
        found: list[Lengths] = []
        for number, size in enumerate(sizes):
            if number in looked:
                found.append(looked[number])
                continue
            found.append([pool[(place + i) % len(pool)] for i in range(size)])
            place += size
        return found

    def _queries(self, users: Sequence[User], options: RunConfig) -> list[Lengths]:
        return [
            [self._length(one, answer=False) for one in self._asked(user, options)]
            for user in users
        ]

    def _golds(self, users: Sequence[User], options: RunConfig) -> list[Lengths]:
        return [
            [self._length(one, answer=True) for one in self._asked(user, options)] for user in users
        ]

    def _choices(self, users: Sequence[User], options: RunConfig) -> list[Lengths]:
        most = self.planned.max_tokens
        labels = [
            len(self._length(Sample("", "?", label), answer=True).answer)
            for label in get_task(self.lamp_task).labels
        ]
        return [
            [blank(min(len(one.prompt), most - label), label) for one in own for label in labels]
            for own in self._queries(users, options)
        ]

    def _asked(self, user: User, options: RunConfig) -> list[Sample]:
        return user_queries(options, self.lamp_task, self.instruction, user)

    def _length(self, sample: Sample, answer: bool) -> Encoded:
        if self.planned.base is not None:
            found = encode(self.planned.base, sample.prompt, sample.answer if answer else None)
            return blank(len(found.prompt), len(found.answer))
        most = self.planned.max_tokens
        labels = min(_by_characters(sample.answer) + 1, most // 2) if answer else 0
        prompt = _by_characters(sample.prompt) + AROUND
        return blank(min(prompt, most - labels), labels)

    def _tokens(self, text: str) -> int:
        if self.planned.base is None:
            return _by_characters(text)
        return len(self.planned.base.tokenizer(text, split_special_tokens=True)["input_ids"])

    def _note(self, line: str) -> None:
        self.notes[line] = None


def _by_characters(text: str) -> int:
    return math.ceil(len(text) / CHARACTERS_PER_TOKEN)
