"""Tokens kept in the store: the same as made on the spot, and made once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from tasks.config.run import resolve
from tasks.lamp.definitions import MOVIE_TAGS
from tasks.lora import batches
from tasks.lora.base import Base as LoadedBase
from tasks.lora.batches import Encoded, encode
from tasks.record import File
from tasks.results.models import Base, Questions
from tasks.results.store import Store
from tasks.text import tokens as tokens_module
from tasks.text.questions import profile_questions, questions_of, user_queries
from tasks.text.tokens import Kind, tokens_of
from tests.unit.lora.helpers import tiny_base
from tests.unit.stages.answered import prepared

pytestmark = pytest.mark.usefixtures("where")
RESULT = Base(model="none", content="the model", dtype="float32", max_tokens=64)
INSTRUCTION = "Which tag? description: "
HISTORY = {"prompt": {"history_items": 1}}


@pytest.fixture(scope="module")
def base() -> LoadedBase:
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


def questions(**given: Any) -> Questions:
    config = resolve(given).for_task("LaMP-2M", 0)
    users = prepared("LaMP-2M", {"ann": "g"}).model_copy(update={"instruction": INSTRUCTION})
    return questions_of(config.prompt, users, "some/model")


def ask(
    base: LoadedBase, kind: Kind, people: list[dict[str, Any]], result: Base = RESULT, **given: Any
) -> list[list[Encoded]]:
    return [list(own) for own in tokens_of(questions(**given), result, base, kind, people)]


def by_hand(base: LoadedBase, kind: Kind, who: dict[str, Any], **given: Any) -> list[Encoded]:
    how = questions(**given)
    if kind == "profile":
        asked = profile_questions(how, who["profile"])
        return [encode(base, one.prompt, one.answer) for one in asked]
    asked = user_queries(how, who)
    if kind == "choices":
        asked = [replace(one, answer=label) for one in asked for label in MOVIE_TAGS]
    return [encode(base, one.prompt, None if kind == "queries" else one.answer) for one in asked]


@pytest.mark.parametrize("kind", ["profile", "queries", "golds", "choices"])
@pytest.mark.parametrize("given", [{}, HISTORY, {"prompt": {"style": "published"}}])
def test_they_are_those_made_on_the_spot(
    where: Store,
    base: LoadedBase,
    kind: Kind,
    given: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = [by_hand(base, kind, who, **given) for who in PEOPLE]
    assert ask(base, kind, PEOPLE, **given) == expected
    # From now on nothing is tokenised, in whatever company and order.
    monkeypatch.setattr(batches, "encode", None)
    assert ask(base, kind, PEOPLE[::-1], **given) == expected[::-1]
    assert ask(base, kind, PEOPLE[1:2], **given) == expected[1:2]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that are tokenised from here on."""
    seen: list[str] = []
    real = batches.encode

    def encode(base: LoadedBase, prompt: str, answer: str | None) -> Encoded:
        seen.append(prompt)
        return real(base, prompt, answer)

    monkeypatch.setattr(batches, "encode", encode)
    return seen


def test_one_users_new_item_is_that_users_work(
    base: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(base, "profile", PEOPLE)
    seen = counted(monkeypatch)
    changed = [PEOPLE[0], person("bob", 3), PEOPLE[2]]
    found = ask(base, "profile", changed)
    assert [len(own) for own in found] == [3, 3, 4]
    assert len(seen) == 3
    assert all("bob" in prompt for prompt in seen)


def test_each_kind_and_prompt_is_an_entry_of_its_own(
    base: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(base, "profile", PEOPLE)
    seen = counted(monkeypatch)
    ask(base, "profile", PEOPLE, **HISTORY)
    assert len(seen) == 9
    ask(base, "queries", PEOPLE)
    ask(base, "golds", PEOPLE)
    assert len(seen) == 9 + 5 + 5
    # Without history in the prompt a query's tokens do not depend on the profile.
    longer = [{**who, "profile": [*who["profile"], *PEOPLE[2]["profile"]]} for who in PEOPLE]
    ask(base, "queries", longer)
    assert len(seen) == 19
    ask(base, "queries", PEOPLE, **HISTORY)
    ask(base, "queries", longer, **HISTORY)
    assert len(seen) == 29
    # Nor on what is trained, or by which seed.
    ask(base, "queries", PEOPLE, seed=7, stacking={"rank": 2})
    assert len(seen) == 29
    # Nor on what the model was adapted to, or its numbers' type: the tokenizer is the same.
    other = {"adapter": File(uri="a/b", sha256="c"), "dtype": "bfloat16"}
    ask(base, "queries", PEOPLE, RESULT.model_copy(update=other))
    assert len(seen) == 29
    # On where prompts are cut, and on the model they do.
    ask(replace(base, max_tokens=9), "profile", PEOPLE)
    assert len(seen) == 38
    ask(base, "profile", PEOPLE, RESULT.model_copy(update={"content": "another model"}))
    assert len(seen) == 47


def test_many_tokens_are_many_pieces(
    where: Store, base: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ask(base, "profile", PEOPLE)
    assert len(where.folders("tokens")) == 1
    monkeypatch.setattr(tokens_module, "PIECE_TOKENS", 1)
    assert ask(base, "queries", PEOPLE) != whole
    assert len(where.folders("tokens")) == 1 + 3


def test_a_damaged_file_is_made_again(where: Store, base: LoadedBase) -> None:
    first = ask(base, "profile", PEOPLE)
    (file,) = (where.root / "tokens").glob("*/*/tokens.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    assert ask(base, "profile", PEOPLE) == first
    file.unlink()
    assert ask(base, "profile", PEOPLE[:2]) == first[:2]


def test_jobs_at_once_get_the_same(base: LoadedBase) -> None:
    groups = [PEOPLE, PEOPLE[:2], PEOPLE[1:], PEOPLE] * 3
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda people: ask(base, "profile", people), groups))
    for people, got in zip(groups, found, strict=True):
        assert got == [by_hand(base, "profile", who) for who in people]


def test_progress_is_shown(base: LoadedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []

    class Progress:
        def __init__(self, *about: Any) -> None:
            shown.append(about)

        def update(self, done: int) -> None:
            shown.append(done)

    monkeypatch.setattr(tokens_module, "Progress", Progress)
    monkeypatch.setattr(tokens_module, "PIECE_TOKENS", 1)
    for _ in range(2):
        ask(base, "queries", PEOPLE)
    assert shown == [("tokens", "LaMP-2M: tokenising users", 3), 1, 2, 3]
