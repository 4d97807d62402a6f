"""`prompt.history_index=published` against rank_bm25, fed and asked as the MTA code does it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_bm25 import BM25Okapi

from tasks.lamp.definitions import get_task
from tasks.lamp.formats import read_users
from tasks.lamp.history import Neighbours
from tasks.lamp.options import PromptOptions
from tasks.lamp.prompts import Prompts
from tasks.lamp.synthetic import World
from tests.unit.lamp.helpers import REAL_FILE, how, needs_real_file
from tests.unit.lamp.test_history import ranked
from tests.unit.lamp.worlds import SMALL, TASKS

REAL_FOLDER = REAL_FILE.parents[1] / "real" / "full"
Words = list[str]

# Of each task's scripts: the words of an item in the index, of an item that
# is asked about, and of a query's `input`.
SCRIPTS: dict[str, tuple[Callable[[Any], Words], Callable[[Any], Words], Callable[[str], Words]]]
SCRIPTS = {
    "LaMP-1": (
        lambda item: item["title"].split(" "),
        lambda item: item["title"].split(" "),
        # The script ends a title at the first quotation mark in it: a fault that is not followed.
        lambda asked: asked.split('title "')[1].split('", which')[0].split(" "),
    ),
    "LaMP-2M": (
        lambda item: [*item["description"].split(), *item["tag"].split()],
        lambda item: item["description"].split(),
        lambda asked: asked.split(),
    ),
    "LaMP-3": (
        lambda item: item["text"].split(" "),
        lambda item: item["text"].split(" "),
        # "Review:" is what the script looks for, and the data have "review:".
        lambda asked: asked.strip().split(" "),
    ),
    "LaMP-4": (
        lambda item: f"{item['title']} {item['text']}".strip().split(" "),
        lambda item: item["text"].split(" "),
        lambda asked: asked.split("following article:", 1)[1].strip().split(" "),
    ),
    "LaMP-5": (
        lambda item: item["abstract"].split(" "),
        lambda item: item["abstract"].split(" "),
        lambda asked: asked.split("abstract of a paper:", 1)[1].strip().split(" "),
    ),
}


def orders(name: str, user: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """Of each item and each query the profile's items, the most similar first."""
    indexed, asking, querying = SCRIPTS[name]
    corpus = [indexed(item) for item in user["profile"]]
    items = []
    for index, item in enumerate(user["profile"]):
        others = [other for other in range(len(corpus)) if other != index]
        scores = BM25Okapi([corpus[other] for other in others]).get_scores(asking(item))
        items.append([others[place] for place in ranked(scores)])
    whole = BM25Okapi(corpus)
    asked = [querying(query["input"]) for query in user["query"]]
    return items, [ranked(whole.get_scores(question)) for question in asked]


def found(
    name: str, profile: list[Any], queries: list[Any], index: Any = "published"
) -> tuple[list[list[str]], list[list[str]]]:
    """The lines of history in the prompts of each item and each query."""
    given: Any = (
        get_task(name),
        PromptOptions(history_items=len(profile), history_index=index),
        "",
    )
    samples = Prompts(*given).of_items(profile), Prompts(*given).of_queries(profile, queries)
    return tuple([one.prompt.split("\n")[:-1] for one in own] for own in samples)  # type: ignore[return-value]


def check(name: str, file: Path, users: int | None = None) -> None:
    raw = json.loads(file.read_text(encoding="utf-8"))[:users]
    read = read_users(file, get_task(name)).users.to_dicts()
    for user, own in zip(raw, read, strict=False):
        assert len(own["profile"]) == len(user["profile"])
        plain = Prompts(get_task(name), how(), "").of_items(own["profile"])
        lines = [f"{one.prompt} {one.answer}" for one in plain]
        wanted = [[[lines[i] for i in order] for order in part] for part in orders(name, user)]
        assert list(found(name, own["profile"], own["query"])) == wanted


@pytest.mark.parametrize("name", TASKS)
def test_users_of_a_generated_world(name: str, tmp_path: Path) -> None:
    World(name, SMALL, 0).write(tmp_path)
    check(name, tmp_path / "user_few_shot.json", 8)


@needs_real_file
def test_the_real_movie_taggers() -> None:
    check("LaMP-2M", REAL_FILE)


@pytest.mark.skipif(not REAL_FOLDER.is_dir(), reason="real users (shared/data/real) are not here")
@pytest.mark.parametrize("name", TASKS)
def test_real_users(name: str) -> None:
    check(name, REAL_FOLDER / name / "user_few_shot.json", 12)


def test_answer_case_and_instruction_decide() -> None:
    """By hand: of three items each word that one of them has weighs ln(2.5 / 1.5), so what is asked
    with one finds its item, and what is asked with none the first."""
    movies = [("red fox", "comedy"), ("a Whale", "action"), ("one owl", "classic")]
    profile = [{"id": text, "text": text, "answer": tag} for text, tag in movies]
    asked = [
        "Which? description: a comedy, a classic",
        "Which? description: whale",
        "one description: x",
    ]
    queries = [{"id": text, "input": text, "gold": "comedy"} for text in asked]

    def firsts(index: Any) -> list[str]:
        lines = found("LaMP-2M", profile, queries, index)[1]
        return [own[0].removeprefix("description: ").split(" tag:")[0] for own in lines]

    # "a" twice outweighs "classic"; "whale" is not "Whale"; "one" stands in the instruction.
    assert firsts("published") == ["a Whale", "red fox", "one owl"]
    assert firsts("text") == ["a Whale", "a Whale", "red fox"]
    queries[0]["input"] = "Which? description: classic"
    assert (firsts("published")[0], firsts("text")[0]) == ("one owl", "red fox")


# Few words in two cases, more than one blank, and line breaks.
texts = st.lists(st.sampled_from("aAbBcd"), max_size=6).flatmap(
    lambda own: st.sampled_from([" ", "  ", "\n"]).map(lambda blank: blank.join(own))
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(texts, st.sampled_from("abx")), min_size=2, max_size=7))
def test_asked_with_other_words_than_indexed(items: list[tuple[str, str]]) -> None:
    """A question may have words that its own item lacks in the index, blanks among them."""
    corpus = [f"{text} {answer}".strip().split(" ") for text, answer in items]
    wanted = []
    for index, (text, _) in enumerate(items):
        others = [other for other in range(len(items)) if other != index]
        scores = BM25Okapi([corpus[other] for other in others]).get_scores(text.split(" "))
        wanted.append([others[place] for place in ranked(np.asarray(scores))])
    index = Neighbours(
        [f"{text} {answer}".strip() for text, answer in items], lambda t: t.split(" ")
    )
    assert index.others(len(items), [text for text, _ in items]) == wanted
