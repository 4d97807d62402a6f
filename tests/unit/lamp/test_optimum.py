"""The optimum is exact: against enumeration, against itself (calibration), against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.errors import InputError
from tasks.lamp.definitions import LampTask, get_task
from tasks.lamp.formats import read_users
from tasks.lamp.options import SyntheticOptions
from tasks.lamp.synthetic import World
from tasks.lamp.synthetic.families import LONGEST, TEMPLATES, Headlines, best_sequences
from tasks.lamp.synthetic.optimum import (
    PREDICTORS,
    answers_to,
    expected_gains,
    optimal_answers,
    posterior_of,
)
from tests.unit.lamp.expected import expected_scores
from tests.unit.lamp.scoring import score
from tests.unit.lamp.worlds import TASKS, by_hand, enumerated, read_text

DEFAULT = SyntheticOptions()


def example_score(task: LampTask, said: str, gold: str) -> float:
    """The main metric of one answer; minus the error of a rating."""
    got = score(task, {"q": said}, {"q": gold})
    return -got["mae"] if "mae" in got else got.get("accuracy", got.get("rougeL", 0.0))


@pytest.mark.parametrize("lamp_task", TASKS)
@settings(deadline=None, max_examples=15)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1, 2, 5, 9]),
    st.sampled_from([(2, 2, 2), (3, 2, 3), (2, 3, 3), (1, 3, 2)]),
    st.sampled_from([(0.1, 0.04, 0.7), (0.5, 0.3, 0.5), (0.0, 0.1, 1.0), (0.2, 0.0, 0.6)]),
)
def test_posterior_equals_enumeration(
    lamp_task: str, seed: int, items: int, sizes: tuple[int, int, int], shape: tuple[float, ...]
) -> None:
    """All pairs, all values of all themes, the mixture as an integrated polynomial."""
    themes, choices, archetypes = sizes
    quirk, noise, mixture_min = shape
    options = SyntheticOptions(
        themes=themes, choices=choices, archetypes=archetypes, quirk=quirk, label_noise=noise,
        mixture_min=mixture_min, few_shot_items=max(1, items),
    )  # fmt: skip
    world = World(lamp_task, options, seed)
    _, drawn, _ = world.draw("fresh", 0)
    seen = [tuple(item) for item in drawn[:items].tolist()]
    posterior = posterior_of(world, drawn[:items])
    for theme in range(themes):
        expected = enumerated(world, seen, theme)
        np.testing.assert_allclose(posterior[theme], expected, atol=1e-10)
        # A query's answers: Bayes' rule once more, over the context and answer.
        joint = world.joint
        for context in range(joint.shape[2]):
            weights = [
                sum(
                    expected[z, v] * by_hand(lamp_task, options, z, v, context, answer)
                    for z in range(archetypes)
                    for v in range(choices)
                )
                for answer in range(joint.shape[3])
            ]
            if sum(weights) > 0:
                gains = np.array(weights) / sum(weights) @ world.family.gain.T
                found = expected_gains(world, posterior[theme])[context]
                np.testing.assert_allclose(found, gains, atol=1e-9)


def test_order_and_length_of_histories_do_not_matter() -> None:
    """A user's posterior is the same in other order; 2,000 items are fine."""
    world = World("LaMP-3", DEFAULT, 0)
    generator = np.random.default_rng(0)
    taste, _, _ = world.draw("fresh", 0)
    items = world.items(taste, 2000, generator)
    alone = posterior_of(world, items)
    for order in (items[::-1], items[generator.permutation(2000)]):
        np.testing.assert_allclose(posterior_of(world, order), alone, atol=1e-9)
    # So many items leave no doubt.
    assert (alone[np.arange(24), taste.first, taste.values] > 0.99).all()


def test_foreign_items_are_refused() -> None:
    """One value per theme and no noise: nobody gives two answers there."""
    pure = {"themes": 1, "choices": 2, "quirk": 0.0, "label_noise": 0.0, "mixture_min": 1.0}
    world = World("LaMP-2M", DEFAULT.model_copy(update=pure), 0)
    with pytest.raises(InputError, match="cannot come from this synthetic world"):
        posterior_of(world, np.array([[0, 0, 0], [0, 0, 1]]))


