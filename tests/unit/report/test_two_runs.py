"""Two runs against each other: the difference of a method between them, by pairs."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.compare import compared
from tasks.config.run import resolve
from tasks.errors import InputError
from tasks.report.files import write_run
from tasks.report.two_runs import differing, two_runs
from tasks.results.models import Compared, Estimate
from tasks.results.run import Cell, Run
from tasks.tools.main import main
from tests.unit.report import cells
from tests.unit.stages import answered
from tests.unit.stages.answered import BASE, MTA, QUERIES, USERS

pytestmark = pytest.mark.usefixtures("where")

Predicted = dict[str, dict[str, str]]


def scored(methods: Predicted, queries: dict[str, Any] | None = None) -> Compared:
    answers = {name: (answered.answered(queries or QUERIES, own),) for name, own in methods.items()}
    config = resolve({"data": "given"}).for_task("LaMP-2M", 0)
    return compared(config, answered.prepared("LaMP-2M", USERS), answers)


def cell(methods: Predicted, queries: dict[str, Any] | None = None, seed: int = 0) -> Cell:
    answers = {name: (cells.batch(0, [(0, 0, 0.0)]),) for name in methods}
    return cells.cell(scored(methods, queries), seed=seed, answers=answers)


def run(*found: Cell, name: str, **config: Any) -> Run:
    return cells.run(*found, id=f"id-{name}", name=name, report=name, config=config)


def test_a_method_in_two_runs_differs_as_two_methods_in_one_run() -> None:
    """4 of 5 right instead of 2; the interval is worked out by hand in test_compare.py."""
    first, second = run(cell({"mta": BASE}), name="owl"), run(cell({"mta": MTA}), name="cat")
    (change,) = two_runs(first, second).changes
    assert (change.lamp_task, change.method, change.metric) == ("LaMP-2M", "mta", "score")
    assert change.first == Estimate(point=0.4, lo=0.0, hi=0.5)
    assert change.second == Estimate(point=0.8, lo=0.0, hi=1.0)
    together = scored({"base": BASE, "mta": MTA}).differences["mta"]["base"]["score"]
    assert change.by == together
    assert (change.by.lo, change.by.hi, change.shown) == (0.0, 0.5, "not shown")


def test_what_does_not_change_differs_by_nothing() -> None:
    """And what one of the runs lacks is named: a method, a seed."""
    both: Predicted = {"base": BASE, "mta": MTA}
    first = run(cell(both), cell(both, seed=1), name="owl", fusion={"top_m": 4})
    second = run(cell({"base": BASE}), name="cat", fusion={"top_m": 8})
    found = two_runs(first, second)
    (change,) = found.changes
    assert change.method == "base"
    assert (change.by.point, change.by.lo, change.by.hi, change.by.holds) == (0, 0, 0, False)
    assert found.left_out == [
        "LaMP-2M, seed 1: in one of the runs alone",
        "mta: in one of the runs alone",
    ]
    assert found.settings == ["fusion.top_m: 4 -> 8"]


def test_the_mean_of_seeds() -> None:
    """+.4 and 0: the same users stand behind both seeds, so they are drawn together."""
    worse, better = cell({"mta": BASE}), cell({"mta": MTA})
    first = run(worse, cell({"mta": BASE}, seed=1), name="owl")
    second = run(better, cell({"mta": BASE}, seed=1), name="cat")
    (change,) = two_runs(first, second).changes
    assert change.by.point == pytest.approx(0.2)
    assert (change.by.lo, change.by.hi) == (0.0, 0.25)


def test_other_queries_are_refused() -> None:
    fewer = {name: own for name, own in QUERIES.items() if name != "e"}
    first = run(cell({"mta": BASE}), name="owl")
    with pytest.raises(InputError, match="1 of 5 queries were asked in one of the runs alone"):
        two_runs(first, run(cell({"mta": BASE}, fewer), name="cat"))
    with pytest.raises(InputError, match="no LaMP task and seed in common"):
        two_runs(first, run(cell({"mta": BASE}, seed=3), name="cat"))


def test_a_file_of_a_generated_world_is_no_pair_of_the_world() -> None:
    """The same users and queries, but the bootstrap names its draws by where users come from."""
    one = cell({"mta": BASE})
    generated = compared(
        resolve({}).for_task("LaMP-2M", 0),
        answered.prepared("LaMP-2M", USERS),
        {"mta": (answered.answered(QUERIES, BASE),)},
    )
    other = one.model_copy(update={"compared": generated})
    with pytest.raises(InputError, match="one run generated its users"):
        two_runs(run(one, name="owl"), run(other, name="cat"))


def test_settings_that_differ() -> None:
    first = {"seed": 0, "base": {"model": "tiny", "tiny": {"steps": 9}}, "gone": 1}
    second = {"seed": 0, "base": {"model": "x", "tiny": {"steps": 8}}, "new": [2]}
    assert differing(first, second) == [
        "base.model: tiny -> x",
        "base.tiny.steps: 9 -> 8",
        "gone: 1 -> None",
        "new: None -> [2]",
    ]


def test_the_command_prints_it_and_writes_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(run(cell({"mta": BASE}), name="<owl>"))
    write_run(run(cell({"mta": MTA}), name="cat"))
    assert main(["compare", "<owl>", "cat"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert table[2].split() == [
        "LaMP-2M", "mta", "score", "0.4000", "[0.000,", "0.500]", "0.8000", "[0.000,", "1.000]",
        "0.4000", "[0.000,", "0.500]", "not", "shown",
    ]  # fmt: skip
    page = last.removeprefix("mta: the same as a page: ")
    with open(page, encoding="utf-8") as file:
        html = file.read()
    assert "&lt;owl&gt; and cat" in html
    opening = " ".join(html.partition("<figure>")[0].split())
    assert "On LaMP-2M no method's score is shown to differ." in opening
    assert (html.count("<img"), html.count("</figcaption>")) == (1, 1)
    assert "<owl>" not in html
    assert '+0.400<span class="small">[+0.000, +0.500]</span>' in html
