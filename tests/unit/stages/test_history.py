"""History in the prompt: what the tiny base model learns of it, and what `rag` asks with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks.base_model import Lessons, base_model
from tasks.config.run import resolve
from tasks.config.task import TaskConfig
from tasks.lamp.definitions import MOVIE_TAGS
from tasks.lora.base import load_base
from tasks.lora.batches import encode
from tasks.prepare import prepared_users
from tasks.results.models import Base
from tests.unit.lora.peft_reference import likelihood
from tests.unit.stages.answered import prepared
from tests.unit.stages.pipeline import (
    ROLES,
    config_of,
    predictions,
    run,
    stage_keys,
    stock_answers,
)

WORDS = ("ship", "ship farm", "farm baker", "baker robot")
ITEMS = [
    {"id": str(n), "text": f"a {words}", "answer": tag}
    for n, (words, tag) in enumerate(
        zip(WORDS, ("comedy", "classic", "romance", "sci-fi"), strict=True)
    )
]


def options(share: float, **given: Any) -> TaskConfig:
    config = resolve({"base": {"tiny": {"history_share": share}}, **given})
    return config.for_task("LaMP-2M", config.seed)


def lessons(chosen: TaskConfig, name: str = "u", items: list[Any] = ITEMS) -> list[str]:
    """The prompts that the tiny model of this configuration learns from a user."""
    given: list[tuple[Lessons, int]] = []

    def tiny_model(
        _tiny: Any, _most: int, lessons: Lessons, _users: Any, seed: int, _: Any
    ) -> Base:
        given.append((lessons, seed))
        return Base(model="tiny", content="none", dtype="float32", max_tokens=64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.base_model.tiny_model", tiny_model)
        base_model(chosen, prepared("LaMP-2M", {name: "g"}))
    ((own, seed),) = given
    # The version of tasks/lamp/history.py is part of the key.
    assert own.longer is None or own.longer.retrieval == 2
    samples = own.of({"user_id": name, "profile": items}, seed)
    assert [sample.answer for sample in samples] == [item["answer"] for item in items]
    return [sample.prompt for sample in samples]


PLAIN = [f"description: a {words} tag:" for words in WORDS]


@pytest.mark.usefixtures("where")
def test_no_share_is_plain() -> None:
    assert lessons(options(0.0)) == PLAIN


@pytest.mark.usefixtures("where")
def test_the_whole_share_has_history() -> None:
    """The most similar other item by BM25, by hand: the one that shares a word.

    A rare word counts for more, a short text, too: "ship farm" has both as neighbours, and "a ship"
    is the shorter; "farm baker" has the longer two, equal, so the earlier.
    """
    shown = {0: 1, 1: 0, 2: 1, 3: 2}
    wanted = [
        f"description: a {WORDS[other]} tag: {ITEMS[other]['answer']}\n{PLAIN[own]}"
        for own, other in shown.items()
    ]
    assert lessons(options(1.0)) == wanted
    two = lessons(options(1.0, rag={"history_items": 2}))
    assert all(prompt.count("\n") == 2 for prompt in two)
    # A history that is shown anyway stays.
    both = options(0.0, prompt={"history_items": 1})
    assert lessons(both) == wanted


@pytest.mark.usefixtures("where")
def test_a_share_is_drawn_per_user_and_seed() -> None:
    """Of 400 items a quarter, give or take four standard deviations (8.7)."""
    items = [ITEMS[n % 4] | {"id": str(n)} for n in range(400)]
    plain, history = lessons(options(0.0), items=items), lessons(options(1.0), items=items)
    some = lessons(options(0.25), items=items)
    assert all(own in pair for own, *pair in zip(some, plain, history, strict=True))

    def marks(prompts: list[str]) -> list[bool]:
        return ["\n" in prompt for prompt in prompts]

    assert abs(sum(marks(some)) - 100) < 35
    assert lessons(options(0.25), items=items) == some
    assert marks(lessons(options(0.25), "v", items)) != marks(some)
    assert marks(lessons(options(0.25, seed=1), items=items)) != marks(some)
    # More share, the same items and more.
    more = marks(lessons(options(0.5), items=items))
    assert all(more[n] for n, one in enumerate(marks(some)) if one)


def predicted(place: Path, method: str, **changes: Any) -> tuple[str, dict[str, str]]:
    """The cache key of the answers, and these by query."""
    # Two texts in a prompt want room.
    with stage_keys() as keys:
        cell = run(place, ROLES, methods=[method], base={"max_tokens": 200}, **changes)
    (key,) = keys["answers"]
    return key, predictions(cell, method)


def shown_before(item: dict[str, str], user: dict[str, Any]) -> list[str]:
    """Compact prompts of the user's queries, with one item of the history before each."""
    return [
        f"description: {item['description']} tag: {item['tag']}\n"
        f"description: {query['input'].partition('description: ')[2]} tag:"
        for query in user["query"]
    ]