@pytest.mark.parametrize("lamp_task", TASKS)
def test_without_items_bayes_is_the_nonpersonal_sum(lamp_task: str) -> None:
    """Monte-Carlo over users' truth with k = 0 against the closed sum: within 4 errors. And more
    items never hurt: k = 0, 4, 12 and the oracle in order, in the direction of the metric."""
    by_k = [expected_scores(lamp_task, DEFAULT, 5, k, users=300) for k in (0, 4, 12)]
    nonpersonal, oracle = by_k[0]["nonpersonal"], by_k[0]["oracle"]
    assert all(scores["nonpersonal"] == nonpersonal for scores in by_k)
    none = by_k[0]["bayes"]
    assert abs(none.mean - nonpersonal.mean) < 4 * none.error
    sign = -1 if lamp_task == "LaMP-3" else 1
    means = [sign * score.mean for score in (nonpersonal, *[s["bayes"] for s in by_k[1:]], oracle)]
    assert means == sorted(means)
    # Room on both sides: personalisation matters, and few items do not tell everything.
    assert means[2] - means[0] > 0.15
    assert means[3] - means[1] > 0.05


def test_closed_forms() -> None:
    """Movies of one theme, pure archetypes, no quirk: oracle 1 - e + e / C. With C = 2 and both
    archetypes alike the non-personal answer is the oracle's; apart, it is a coin."""
    options = SyntheticOptions(
        themes=1, choices=2, archetypes=2, mixture_min=1.0, quirk=0.0, label_noise=0.2
    )
    seen = set()
    for seed in range(8):
        scores = expected_scores("LaMP-2M", options, seed, 3, users=2)
        alike = len({*World("LaMP-2M", options, seed).archetypes[:, 0].tolist()}) == 1
        seen.add(alike)
        assert scores["oracle"].mean == pytest.approx(0.9)
        assert scores["nonpersonal"].mean == pytest.approx(0.9 if alike else 0.5)
    assert seen == {True, False}


@pytest.fixture(scope="module")
def worlds() -> dict[str, World]:
    """Worlds with 150 few-shot users."""
    options = SyntheticOptions(
        base_users=1, anchor_candidates=1, few_shot_users=150, items_min=1, items_max=1, queries=8
    )
    return {lamp_task: World(lamp_task, options, 2) for lamp_task in TASKS}


@pytest.mark.parametrize("lamp_task", TASKS)
def test_written_answers_score_as_promised(
    worlds: dict[str, World], tmp_path: Path, lamp_task: str
) -> None:
    """LaMP's own score of the written queries: the posterior's promise within 3 standard errors
    (by user), and all three predictors within 4 of the expected ones."""
    task = get_task(lamp_task)
    table = optimal_answers(worlds[lamp_task])
    worlds[lamp_task].write(tmp_path)
    queries = read_users(tmp_path, task).users["query"].explode().drop_nulls()
    golds = {query["id"]: query["gold"] for query in queries}
    assert table["query_id"].to_list() == list(golds)
    for name in PREDICTORS:
        scores = [
            example_score(task, said, golds[query])
            for query, said in table.select("query_id", name).iter_rows()
        ]
        table = table.with_columns(pl.Series(f"{name}_score", scores))
    by_user = table.group_by("user_id").agg(
        pl.col("bayes_score", "nonpersonal_score", "oracle_score", "promised").mean()
    )
    surprise = by_user["bayes_score"] - by_user["promised"]
    assert abs(surprise.mean()) < 3 * surprise.std() / math.sqrt(150)  # type: ignore
    expected = expected_scores(lamp_task, worlds[lamp_task].options, 2, 10, users=300)
    for name in PREDICTORS:
        measured = by_user[f"{name}_score"]
        error = math.hypot(measured.std() / math.sqrt(150), expected[name].error)  # type: ignore
        assert abs(abs(measured.mean()) - expected[name].mean) < 4 * error  # type: ignore


