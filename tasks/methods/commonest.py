"""What the user answered most often, whatever is asked: no model at all, and the row to beat.

Of equally common answers it is the one that comes first. For a user without items it is empty.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tasks.methods.method import Method

if TYPE_CHECKING:
    from tasks.stacking import Batch


def commonest(batch: Batch) -> list[list[str]]:
    """Per user the items' commonest answer, once for each query."""
    answered = []
    for user in batch.users:
        ranked = Counter(item["answer"] for item in user["profile"]).most_common(1)
        answered.append([ranked[0][0] if ranked else ""] * len(user["query"]))
    return answered


METHOD = Method("commonest", order=90, answer=commonest, passes=0.0, default=False)
