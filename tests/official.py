"""Small files of LaMP's official shape, for every task: questions and outputs of one split.

The texts are made up, so that nothing of LaMP is here; fields, ids and the wording of the questions
are LaMP's (arXiv 2304.11406, appendix A). Every user has words of their own: no two share content.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tasks.lamp.definitions import MOVIE_TAGS, NEWS_CATEGORIES

ASKS = {
    "LaMP-2M": "Which tag does this movie relate to among the following tags? Just answer with the "
    f"tag name without further explanation. tags: [{', '.join(MOVIE_TAGS)}] description: ",
    "LaMP-2N": "Which category does this article relate to among the following categories? Just "
    "answer with the category name without further explanation. categories: "
    f"[{', '.join(NEWS_CATEGORIES)}] article: ",
    "LaMP-3": "What is the score of the following review on a scale of 1 to 5? just answer with 1, "
    "2, 3, 4, or 5 without further explanation. review: ",
    "LaMP-4": "Generate a headline for the following article: ",
    "LaMP-5": "Generate a title for the following abstract of a paper: ",
    "LaMP-6": "Generate a subject for the following email: ",
    "LaMP-7": "Paraphrase the following tweet without any explanation before or after it: ",
}
# LaMP's own names of the tasks in its files; both forms of LaMP-2 are LaMP_2.
FILE_NAMES = {
    "LaMP-1": "LaMP_1",
    "LaMP-2M": "LaMP_2",
    "LaMP-2N": "LaMP_2",
    "LaMP-3": "LaMP_3",
    "LaMP-4": "LaMP_4",
    "LaMP-5": "LaMP_5",
    "LaMP-6": "LaMP_6",
    "LaMP-7": "LaMP_7",
}
WORDS = ["old", "new", "red", "small", "long", "quiet", "river", "house", "market", "letter"]


def write_official(
    folder: Path, task: str, users: int = 18, items: int = 12, split: str = "dev"
) -> Path:
    """`{split}_questions.json` and `{split}_outputs.json` of so many users of so many items."""
    generator = random.Random(f"official {task}")
    questions, golds = [], []
    for user in range(users):
        words = [f"{generator.choice(WORDS)}{user}" for _ in range(6)]
        profile = [_item(task, words, generator) for _ in range(items)]
        for number, item in enumerate(profile):
            item["id"] = f"{user}{number:03}"
        asked, gold = _question(task, words, generator)
        questions.append({"id": str(user), "input": asked, "profile": profile})
        golds.append({"id": str(user), "output": gold})
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / f"{split}_questions.json", questions)
    _write(folder / f"{split}_outputs.json", {"task": FILE_NAMES[task], "golds": golds})
    return folder


def _item(task: str, words: list[str], generator: random.Random) -> dict[str, Any]:
    text, title = _text(words, generator, 9), _text(words, generator, 4).title()
    return {
        "LaMP-1": {"title": title, "abstract": text},
        "LaMP-2M": {"tag": generator.choice(MOVIE_TAGS[:3]), "description": text},
        "LaMP-2N": {
            "text": text,
            "title": title,
            "category": generator.choice(NEWS_CATEGORIES[:3]),
        },
        "LaMP-3": {"text": text, "score": str(generator.randint(1, 5))},
        "LaMP-4": {"text": text, "title": title},
        "LaMP-5": {"title": title, "abstract": text},
        "LaMP-6": {"text": text, "title": title},
        "LaMP-7": {"text": text},
    }[task]


def _question(task: str, words: list[str], generator: random.Random) -> tuple[str, str]:
    item = _item(task, words, generator)
    if task == "LaMP-1":
        other = _text(WORDS, generator, 4)
        asked = (
            f'For an author who has written the paper with the title "{item["title"]}", which '
            "reference is related? Just answer with [1] or [2] without explanation. "
            f'[1]: "{_text(words, generator, 4)}" [2]: "{other}"'
        )
        return asked, "[1]"
    text = item.get("description") or item.get("abstract") or item["text"]
    gold = {
        "LaMP-2M": item.get("tag"),
        "LaMP-2N": item.get("category"),
        "LaMP-3": item.get("score"),
        "LaMP-7": _text(words, generator, 9),
    }.get(task) or item["title"]
    return ASKS[task] + text, gold


def _text(words: list[str], generator: random.Random, length: int) -> str:
    return " ".join(generator.choice(words) for _ in range(length))


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")
