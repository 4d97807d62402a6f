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
    shown_run,
    write_report,
    write_run,
)
from tasks.store.artifacts import Store


def test_each_run_keeps_what_it_showed_and_the_newest_is_linked(where: Store) -> None:
    state = where.root.parent
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


def test_a_run_is_found_by_name_id_and_file(where: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"runs: no run yet; run the flow first"):
        read_run(where, "last")
    for number, name in enumerate(["owl", "fox", "owl"]):
        about = {"name": name, "date": f"day {number}", "report": name}
        file = write_run(f"id-{number}", {"seed": number}, [], about)
        os.utime(file, (number, number))
    found = {
        wanted: read_run(where, wanted)["config"]["seed"] for wanted in ("last", "id-0", "fox")
    }
    assert found == {"last": 2, "id-0": 0, "fox": 1}
    # The later one of two of a name.
    assert shown_run(read_run(where, "owl")) == "the run owl of day 2"
    assert read_run(where, str(file))["config"] == {"seed": 2}
    with pytest.raises(InputError) as caught:
        read_run(where, "hen")
    assert str(caught.value) == (
        "--run hen: neither a run nor a file of one; the last are owl, fox"
    )
    relative = os.path.relpath(file, Path.cwd())
    assert read_run(where, f"./{relative}")["config"] == {"seed": 2}
    file.write_text("{")
    assert shown_run(read_run(where, "owl")) == "the run owl of day 0"
    with pytest.raises(InputError, match=r"--run .*id-2\.json: cannot be read"):
        read_run(where, "last")
