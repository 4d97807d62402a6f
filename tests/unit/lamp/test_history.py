"""BM25 of a whole profile at once, against rank_bm25 asked as the published code asks it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_bm25 import BM25Okapi

import tasks.lamp.history as history
from tasks.lamp.history import Neighbours


def ranked(scores: np.ndarray) -> list[int]:
    """Best first; scores that agree to nine decimals in order of index."""
    return [int(index) for index in np.argsort(-np.round(scores, 9), kind="stable")]


def published(texts: list[str], question: str) -> list[int]:
    words = [text.lower().split() for text in texts]
    if not any(words):  # rank_bm25 divides by the number of words
        return list(range(len(texts)))
    return ranked(BM25Okapi(words).get_scores(question.lower().split()))


def published_loop(texts: list[str]) -> list[list[int]]:
    """The index is built anew for every item, on the others."""
    found = []
    for index, text in enumerate(texts):
        others = [other for other in range(len(texts)) if other != index]
        order = published([texts[other] for other in others], text)
        found.append([others[place] for place in order])
    return found


# Few words, so that many are common (negative idf), repeated, and tied.
profiles = st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=9).map(" ".join), max_size=9)


@settings(max_examples=200, deadline=None)
@given(profiles, st.sampled_from([1, 30, history.SCORES]))
def test_all_items_at_once_as_the_published_loop(texts: list[str], scores: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "SCORES", scores)  # several blocks, or one
        assert Neighbours(texts).others(len(texts)) == published_loop(texts)


@settings(max_examples=100, deadline=None)
@given(profiles.filter(bool), st.lists(st.sampled_from("abcx")).map(" ".join))
def test_a_question_to_the_whole_profile(texts: list[str], question: str) -> None:
    assert Neighbours(texts).find(question, len(texts)) == published(texts, question)


def test_long_profile_as_the_published_loop() -> None:
    """60 items of 5 to 60 words, their frequencies as in language (one over the rank)."""
    generator = np.random.default_rng(0)
    words = np.array([f"word{number}" for number in range(400)])
    share = 1 / np.arange(1, 401)
    texts = [
        " ".join(generator.choice(words, generator.integers(5, 60), p=share / share.sum()))
        for _ in range(60)
    ]
    assert Neighbours(texts).others(len(texts)) == published_loop(texts)


def test_by_hand() -> None:
    """Five others; `fox` stands in one of them, `red` in two: ln(4.5 / 1.5) and ln(3.5 / 2.5)."""
    texts = ["Red fox", "red whale", "RED, swan", "fox den", "green", "blue"]
    neighbours = Neighbours(texts)
    assert math.log(4.5 / 1.5) > math.log(3.5 / 2.5) > 0
    assert neighbours.others(3)[0] == [3, 1, 2]  # of the tie the lower index
    assert neighbours.others(9)[4] == [0, 1, 2, 3, 5]  # nothing in common with anybody
    assert neighbours.find("red fox", 2) == [0, 3]
    assert neighbours.find("nothing shared", 2) == [0, 1]
    assert neighbours.find("", 1) == [0]


def test_a_common_word_counts_for_epsilon_times_the_mean() -> None:
    """`a` is in both others of item 0: its idf is negative, so a quarter of the mean idf.

    Index: a in 2 of 2, b and c in 1 of 2 each: (ln(0.5 / 2.5) + 0 + 0) / 3, negative too, so the
    item in which `a` weighs less, the longer one, comes first.
    """
    assert BM25Okapi([["a", "b"], ["a"]]).average_idf < 0
    assert Neighbours(["a", "a", "a b c"]).others(2)[0] == [2, 1]


@pytest.mark.parametrize("texts", [[], ["one"], ["", "!"], ["", "a"]])
def test_small_profiles(texts: list[str]) -> None:
    neighbours = Neighbours(texts)
    everyone = list(range(len(texts)))
    assert neighbours.others(3) == [[o for o in everyone if o != own] for own in everyone]
    assert sorted(neighbours.find("a", 3)) == everyone


def test_scripts_without_blanks() -> None:
    """By hand: of four headlines one has 足球 ("football"), which is no word between blanks here.

    Each of its characters is in one of four items and weighs ln(3.5 / 1.5); 今 and 天 are in two
    and weigh 0. As runs of letters the sentences had no word in common, and the first came.
    """
    texts = ["今天下雨", "足球比赛", "今天新闻", "电影"]
    assert Neighbours(texts).find("我爱足球", 1) == [1]
    # Of 今天 and 比赛 the rarer decides.
    assert Neighbours(texts).find("今天比赛", 2) == [1, 0]
    assert Neighbours([*texts, "足球"]).others(1)[4] == [1]
    # Hindi without vowel signs: दिन (day) and दान (gift) would both be द and न.
    assert Neighbours(["दान", "किताब", "दिन", "घर"]).find("दिन", 1) == [2]
