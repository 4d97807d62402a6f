"""Small users and files for the tests of tasks/lamp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tasks.lamp.definitions import LampTask
from tasks.lamp.options import PromptOptions, SplitOptions
from tasks.lamp.splits import Split, split_users
from tasks.lamp.tables import NO_USERS

REAL_FILE = (
    Path(__file__).resolve().parents[4] / "shared" / "data" / "lamp" / "LaMP_2M_few_shot_users.json"
)
needs_real_file = pytest.mark.skipif(
    not REAL_FILE.is_file(), reason="the real LaMP-2M users (shared/data/lamp) are not here"
)


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def movie(text: str, tag: str = "comedy") -> dict[str, str]:
    return {"id": f"id of {text}", "description": text, "tag": tag}


def question(query_id: str, text: str, gold: str = "comedy") -> dict[str, str]:
    return {"id": query_id, "input": f"Which tag? description: {text}", "gold": gold}


def user(user_id: Any, *items: Any, query: list[Any] | None = None) -> dict[str, Any]:
    return {"user_id": user_id, "profile": list(items), "query": query or []}


def frame(
    profiles: dict[str, list[str]],
    queries: dict[str, list[str]] | None = None,
    roles: dict[str, str] | None = None,
) -> pl.DataFrame:
    """A users frame from texts; every answer is `comedy`."""
    rows = [
        {
            "user_id": user_id,
            "role": roles[user_id] if roles else None,
            "profile": [{"id": text, "text": text, "answer": "comedy"} for text in texts],
            "query": [
                {"id": f"{user_id}/{text}", "input": f"Tag? description: {text}", "gold": "comedy"}
                for text in (queries or {}).get(user_id, [])
            ],
        }
        for user_id, texts in profiles.items()
    ]
    return pl.DataFrame(rows, schema=NO_USERS.schema, orient="row")


def split_of(users: pl.DataFrame, task: LampTask, seed: int = 0, **options: Any) -> Split:
    return split_users(users, task, SplitOptions(**options), seed)


def how(style: Any = "compact", items: int = 0) -> PromptOptions:
    return PromptOptions(style=style, history_items=items)
