"""History in the prompt: what the tiny base model learns of it, and what `rag` asks with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tasks import base_model, scoring
from tasks.base_model import _lessons
from tasks.config import RunConfig, resolve
from tasks.lamp.definitions import MOVIE_TAGS
from tasks.lora.base import load_base
from tasks.lora.batches import encode
from tasks.stage import store
from tests.unit.lora.peft_reference import likelihood
from tests.unit.stages.pipeline import ROLES, Quiet, run, stock_answers
from tests.unit.stages.users import result

WORDS = ("ship", "ship farm", "farm baker", "baker robot")
ITEMS = [
    {"id": str(n), "text": f"a {words}", "answer": tag}
    for n, (words, tag) in enumerate(
        zip(WORDS, ("comedy", "classic", "romance", "sci-fi"), strict=True)
    )
]


def options(share: float, **given: Any) -> RunConfig:
    return resolve({"base": {"tiny": {"history_share": share}}, **given})


def lessons(chosen: RunConfig, name: str = "u", items: list[Any] = ITEMS) -> list[str]:
    samples = _lessons(chosen, "LaMP-2M", "", {"user_id": name, "profile": items})
    assert [sample.answer for sample in samples] == [item["answer"] for item in items]
    return [sample.prompt for sample in samples]


PLAIN = [f"description: a {words} tag:" for words in WORDS]


def test_no_share_is_plain() -> None:
    assert lessons(options(0.0)) == PLAIN


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


@pytest.fixture(scope="module")
def done(place: Path) -> dict[str, Any]:
    # Two texts in a prompt want room.
    wide = {"model": str(place / "model"), "max_tokens": 200}
    return run(place, ROLES, recipes_only=True, base=wide)


def predicted(done: dict[str, Any], method: str, **changes: Any) -> tuple[str, dict[str, str]]:
    """The name of the run's state, and the answers by query."""
    config = resolve(done["config"] | changes).for_method(method)  # type: ignore[arg-type]
    given = {"prepared": done["prepared"], "base": done["base"], "banked": None, "fused": None}
    users = done["prepared"]["value"]["few_shot"]
    state = scoring.predict.fn(
        config.model_dump(mode="json"), "LaMP-2M", given, method, 0, users, None
    )
    folder = store().open(result(state)["ref"]).folder
    table = pl.read_parquet(folder / "predictions.parquet")
    return state.name, dict(zip(table["query_id"], table["prediction"], strict=True))


def shown_before(item: dict[str, str], user: dict[str, Any]) -> list[str]:
    """Compact prompts of the user's queries, with one item of the history before each."""
    return [
        f"description: {item['description']} tag: {item['tag']}\n"
        f"description: {query['input'].partition('description: ')[2]} tag:"
        for query in user["query"]
    ]


def test_rag_asks_with_history(place: Path, done: dict[str, Any]) -> None:
    """Answers are transformers' own to the prompt that METHOD describes.

    Items differ in their number only. The words that all share count negatively (rank_bm25's rule,
    tests/unit/lamp/test_history.py), and item n of user n has one of them twice, "few-1 film number
    1": it comes last, and of the others, a tie, the first.
    """
    name, answers = predicted(done, "rag")
    assert name == "Completed"
    _, plain = predicted(done, "base")
    for number, user in enumerate(ROLES["few_shot"]):
        shown = user["profile"][0 if number else 1]
        own = [answers[query["id"]] for query in user["query"]]
        assert own == stock_answers(place, None, shown_before(shown, user))
    assert answers != plain
    assert predicted(done, "rag")[0] == "Cached"
    two = predicted(done, "rag", rag={"history_items": 2})
    assert two[0] == "Completed"
    assert two[1] != answers


def test_rag_asks_by_the_published_index(place: Path, done: dict[str, Any]) -> None:
    """As above, but "few-1" is one word between blanks: all items are a tie, so the first."""
    published = {"prompt": {"history_index": "published"}}
    name, answers = predicted(done, "rag", **published)
    assert name == "Completed"
    for user in ROLES["few_shot"]:
        shown = user["profile"][0]
        own = [answers[query["id"]] for query in user["query"]]
        assert own == stock_answers(place, None, shown_before(shown, user))
    # What shows no history is found again.
    predicted(done, "base")
    assert predicted(done, "base", **published)[0] == "Cached"


def test_the_tiny_model_learns_by_the_published_index(
    place: Path, done: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user whose items differ in case alone: "Ship" is its own word between blanks."""
    items = [{"id": t, "text": t, "answer": "comedy"} for t in ("ship", "Ship", "a Ship", "x")]
    by_text, published = options(1.0), options(1.0, prompt={"history_index": "published"})
    assert lessons(by_text, items=items)[1].startswith("description: ship tag")
    assert lessons(published, items=items)[1].startswith("description: a Ship tag")

    def trained(share: float, index: str) -> str:
        tiny = {"history_share": share, "hidden": 16, "layers": 1, "heads": 2, "steps": 1}
        changes = {"base": {"model": "tiny", "tiny": tiny}, "prompt": {"history_index": index}}
        config = resolve(done["config"] | changes).model_dump(mode="json")
        return base_model.base_model.fn(config, "LaMP-2M", done["prepared"]).name

    monkeypatch.setattr(base_model, "Progress", Quiet)
    states = [trained(s, i) for s in (0.0, 0.5) for i in ("text", "published")]
    assert states == ["Completed", "Cached", "Completed", "Completed"]


def test_likelihood_answers_with_the_likeliest_label(place: Path, done: dict[str, Any]) -> None:
    """By transformers' own likelihood of each of the fifteen tags, one at a time."""
    base = load_base(place / "model", max_tokens=200, device="cpu")
    _, generated = predicted(done, "base")
    assert not set(generated.values()) & set(MOVIE_TAGS)
    name, answers = predicted(done, "base", scoring={"answer": "likelihood"})
    assert name == "Completed"
    for user in ROLES["few_shot"]:
        for query in user["query"]:
            prompt = f"description: {query['input'].partition('description: ')[2]} tag:"
            scores = {tag: likelihood(base.model, encode(base, prompt, tag)) for tag in MOVIE_TAGS}
            assert answers[query["id"]] == max(scores, key=lambda tag: scores[tag])