def test_bayes_never_sees_the_truth_of_a_user(worlds: dict[str, World]) -> None:
    world = worlds["LaMP-2M"]
    unknown = posterior_of(world, np.empty((0, 3), np.int64))
    for user in world.users("few_shot"):
        taste = replace(user.taste, values=(user.taste.values + 1) % 4)
        real = answers_to(world, user, None, unknown)
        false = answers_to(world, replace(user, taste=taste), None, unknown)
        for row, other in zip(real, false, strict=True):
            assert row.pop("oracle") != other.pop("oracle")
            assert row == other


def test_items_limits_what_bayes_sees(worlds: dict[str, World]) -> None:
    tables = [optimal_answers(worlds["LaMP-4"], items) for items in (0, 3, 20, None)]
    assert (tables[0]["bayes"] == tables[0]["nonpersonal"]).all()
    assert tables[2].equals(tables[3])
    promised = [table["promised"].mean() for table in tables[:3]]
    assert promised == sorted(promised)


def test_gains_are_rouge() -> None:
    """Our table against rouge_score itself, on the strings that are said."""
    world = World("LaMP-4", DEFAULT, 0)
    family = world.family
    assert isinstance(family, Headlines)
    written = family.write(3, 0, 0, np.random.default_rng(0))
    _, _, titles = read_text(world, written.fields["text"])
    assert len(set(titles)) == DEFAULT.choices
    for number in range(0, len(family.sequences), 7):
        said = written.candidate(number)
        scores = [example_score(get_task("LaMP-4"), said, title) for title in titles]
        np.testing.assert_allclose(family.gain[number], scores, atol=1e-9)


@settings(deadline=None)
@given(
    st.integers(2, 6),
    st.lists(st.integers(0, 5), min_size=1, max_size=9),
    st.lists(st.floats(0, 1), min_size=6, max_size=6).filter(lambda p: sum(p[:2]) > 0.1),
)
def test_no_other_words_score_better(choices: int, said: list[int], weights: list[float]) -> None:
    """Any sequence, with repeats, equal neighbours, a foreign word (5) and more than LONGEST words,
    under any distribution over templates."""
    share = np.array(weights[:choices]) / sum(weights[:choices])
    spell = "abcdef"
    scores = [
        example_score(get_task("LaMP-4"), " ".join(spell[s] for s in said), " ".join(
            spell[s] for s in template
        ))
        for template in TEMPLATES[:choices]
    ]  # fmt: skip
    best = (best_sequences(choices)[1] @ share).max()
    assert best >= np.array(scores) @ share - 1e-9


@pytest.mark.parametrize("choices", [2, 4, 8, 15])
def test_value_of_the_game(choices: int) -> None:
    """best_sequences' third argument: what sequences of 6 words or fewer get at worst exceeds
    what LONGEST + 1 words can get at best."""
    optimize = pytest.importorskip("scipy.optimize")
    sequences, gain = best_sequences(choices)
    short = gain[[len(sequence) <= 6 for sequence in sequences]]
    # min z  subject to  short @ p <= z,  p a distribution
    solved = optimize.linprog(
        [0.0] * choices + [1.0],
        A_ub=np.hstack([short, -np.ones((len(short), 1))]),
        b_ub=np.zeros(len(short)),
        A_eq=[[1.0] * choices + [0.0]],
        b_eq=[1.0],
    )
    assert solved.fun > 11 / 21 - 1e-9 > 6 / (LONGEST + 1 + 3)


def test_templates() -> None:
    assert len(set(TEMPLATES)) == 15
    assert all(len(set(template)) == 3 for template in TEMPLATES)
    assert {symbol for template in TEMPLATES for symbol in template} == set(range(5))
    sequences, gain = best_sequences(3)
    for template, wanted in product(range(3), range(3)):
        row = gain[sequences.index(TEMPLATES[template])]
        assert (row[wanted] == 1.0) == (template == wanted)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="k -1 must be"):
        expected_scores("LaMP-3", DEFAULT, 0, -1)
    with pytest.raises(ValueError, match="users 1 >= 2"):
        expected_scores("LaMP-3", DEFAULT, 0, 1, users=1)
