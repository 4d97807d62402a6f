"""The synthetic worlds: reproducible, readable, and true to what they say of themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tasks.config.options import SYNTHETIC_TASKS
from tasks.errors import InputError
from tasks.lamp.audit import query_places
from tasks.lamp.definitions import get_task
from tasks.lamp.formats import read_users
from tasks.lamp.options import SyntheticOptions
from tasks.lamp.prompts import question_text
from tasks.lamp.synthetic import FAMILIES, World
from tasks.lamp.synthetic.families import clean_rating
from tests.unit.lamp.helpers import split_of
from tests.unit.lamp.test_definitions import REAL_QUERIES
from tests.unit.lamp.worlds import SMALL, TASKS, by_hand, read_item, read_text

FILES = ("user_base_LLM.json", "user_anchor_candidate.json", "user_few_shot.json")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_tasks_everywhere() -> None:
    assert list(FAMILIES) == list(SYNTHETIC_TASKS) == TASKS


@pytest.mark.parametrize("lamp_task", TASKS)
def test_same_seed_same_bytes(tmp_path: Path, lamp_task: str) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        World(lamp_task, SMALL, seed).write(tmp_path / name)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert all(a[name] != c[name] for name in a)


def test_tasks_have_worlds_of_their_own() -> None:
    worlds = [World(task, SMALL, 0) for task in TASKS]
    assert len({str(world.archetypes.tolist()) for world in worlds}) == len(TASKS)
    assert len({world.tastes()["few_shot-00000"].mixture for world in worlds}) == len(TASKS)


@pytest.mark.parametrize("lamp_task", TASKS)
def test_more_users_leave_the_others_alone(tmp_path: Path, lamp_task: str) -> None:
    more = SMALL.model_copy(update={"few_shot_users": 30, "base_users": 9})
    World(lamp_task, SMALL, 0).write(tmp_path / "a")
    World(lamp_task, more, 0).write(tmp_path / "b")
    for file in FILES:
        few, many = (json.loads((tmp_path / name / file).read_text()) for name in "ab")
        assert many[: len(few)] == few


@pytest.mark.parametrize("lamp_task", TASKS)
def test_reads_and_splits_without_loss(tmp_path: Path, lamp_task: str) -> None:
    World(lamp_task, SMALL, 0).write(tmp_path)
    task = get_task(lamp_task)
    loaded = read_users(tmp_path, task)
    assert loaded.dropped == {}
    lengths = loaded.users["profile"].list.len()
    few_shot = loaded.users["role"] == "few_shot"
    assert lengths.filter(few_shot).to_list() == [10] * 20
    assert lengths.filter(~few_shot).is_between(11, 14).all()
    assert loaded.users["query"].list.len().to_list() == [0] * 9 + [20] * 20
    ids = loaded.users["profile"].explode().struct.field("id")
    assert ids.n_unique() == ids.len()
    split = split_of(
        loaded.users, task, seed=0, base_share=1 / 3, anchor_share=1 / 3, same_author_share=0.5
    )
    counts = split.counts
    assert (counts["groups"], counts["pooled_users"], counts["queries"]) == (29, 0, 400)
    assert query_places(split.few_shot, split.few_shot, task)["own"] == 0


@pytest.mark.parametrize("lamp_task", TASKS)
def test_queries_have_the_wording_of_lamp(tmp_path: Path, lamp_task: str) -> None:
    World(lamp_task, SMALL, 0).write(tmp_path)
    (query, *_) = read_users(tmp_path, get_task(lamp_task)).users["query"].to_list()[-1]
    text = question_text(query["input"], get_task(lamp_task))
    start = REAL_QUERIES[lamp_task].removesuffix("THE TEXT")
    if lamp_task == "LaMP-2M":  # the test's own wording has two tags only
        assert query["input"].startswith(start[: start.index("[")])
    else:
        assert query["input"] == start + text


@pytest.mark.parametrize("lamp_task", TASKS)
def test_texts_say_theme_context_and_answer(tmp_path: Path, lamp_task: str) -> None:
    world = World(lamp_task, SMALL, 1)
    world.write(tmp_path)
    users = read_users(tmp_path, get_task(lamp_task)).users
    for role in world.counts:
        for index in (0, 1):
            _, items, queries = world.draw(role, index)
            (row,) = users.filter(user_id=f"{role}-{index:05d}").iter_rows(named=True)
            read = np.array([read_item(world, item) for item in row["profile"]])
            if lamp_task == "LaMP-1":  # the reader orders the references itself
                pairs = world.family.pairs  # type: ignore[attr-defined]
                wanted = [(t, pairs[c][a], pairs[c][1 - a]) for t, c, a in items]
                assert [(t, pairs[c][a], pairs[c][1 - a]) for t, c, a in read] == wanted
            else:
                assert (read == items).all()
            for number, query in enumerate(row["query"]):
                text = question_text(query["input"], get_task(lamp_task))
                theme, context, answers = read_text(world, text)
                assert (theme, context) == (*queries[number, :2],)
                assert answers[queries[number, 2]] == query["gold"]


@pytest.mark.parametrize("choices", [2, 4, 15])
@pytest.mark.parametrize("lamp_task", TASKS)
def test_table_is_the_one_that_the_docs_state(lamp_task: str, choices: int) -> None:
    options = SyntheticOptions(choices=choices, themes=2, archetypes=3, label_noise=0.1)
    joint = World(lamp_task, options, 0).joint
    expected = np.array(
        [by_hand(lamp_task, options, *index) for index in np.ndindex(*joint.shape)]
    ).reshape(joint.shape)
    np.testing.assert_allclose(joint, expected, atol=1e-12)
    np.testing.assert_allclose(joint.sum(axis=(2, 3)), 1.0)


def test_ratings_by_hand() -> None:
    # 4 choices: weights 0, 2/3, 4/3, 2. Odd archetypes are lenient (+1).
    assert [clean_rating(0, v, 1, 4) for v in range(4)] == [3, 4, 4, 5]
    assert [clean_rating(2, v, 2, 4) for v in range(4)] == [3, 4, 5, 5]  # 2 * 4/3 = 2.67 -> 3
    assert [clean_rating(0, v, -2, 4) for v in range(4)] == [3, 2, 1, 1]
    assert [clean_rating(1, v, 1, 4) for v in range(4)] == [4, 5, 5, 5]
    assert [clean_rating(5, v, -1, 4) for v in range(4)] == [4, 3, 3, 2]


@pytest.mark.parametrize("lamp_task", TASKS)
def test_items_follow_the_table(lamp_task: str) -> None:
    """Frequencies of 20,000 items of one taste, each within five standard deviations."""
    options = SyntheticOptions(themes=1, choices=3, label_noise=0.3)
    world = World(lamp_task, options, 0)
    taste, _, _ = world.draw("fresh", 0)
    drawn = world.items(taste, 20_000, np.random.default_rng(0))
    table = world.joint[taste.first, taste.values[0]]
    counts = np.zeros(table.shape)
    np.add.at(counts, (drawn[:, 1], drawn[:, 2]), 1)
    deviation = np.sqrt(table * (1 - table) / 20_000)
    assert (np.abs(counts / 20_000 - table) <= 5 * deviation + 1e-12).all()


def test_taste_mixes_two_archetypes() -> None:
    options = SMALL.model_copy(update={"quirk": 0.0, "label_noise": 0.0, "mixture_min": 1.0})
    pure = World("LaMP-2M", options, 0)
    for taste in pure.tastes().values():
        assert (taste.values == pure.archetypes[taste.first]).all()
    mixed = World("LaMP-2M", options.model_copy(update={"mixture_min": 0.5}), 0)
    for taste in mixed.tastes().values():
        first, second = (mixed.archetypes[n] for n in (taste.first, taste.second))
        assert taste.first != taste.second
        assert 0.5 <= taste.mixture <= 1.0
        assert ((taste.values == first) | (taste.values == second)).all()


@pytest.mark.parametrize("lamp_task", TASKS)
def test_smallest_world_and_too_many_themes(tmp_path: Path, lamp_task: str) -> None:
    tiny = SyntheticOptions(
        base_users=1, anchor_candidates=1, few_shot_users=1, themes=1, archetypes=2, choices=2
    )
    World(lamp_task, tiny, 0).write(tmp_path)
    found = read_users(tmp_path, get_task(lamp_task))
    assert (found.users.height, found.dropped) == (3, {})
    with pytest.raises(InputError, match=r"^synthetic\.themes: .* at most 100000"):
        World(lamp_task, tiny.model_copy(update={"themes": 30_000}), 0).write(tmp_path)
