"""A summary before each question: counted by hand, or written by the base model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from tasks.answer import answers, how_answered
from tasks.base_model import base_model
from tasks.lamp.definitions import get_task
from tasks.lora.base import load_base
from tasks.lora.batches import encode
from tasks.methods.profile_summary import FEWEST, WORDS, counted, fitting, question
from tasks.prepare import prepared_users
from tasks.report.table import costs
from tasks.results.store import store
from tasks.text.questions import User, setting_of
from tests.unit.lora.helpers import tiny_base
from tests.unit.stages.pipeline import (
    ONE_MORE_ITEM,
    ROLES,
    config_of,
    noted,
    predictions,
    run,
    stage_keys,
)

METHOD = "profile_summary"


def profile(*answers: str) -> User:
    return {"profile": [{"id": str(n), "text": "t", "answer": a} for n, a in enumerate(answers)]}


def test_labels_counted_by_hand() -> None:
    user = profile("comedy", "action", "comedy", "classic", "romance", "action", "sci-fi", "x")
    # Five at most; of a tie what was given first.
    wanted = "tag: comedy 2, action 2, classic 1, romance 1, sci-fi 1"
    assert counted(get_task("LaMP-2M"), user) == wanted


def test_words_of_headlines_counted_by_hand() -> None:
    found = counted(get_task("LaMP-4"), profile("the cat and the dog", "a dog", "the end"))
    assert found == "title: the 3, dog 2, cat 1, and 1, a 1"


def tagged(name: str, number: int, tag: str) -> str:
    return f"description: {name} film number {number} tag: {tag}"


@pytest.mark.parametrize(("room", "fits"), [(3000, True), (1000, True), (64, False)])
def test_items_share_the_room(room: int, fits: bool) -> None:
    """Ten items of 70 words: as many words of each as fit, and one more would not."""
    base, task = tiny_base(), get_task("LaMP-2M")
    base = replace(base, max_tokens=room)
    text = " ".join(["film"] * 70)
    user = {"profile": [{"text": text, "answer": "comedy"} for _ in range(10)]}
    found, words = fitting(base, task, user)
    assert found == encode(base, question(task, user, words), None)
    assert (found.truncated, len(found.prompt) <= room) == (not fits, True)
    assert question(task, user, words).count("film") == 10 * words
    assert words == WORDS if room == 3000 else FEWEST <= words < WORDS
    if words not in (WORDS, FEWEST):
        assert encode(base, question(task, user, words + 1), None).truncated


def test_the_base_model_writes_it(place: Path, work: dict[str, list[Any]]) -> None:
    """By transformers alone: what it writes stands before each question, as base answers that."""
    cell = run(place, ROLES, methods=["base", METHOD])
    given = predictions(cell, METHOD)
    sizes = []
    for user in ROLES["few_shot"]:
        name, tag = user["user_id"], user["profile"][0]["tag"]
        shown = "\n".join(tagged(name, number, tag) for number in range(4))
        asked = (
            f"{shown}\nThese are the descriptions of one user, each with the tag that the user "
            "gave. In one sentence, how does this user choose a tag? Answer:"
        )
        whole = {"profile": [{"text": f"{name} film number {n}", "answer": tag} for n in range(4)]}
        assert question(cell.users.task, whole) == asked
        # The model takes 64 tokens: the end of what it is asked.
        (told,) = stock_texts(place, asked)
        about = f"### User Profile:\n{' '.join(told.split())}"
        sizes.append(len(about.encode()))
        prompts = [f"{about}\ndescription: {name} film number {n} tag:" for n in (4, 5)]
        wanted = stock_texts(place, *prompts, most=cell.users.task.max_new_tokens)
        assert [given[f"{name}-q{n}"] for n in range(2)] == wanted
    assert given != predictions(cell, "base")
    assert costs(cell, METHOD)["bytes_per_user"] == pytest.approx(sum(sizes) / 3, abs=0.5)

    # Found again; a user's new item is another summary, and so another answer of this user alone.
    with pytest.MonkeyPatch.context() as patch:
        whom = noted(patch, "tasks.methods.profile_summary.written", lambda _, users: len(users))
        work["answers"].clear()
        with stage_keys() as keys:
            run(place, ROLES, methods=[METHOD])
            assert (whom, work["answers"]) == ([], [])
            run(place, ONE_MORE_ITEM, methods=[METHOD])
        assert (whom, work["answers"]) == ([1], [["few-0"]])
        assert len(keys["answers"]) == 2


def stock_texts(place: Path, *prompts: str, most: int = 64) -> list[str]:
    """Greedily by transformers, each prompt cut to the 64 tokens that the model takes."""
    base = load_base(place / "model", max_tokens=64, device="cpu")
    texts = []
    for prompt in prompts:
        ids = torch.tensor([encode(base, prompt, None).prompt])
        assert ids.shape[1] <= 64
        with torch.no_grad():
            output = base.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=most
            )
        new = output[0, ids.shape[1] :]
        texts.append(base.tokenizer.decode(new, skip_special_tokens=True).strip())
    return texts


def test_the_tiny_model_is_told_the_counts(place: Path) -> None:
    """It stands before the question, in the keys of answers, and among what a user costs."""
    config = config_of(place, ROLES, methods=["base", METHOD])
    users, own = prepared_users(config), config.method(METHOD)
    base = base_model(config, users)
    setting = setting_of(config, own, users, base)
    setting = setting.model_copy(update={"base": base.model_copy(update={"model": "tiny"})})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.text.loading.model_folder", lambda _: place / "model")
        asked = noted(patch, "tasks.model.tokens_of", lambda *given: list(given[4]))
        found = answers(how_answered(own), users.few_shot, users.few_shot_ids, None, None, setting)
    tags = [user["profile"][0]["tag"] for user in ROLES["few_shot"]]
    assert [user["about"] for user in asked[0]] == [f"tag: {tag} 4" for tag in tags]
    assert found.bytes_per_user == round(sum(len(f"tag: {tag} 4") for tag in tags) / 3)
    assert pl.read_parquet(store().path(found.predictions))["user_id"].to_list() == [
        *users.few_shot_ids
    ]
