"""Tokens kept in the store: the same as made on the spot, and made once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from tasks import tokens as tokens_module
from tasks.config import RunConfig, resolve
from tasks.lamp.definitions import MOVIE_TAGS
from tasks.lora import batches
from tasks.lora.base import Base
from tasks.lora.batches import Encoded, encode
from tasks.questions import profile_questions, user_queries
from tasks.store.artifacts import Store
from tasks.tokens import Kind, tokens_of
from tests.unit.lora.helpers import tiny_base

RESULT = {"ref": {"sha256": "the model"}}
INSTRUCTION = "Which tag? description: "
HISTORY = {"prompt": {"history_items": 1}}


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_base()


def person(name: str, items: int, queries: int = 2) -> dict[str, Any]:
    words = [f"{name} film number {n}" for n in range(items + queries)]
    return {
        "user_id": name,
        "profile": [
            {"id": f"{n}", "text": words[n], "answer": MOVIE_TAGS[n]} for n in range(items)
        ],
        "query": [
            {
                "id": f"q{n}",
                "input": f"Which tag? description: {words[items + n]}",
                "gold": "comedy",
            }
            for n in range(queries)
        ],
    }


PEOPLE = [person("ann", 3), person("bob", 2), person("cleo", 4, queries=1)]


def ask(
    where: Store, base: Base, kind: Kind, people: list[dict[str, Any]], **given: Any
) -> list[list[Encoded]]:
    found = tokens_of(resolve(given), where, "LaMP-2M", INSTRUCTION, RESULT, base, kind, people)
    return [list(own) for own in found]


def pieces(where: Store) -> list[Any]:
    return sorted((where.root / "tokens").glob("*/*/record.json"))


def by_hand(base: Base, kind: Kind, who: dict[str, Any], config: RunConfig) -> list[Encoded]:
    if kind == "profile":
        asked = profile_questions(config, "LaMP-2M", INSTRUCTION, who["profile"])
        return [encode(base, one.prompt, one.answer) for one in asked]
    asked = user_queries(config, "LaMP-2M", INSTRUCTION, who)
    if kind == "choices":
        asked = [replace(one, answer=label) for one in asked for label in MOVIE_TAGS]
    return [encode(base, one.prompt, None if kind == "queries" else one.answer) for one in asked]


@pytest.mark.parametrize("kind", ["profile", "queries", "golds", "choices"])
@pytest.mark.parametrize("given", [{}, HISTORY, {"prompt": {"style": "published"}}])
def test_they_are_those_made_on_the_spot(
    where: Store, base: Base, kind: Kind, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [by_hand(base, kind, who, resolve(given)) for who in PEOPLE]
    assert ask(where, base, kind, PEOPLE, **given) == expected
    # From now on nothing is tokenised, in whatever company and order.
    monkeypatch.setattr(batches, "encode", None)
    assert ask(where, base, kind, PEOPLE[::-1], **given) == expected[::-1]
    assert ask(where, base, kind, PEOPLE[1:2], **given) == expected[1:2]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that are tokenised from here on."""
    seen: list[str] = []
    real = batches.encode

    def encode(base: Base, prompt: str, answer: str | None) -> Encoded:
        seen.append(prompt)
        return real(base, prompt, answer)

    monkeypatch.setattr(batches, "encode", encode)
    return seen


def test_one_users_new_item_is_that_users_work(
    where: Store, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(where, base, "profile", PEOPLE)
    seen = counted(monkeypatch)
    changed = [PEOPLE[0], person("bob", 3), PEOPLE[2]]
    found = ask(where, base, "profile", changed)
    assert [len(own) for own in found] == [3, 3, 4]
    assert len(seen) == 3
    assert all("bob" in prompt for prompt in seen)


def test_each_kind_and_prompt_is_an_entry_of_its_own(
    where: Store, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(where, base, "profile", PEOPLE)
    seen = counted(monkeypatch)
    ask(where, base, "profile", PEOPLE, **HISTORY)
    assert len(seen) == 9
    ask(where, base, "queries", PEOPLE)
    ask(where, base, "golds", PEOPLE)
    assert len(seen) == 9 + 5 + 5
    # Without history in the prompt a query's tokens do not depend on the profile.
    longer = [{**who, "profile": [*who["profile"], *PEOPLE[2]["profile"]]} for who in PEOPLE]
    ask(where, base, "queries", longer)
    assert len(seen) == 19
    ask(where, base, "queries", PEOPLE, **HISTORY)
    ask(where, base, "queries", longer, **HISTORY)
    assert len(seen) == 29
    # Nor on what is trained, or by which seed.
    ask(where, base, "queries", PEOPLE, seed=7, stacking={"rank": 2})
    assert len(seen) == 29
    # On where prompts are cut they do.
    ask(where, replace(base, max_tokens=9), "profile", PEOPLE)
    assert len(seen) == 38


def test_many_tokens_are_many_pieces(
    where: Store, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ask(where, base, "profile", PEOPLE)
    assert len(pieces(where)) == 1
    monkeypatch.setattr(tokens_module, "PIECE_TOKENS", 1)
    assert ask(where, base, "queries", PEOPLE) != whole
    assert len(pieces(where)) == 1 + 3


def test_a_damaged_file_is_made_again(where: Store, base: Base) -> None:
    first = ask(where, base, "profile", PEOPLE)
    (file,) = (where.root / "tokens").glob("*/*/tokens.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    assert ask(where, base, "profile", PEOPLE) == first
    file.unlink()
    assert ask(where, base, "profile", PEOPLE[:2]) == first[:2]


def test_jobs_at_once_get_the_same(where: Store, base: Base) -> None:
    groups = [PEOPLE, PEOPLE[:2], PEOPLE[1:], PEOPLE] * 3
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda people: ask(where, base, "profile", people), groups))
    for people, got in zip(groups, found, strict=True):
        assert got == [by_hand(base, "profile", who, resolve({})) for who in people]


def test_what_takes_long_is_shown(
    where: Store, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []

    class Progress:
        def __init__(self, *about: Any) -> None:
            shown.append(about)

        def advance(self) -> None:
            shown.append("one more")

    monkeypatch.setattr(tokens_module, "Progress", Progress)
    ask(where, base, "profile", PEOPLE)
    assert shown == []
    monkeypatch.setattr(tokens_module, "SHOWN_USERS", 3)
    ask(where, base, "queries", PEOPLE)
    assert shown == [("tokens", "LaMP-2M: tokenising users", 3), *["one more"] * 3]
