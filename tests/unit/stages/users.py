"""A folder of a few LaMP-2M users, as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tasks.lamp.definitions import MOVIE_TAGS

FILES = {
    "base": "user_base_LLM.json",
    "anchor": "user_anchor_candidate.json",
    "few_shot": "user_few_shot.json",
}


def user(name: str, items: int, queries: int = 0) -> dict[str, Any]:
    """Items and queries are this user's alone, so no two users count as one author."""
    words = [f"{name} film number {number}" for number in range(items + queries)]
    tag = MOVIE_TAGS[sum(name.encode()) % 15]
    return {
        "user_id": name,
        "profile": [
            {"id": f"{name}-{n}", "description": words[n], "tag": tag} for n in range(items)
        ],
        "query": [
            {
                "id": f"{name}-q{n}",
                "input": f"Which tag? description: {words[items + n]}",
                "gold": tag,
            }
            for n in range(queries)
        ],
    }


def write_users(folder: Path, **roles: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for role, users in roles.items():
        (folder / FILES[role]).write_text(json.dumps(users))
    return folder
