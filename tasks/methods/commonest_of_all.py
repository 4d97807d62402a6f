"""What everybody else answers most often: the same for all, without a model.

Counted over the items of base users and anchor candidates. Of equally common answers it is the
first in alphabetical order.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tasks.methods.method import Method
from tasks.record import File, Result
from tasks.results.stage import stage
from tasks.users import Users

if TYPE_CHECKING:
    from tasks.config.task import MethodConfig
    from tasks.results.models import Prepared
    from tasks.stacking import Batch


class CommonAnswer(Result):
    """The answer that is given most often."""

    answer: str


@stage(version=2)
def common_answer(tables: tuple[File, ...]) -> CommonAnswer:
    """The commonest answer of these users' items."""
    counts = Counter(item["answer"] for user in Users(tables) for item in user["profile"])
    return CommonAnswer(answer=min(counts, key=lambda answer: (-counts[answer], answer)))


def fit(_config: MethodConfig, users: Prepared, *_: object) -> Result:
    """The answer for everybody."""
    return common_answer(users.unscored)


def answered(batch: Batch) -> list[list[str]]:
    """Per user the common answer, once for each query."""
    assert isinstance(batch.fitted, CommonAnswer)
    return [[batch.fitted.answer] * len(user["query"]) for user in batch.users]


METHOD = Method("commonest_of_all", order=89, fit=fit, answer=answered, passes=0.0, default=False)
