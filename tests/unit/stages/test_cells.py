"""LaMP tasks and seeds beside each other: one that fails leaves the others."""

from __future__ import annotations

import pytest

from flows import mta
from tasks.config.run import resolve
from tasks.config.task import TaskConfig
from tasks.errors import InputError
from tasks.results.models import Compared
from tasks.results.run import Cell
from tasks.results.stage import StageFailed
from tests.unit.stages.answered import prepared
from tests.unit.stages.test_lamp_task import BASE

COMPARED = Compared(groups=1, queries=1, methods=("base",), intervals={}, differences={})
CONFIG = resolve(
    {"lamp_tasks": ["LaMP-2M", "LaMP-3"], "methods": ["base"], "seeds": [4, 5], "items_curve": [3]}
)


def cell_of(config: TaskConfig) -> Cell:
    users = prepared(config.lamp_task, {"u1": "g1"})
    return Cell(
        config=config, users=users, base=BASE, mergings=(), answers={}, compared=COMPARED,
        missing=("LaMP-2M seed 4: anchor a: not finite",) if config.seed == 4 else (),
    )  # fmt: skip


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize("error", [StageFailed("no memory"), InputError("no file")])
def test_one_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """LaMP-3 fails as a whole, and LaMP-2M of seed 5 at a point of its curve."""

    def lamp_task(config: TaskConfig, known: Cell | None = None) -> Cell:
        if config.lamp_task == "LaMP-3" or (known and config.seed == 5):
            raise error
        return cell_of(config)

    monkeypatch.setattr(mta, "lamp_task", lamp_task)
    monkeypatch.setattr(mta, "side_by_side", lambda _: 2)
    cells, missing = mta.all_cells(CONFIG)
    assert [one.name for one in cells] == ["LaMP-2M seed 4", "LaMP-2M seed 5"]
    assert [list(one.curve) for one in cells] == [[3], []]
    anchor = "LaMP-2M seed 4: anchor a: not finite"
    assert missing == [
        anchor,
        f"with 3 items: {anchor}",
        f"LaMP-3 seed 4: {error}",
        f"LaMP-2M seed 5 with 3 items: {error}",
        f"LaMP-3 seed 5: {error}",
    ]
    assert cells[0].missing == tuple(missing[:2])
