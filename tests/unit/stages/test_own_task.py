"""A task of the user's own, in LaMP's shape, by a YAML file: through all stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.lamp_task import lamp_task
from tasks.config.run import resolve
from tasks.lora.adapters import write_peft
from tasks.lora.bank import read_bank
from tasks.results.run import Cell
from tasks.results.store import store
from tests.unit.stages.pipeline import OPTIONS, predictions, stock_answers
from tests.unit.stages.users import FILES

ANSWERS = {
    "classification": ("good", "bad", "mixed"),
    "rating": ("1", "3", "5"),
    "text": ("a fine place", "never again", "it was fine"),
}
METRICS = {
    "classification": {"accuracy", "macro_f1"},
    "rating": {"mae", "rmse"},
    "text": {"rouge1", "rougeL"},
}
LABELS = {
    "classification": "labels: [good, bad, mixed]",
    "rating": 'labels: ["1", "2", "3", "4", "5"]',
    "text": "",
}
ASKS = "How was the visit? review:"


def write_task(folder: Path, metric: str) -> Path:
    file = folder / "reviews.yaml"
    file.write_text(
        f"""# A task of a shop's own.
name: Reviews
text: review
answer: verdict
instruction: "{ASKS}"
metric: {metric}
max_new_tokens: 6
{LABELS[metric]}
"""
    )
    return file


def user(name: str, items: int, answers: tuple[str, ...], queries: int = 0) -> dict[str, Any]:
    """Each user has one answer to everything, and words of their own."""
    answer = answers[sum(name.encode()) % len(answers)]
    words = [f"{name} visit number {number}" for number in range(items + queries)]
    return {
        "user_id": name,
        "profile": [
            {"id": f"{name}-{n}", "review": words[n], "verdict": answer} for n in range(items)
        ],
        "query": [
            {"id": f"{name}-q{n}", "input": f"{ASKS} {words[items + n]}", "gold": answer}
            for n in range(queries)
        ],
    }


def run(place: Path, folder: Path, metric: str, style: str) -> Cell:
    answers = ANSWERS[metric]
    roles = {
        "base": [user(f"base-{n}", 3, answers) for n in range(2)],
        "anchor": [user(f"anchor-{n}", 3 + n, answers) for n in range(4)],
        "few_shot": [user(f"few-{n}", 4, answers, queries=2) for n in range(3)],
    }
    for role, users in roles.items():
        (folder / FILES[role]).write_text(json.dumps(users))
    config = resolve(
        {
            "task": str(write_task(folder, metric)),
            "data": str(folder),
            "base": {"model": str(place / "model"), "max_tokens": 128},
            "prompt": {"style": style},
            "methods": ["base", "rag", "oppu", "merge_only", "mta"],
            **OPTIONS,
            "oppu": OPTIONS["stacking"],
        }
    )
    assert config.lamp_tasks == ["Reviews"]
    return lamp_task(config.for_task("Reviews", config.seed))


@pytest.mark.parametrize(
    ("metric", "style"),
    [("classification", "compact"), ("rating", "published"), ("text", "published")],
)
def test_every_method_answers_and_is_scored(
    place: Path, tmp_path: Path, metric: str, style: str
) -> None:
    """The answers are those of stock PEFT to the prompts as docs/method.md has them."""
    cell = run(place, tmp_path, metric, style)
    assert (cell.name, cell.users.task.name, cell.missing) == ("Reviews", "Reviews", ())
    assert cell.users.counts["few_shot_users"] == 3
    for method in ("base", "rag", "oppu", "merge_only", "mta"):
        scored = cell.scored(method)
        assert scored is not None
        assert (scored.users, scored.queries) == (3, 6)
        assert set(cell.compared.intervals[method]) == METRICS[metric] | {"score"}
        golds = json.loads(store().path(scored.golds).read_text())
        assert {one["id"]: one["output"] for one in golds["golds"]} == predictions(cell, method)
    assert cell.compared.methods == ("base", "rag", "oppu", "merge_only", "mta")

    texts = [f"few-1 visit number {n}" for n in (4, 5)]
    prompts = {
        "compact": [f"review: {text} verdict:" for text in texts],
        "published": [f"### User Instruction:\n{ASKS}\nReview: {text} Verdict:" for text in texts],
    }[style]
    (oppu,) = cell.answers["oppu"]
    assert oppu.stacked is not None
    write_peft(tmp_path / "own", read_bank(store().path(oppu.stacked)).lora("few-1"), "base")
    for method, folder in (("base", None), ("oppu", tmp_path / "own")):
        given = predictions(cell, method)
        wanted = stock_answers(place, folder, prompts, max_new_tokens=6)
        assert [given[f"few-1-q{n}"] for n in range(2)] == wanted
