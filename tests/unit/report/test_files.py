"""What runs leave beside the store: nothing of one run is written over by another."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tasks.errors import InputError
from tasks.report.files import (
    REPORT_FILE,
    TABLE_FILE,
    read_run,
    report_name,
    run_files,
    shown_run,
    write_report,
    write_run,
    write_state,
)
from tasks.results.run import Run
from tasks.results.store import Store
from tests.unit.report import cells
from tests.unit.report.cells import anchor, answered, batch, cell, compared, estimate, merging


def test_each_run_keeps_what_it_showed_and_the_newest_is_linked(where: Store) -> None:
    state = where.state
    for run, table in (("first", "mta 0.5\n"), ("trial", "mta 0.1\n")):
        assert report_name(run, "0123456789") == run
        write_report(run, TABLE_FILE, table)
        assert write_report(run, REPORT_FILE, f"<p>{run}</p>") == state / "reports" / f"{run}.html"
    assert (state / "reports" / "first.txt").read_text() == "mta 0.5\n"
    assert (state / "reports" / "first.html").read_text() == "<p>first</p>"
    assert (state / TABLE_FILE).read_text() == "mta 0.1\n"
    assert os.readlink(state / REPORT_FILE) == "reports/trial.html"
    # A third one of a name that is taken.
    assert report_name("trial", "0123456789") == "trial-01234567"
    assert sorted(file.name for file in state.iterdir()) == [TABLE_FILE, REPORT_FILE, "reports"]


@pytest.mark.parametrize(
    ("run", "wanted"),
    [
        ("wise-owl", "wise-owl"),
        ("../../etc/passwd", "etc-passwd"),
        ("Nightly run, all users", "Nightly-run-all-users"),
        ("夜間", "夜間"),
        ("..", "run"),
        ("x" * 300, "x" * 80),
    ],
)
def test_any_name_of_a_run_is_a_file_name(where: Store, run: str, wanted: str) -> None:
    assert report_name(run, "0") == wanted


def run(number: int, name: str) -> Run:
    about = {"name": name, "date": f"day {number}", "report": name}
    return Run(id=f"id-{number}", config={"seed": number}, **about)


def test_a_run_is_found_by_name_id_and_file(where: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"runs: no run is here"):
        read_run("last")
    for number, name in enumerate(["owl", "fox", "owl"]):
        file = write_run(run(number, name))
        os.utime(file, (number, number))
    assert [one.stem for one in run_files()] == ["id-2", "id-1", "id-0"]
    for wanted, number in (("last", 2), ("id-0", 0), ("fox", 1)):
        assert read_run(wanted).config == {"seed": number}
    # The later one of two of a name.
    assert shown_run(read_run("owl")) == "the run owl of day 2"
    assert read_run(str(file)) == run(2, "owl")
    with pytest.raises(InputError) as caught:
        read_run("hen")
    assert str(caught.value) == (
        "--run hen: neither a run nor a file of one; the last are owl, fox"
    )
    relative = os.path.relpath(file, Path.cwd())
    assert read_run(f"./{relative}").config == {"seed": 2}


@pytest.mark.parametrize("text", ["{", '{"config": {}, "seeds": {}}'])
def test_a_file_that_is_no_run_of_this_version(where: Store, text: str) -> None:
    write_run(run(0, "owl"))
    file = write_run(run(1, "owl"))
    os.utime(file, (2**33, 2**33))
    file.write_text(text)
    assert shown_run(read_run("owl")) == "the run owl of day 0"
    with pytest.raises(InputError, match=r"--run .*id-1\.json: cannot be read as a run \("):
        read_run("last")


def test_small_files_beside_the_store(where: Store) -> None:
    for text in ("first", "second"):
        path = write_state("runs/x.txt", text)
        assert path == where.state / "runs" / "x.txt"
        assert path.read_text() == text
    assert [file.name for file in path.parent.iterdir()] == ["x.txt"]


def test_a_run_is_written_down(where: Store) -> None:
    """All of it: read again it is the same."""
    file = answered(["comedy"])
    scores = {"mta": {"score": estimate(0.5, 0.25, None)}}
    first = cell(compared(mta=file).model_copy(update={"intervals": scores}), seed=3)
    second = cell(
        compared("LaMP-3", mta=file),
        seed=3,
        mergings=(merging(("mta",), [anchor("a")], trained={"a": "11"}),),
        answers={"mta": (batch(8, [(2, 30, 0.5)]),)},
        curve={2: first.compared},
        missing=("x",),
    )
    ended = cells.run(first, second, overall=first.compared, config={"seed": 3}, missing=("y",))
    path = write_run(ended)
    assert path == where.state / "runs" / "run-1.json"
    assert read_run() == ended
    assert ended.cell("LaMP-3", 3) == second
    assert ended.cell("LaMP-3", 4) is ended.cell("LaMP-4", 3) is None
