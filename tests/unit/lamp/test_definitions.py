"""Task definitions; the query wordings are those of LaMP's published data."""

from __future__ import annotations

import pytest

from tasks.errors import InputError
from tasks.lamp.definitions import TASKS, get_task
from tasks.lamp.prompts import question_text

REAL_QUERIES = {
    "LaMP-1": "For an author who has written the paper with the title THE TEXT",
    "LaMP-2M": "Which tag does this movie relate to among the following tags? Just answer with the "
    "tag name without further explanation. tags: [sci-fi, comedy] description: THE TEXT",
    "LaMP-2N": "Which category does this article relate to among the following categories? Just "
    "answer with the category name without further explanation. categories: [women, religion] "
    "article: THE TEXT",
    "LaMP-3": "What is the score of the following review on a scale of 1 to 5? just answer with 1, "
    "2, 3, 4, or 5 without further explanation. review: THE TEXT",
    "LaMP-4": "Generate a headline for the following article: THE TEXT",
    "LaMP-5": "Generate a title for the following abstract of a paper: THE TEXT",
    "LaMP-6": "Generate a subject for the following email: THE TEXT",
    "LaMP-7": "Paraphrase the following tweet without any explanation before or after it: THE TEXT",
}


@pytest.mark.parametrize("name", sorted(TASKS))
def test_marker_splits_real_query(name: str) -> None:
    task = get_task(name)
    assert question_text(REAL_QUERIES[name], task) == "THE TEXT"
    repeated = REAL_QUERIES[name] + task.marker + "again"
    assert question_text(repeated, task) == f"THE TEXT{task.marker}again"


@pytest.mark.parametrize("name", sorted(TASKS))
def test_own_instruction_ends_with_its_only_marker(name: str) -> None:
    task = get_task(name)
    assert task.instruction.endswith(task.marker)
    assert question_text(task.instruction + "x", task) == "x"


def test_label_sets() -> None:
    assert [len(TASKS[name].labels) for name in TASKS] == [2, 15, 15, 5, 0, 0, 0, 0]
    assert all(len(set(task.labels)) == len(task.labels) for task in TASKS.values())


def test_unknown_task_lists_the_names() -> None:
    with pytest.raises(InputError, match=r"use one of LaMP-1, .*, LaMP-7$") as e:
        get_task("LaMP-8")
    assert "\n" not in str(e.value)
