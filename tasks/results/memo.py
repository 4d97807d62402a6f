"""Small values that are worked out once and remembered in the store, as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tasks.files import write_atomic
from tasks.record import digest
from tasks.results.store import MEMO, store


def remembered(kind: str, about: Any, make: Callable[[], Any]) -> Any:
    """What `make` gives, ready for JSON: made once for each value of `about`."""
    path = store().root / MEMO / f"{kind}-{digest(about)}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(made, ensure_ascii=False).encode())
        return made
