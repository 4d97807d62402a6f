"""The synthetic world: reproducible, readable, and true to what it says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.config import SyntheticOptions
from tasks.errors import InputError
from tasks.lamp.audit import query_places
from tasks.lamp.definitions import get_task
from tasks.lamp.formats import read_users
from tasks.lamp.groups import split_users
from tasks.lamp.prompts import question_text
from tasks.lamp.synthetic import ROLE_FILES, write_synthetic

TASK = get_task("LaMP-2M")
SMALL = SyntheticOptions(
    base_users=5, anchor_candidates=4, few_shot_users=20, items_min=11, items_max=14
)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        truth = write_synthetic(tmp_path / name, SMALL, seed)
        assert json.loads((tmp_path / name / "truth.json").read_text()) == truth
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert all(a[name] != c[name] for name in a)


def test_more_users_leave_the_others_alone(tmp_path: Path) -> None:
    more = SMALL.model_copy(update={"few_shot_users": 30, "base_users": 9})
    write_synthetic(tmp_path / "a", SMALL, 0)
    write_synthetic(tmp_path / "b", more, 0)
    for file in ROLE_FILES.values():
        few, many = (json.loads((tmp_path / name / file).read_text()) for name in "ab")
        assert many[: len(few)] == few


def test_reads_and_splits_without_loss(tmp_path: Path) -> None:
    write_synthetic(tmp_path, SMALL, 0)
    loaded = read_users(tmp_path, TASK)
    assert loaded.dropped == {}
    lengths = loaded.users["profile"].list.len()
    few_shot = loaded.users["role"] == "few_shot"
    assert lengths.filter(few_shot).to_list() == [10] * 20
    assert lengths.filter(~few_shot).is_between(11, 14).all()
    assert loaded.users["query"].list.len().to_list() == [0] * 9 + [20] * 20
    ids = loaded.users["profile"].explode().struct.field("id")
    assert ids.n_unique() == ids.len()
    split = split_users(loaded.users, TASK, seed=0, base_share=1 / 3, anchor_share=1 / 3, share=0.5)
    counts = split.counts
    assert (counts["groups"], counts["pooled_users"], counts["queries"]) == (29, 0, 400)
    assert query_places(split.few_shot, split.few_shot, TASK)["any"] == 0


def theme_of(text: str, truth: dict[str, Any]) -> int:
    """The theme with at least three of the text's words; another one has at most one."""
    words = set(text.split())
    (theme,) = [n for n, t in enumerate(truth["themes"]) if len(words & set(t["words"])) >= 3]
    assert sum(bool(words & set(t["words"])) for t in truth["themes"]) == 2
    return theme


def test_labels_follow_taste_except_noise(tmp_path: Path) -> None:
    truth = write_synthetic(tmp_path, SMALL, 1)
    hits = []
    for row in read_users(tmp_path, TASK).users.iter_rows(named=True):
        tags = truth["users"][row["user_id"]]["tags"]
        for item in row["profile"]:
            theme = theme_of(item["text"], truth)
            assert item["answer"] in truth["themes"][theme]["tags"]
            hits.append(item["answer"] == tags[theme])
        for query in row["query"]:
            told = truth["queries"][query["id"]]
            assert told["theme"] == theme_of(question_text(query["input"], TASK), truth)
            assert told["tag"] == tags[told["theme"]]
    # Noise 0.04, a quarter of which draws the same tag: 0.97 expected, sd 0.007 of ~700 items.
    assert 0.94 < sum(hits) / len(hits) < 0.995


def test_taste_mixes_two_archetypes(tmp_path: Path) -> None:
    options = SMALL.model_copy(update={"quirk": 0.0, "label_noise": 0.0, "mixture_min": 1.0})
    truth = write_synthetic(tmp_path / "pure", options, 0)
    for user in truth["users"].values():
        assert user["tags"] == truth["archetypes"][user["archetypes"][0]]
    mixed = write_synthetic(tmp_path / "mixed", options.model_copy(update={"mixture_min": 0.5}), 0)
    for user in mixed["users"].values():
        first, second = (mixed["archetypes"][n] for n in user["archetypes"])
        assert user["archetypes"][0] != user["archetypes"][1]
        assert 0.5 <= user["mixture"] <= 1.0
        assert all(t in (a, b) for t, a, b in zip(user["tags"], first, second, strict=True))


def test_smallest_world_and_too_many_themes(tmp_path: Path) -> None:
    tiny = SyntheticOptions(
        base_users=1, anchor_candidates=1, few_shot_users=1, themes=1, archetypes=2
    )
    truth = write_synthetic(tmp_path, tiny, 0)
    assert len(truth["users"]) == 3
    with pytest.raises(InputError, match=r"synthetic\.themes 6000: use at most 5000"):
        write_synthetic(tmp_path, tiny.model_copy(update={"themes": 6000}), 0)