def test_rag_asks_with_history(place: Path) -> None:
    """Answers are transformers' own to the prompt of docs/method.md (Prompts).

    Items differ in their number only. The words that all share count negatively (rank_bm25's rule,
    tests/unit/lamp/test_history.py), and item n of user n has one of them twice, "few-1 film number
    1": it comes last, and of the others, a tie, the first.
    """
    key, answers = predicted(place, "rag")
    _, plain = predicted(place, "base")
    for number, user in enumerate(ROLES["few_shot"]):
        shown = user["profile"][0 if number else 1]
        own = [answers[query["id"]] for query in user["query"]]
        assert own == stock_answers(place, None, shown_before(shown, user))
    assert answers != plain
    assert predicted(place, "rag")[0] == key
    two = predicted(place, "rag", rag={"history_items": 2})
    assert two[0] != key
    assert two[1] != answers


def test_rag_asks_by_the_published_index(place: Path) -> None:
    """As above, but "few-1" is one word between blanks: all items are a tie, so the first."""
    published = {"prompt": {"history_index": "published"}}
    key, answers = predicted(place, "rag", **published)
    assert key != predicted(place, "rag")[0]
    for user in ROLES["few_shot"]:
        shown = user["profile"][0]
        own = [answers[query["id"]] for query in user["query"]]
        assert own == stock_answers(place, None, shown_before(shown, user))
    # What shows no history is found again.
    assert predicted(place, "base", **published)[0] == predicted(place, "base")[0]


def test_the_tiny_model_learns_by_the_published_index(place: Path) -> None:
    """A user whose items differ in case alone: "Ship" is its own word between blanks."""
    items = [{"id": t, "text": t, "answer": "comedy"} for t in ("ship", "Ship", "a Ship", "x")]
    by_text, published = options(1.0), options(1.0, prompt={"history_index": "published"})
    assert lessons(by_text, items=items)[1].startswith("description: ship tag")
    assert lessons(published, items=items)[1].startswith("description: a Ship tag")

    def trained(share: float, index: str) -> str:
        tiny = {"history_share": share, "hidden": 16, "layers": 1, "heads": 2, "steps": 1}
        base = {"model": "tiny", "tiny": tiny}
        config = config_of(place, ROLES, base=base, prompt={"history_index": index})
        with stage_keys() as keys:
            base_model(config, prepared_users(config))
        (key,) = keys["tiny_model"]
        return key

    keys = [trained(share, index) for share in (0.0, 0.5) for index in ("text", "published")]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_likelihood_answers_with_the_likeliest_label(place: Path) -> None:
    """By transformers' own likelihood of each of the fifteen tags, one at a time."""
    base = load_base(place / "model", max_tokens=200, device="cpu")
    key, generated = predicted(place, "base")
    assert not set(generated.values()) & set(MOVIE_TAGS)
    other, answers = predicted(place, "base", scoring={"answer": "likelihood"})
    assert other != key
    for user in ROLES["few_shot"]:
        for query in user["query"]:
            prompt = f"description: {query['input'].partition('description: ')[2]} tag:"
            scores = {tag: likelihood(base.model, encode(base, prompt, tag)) for tag in MOVIE_TAGS}
            assert answers[query["id"]] == max(scores, key=lambda tag: scores[tag])
