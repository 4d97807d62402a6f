"""Databases of MLflow and Prefect: whole or not there, whatever was left of them."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tasks.databases import MLFLOW, PREFECT, make_whole
from tasks.errors import InputError
from tasks.files import PARTIAL

ROOT = Path(__file__).resolve().parents[3]
# Makes a database as MLflow does, in steps that are each kept: a table, a copy of it, its end.
STEPS = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
for step in (
    "CREATE TABLE runs (id)", "CREATE TABLE _alembic_tmp_runs (id, name)", "DROP TABLE runs",
    "ALTER TABLE _alembic_tmp_runs RENAME TO runs", "CREATE TABLE alembic_version (number)",
):
    database.execute(step)
open(sys.argv[2], "a").write("made\\n")
"""


@pytest.fixture
def steps(tmp_path: Path) -> tuple[str, ...]:
    return ("-c", STEPS, "{file}", str(tmp_path / "note"))


def times_made(tmp_path: Path) -> int:
    return len((tmp_path / "note").read_text().splitlines())


def tables(file: Path) -> set[str]:
    with closing(sqlite3.connect(file)) as database:
        return {name for (name,) in database.execute("SELECT name FROM sqlite_master")}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_it_is_made_once_and_nothing_else_is_left(tmp_path: Path, steps: tuple[str, ...]) -> None:
    file = tmp_path / "a.db"
    for _ in range(2):
        make_whole(steps, file)
    assert tables(file) == {"runs", "alembic_version"}
    assert names(tmp_path) == {"a.db", "a.db.lock", "note"}
    assert times_made(tmp_path) == 1


def test_two_at_once_make_it_once(tmp_path: Path, steps: tuple[str, ...]) -> None:
    threads = [
        threading.Thread(target=make_whole, args=(steps, tmp_path / "a.db")) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert times_made(tmp_path) == 1


def test_what_a_killed_process_was_making_goes(tmp_path: Path, steps: tuple[str, ...]) -> None:
    left = tmp_path / f"{PARTIAL}x"
    left.mkdir()
    (left / "a.db").write_text("half")
    make_whole(steps, tmp_path / "a.db")
    assert names(tmp_path) == {"a.db", "a.db.lock", "note"}


def test_one_that_is_there_stays(tmp_path: Path, steps: tuple[str, ...]) -> None:
    (tmp_path / "a.db").write_text("whatever it is")
    make_whole(steps, tmp_path / "a.db")
    assert names(tmp_path) == {"a.db"}
    assert (tmp_path / "a.db").read_text() == "whatever it is"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("print('well'); raise SystemExit('no room')", "no room"),
        ("import os; os.kill(os.getpid(), 9)", "exit code -9"),
    ],
)
def test_what_cannot_be_made_is_one_line(tmp_path: Path, code: str, why: str) -> None:
    with pytest.raises(InputError, match=rf"b\.db: not made \({why}\); try again$"):
        make_whole(("-c", code), tmp_path / "b.db")
    assert names(tmp_path) == {"b.db.lock"}


def mlflow_works(file: Path) -> None:
    client = MlflowClient(f"sqlite:///{file}")
    run = client.create_run(client.create_experiment("mta"))
    assert client.get_run(run.info.run_id).info.status == "RUNNING"
    # Made elsewhere, and nothing in it says so.
    assert not any(PARTIAL in one.artifact_location for one in client.search_experiments())
    assert PARTIAL.encode() not in file.read_bytes()


def prefect_works(file: Path) -> None:
    """Its own server finds nothing more to do, and asks for no table that is not there."""
    code = (
        "import asyncio; from prefect.server.database import provide_database_interface as p;"
        "asyncio.run(p().create_db()); print(asyncio.run(p().is_db_connectable()))"
    )
    given = {**os.environ, "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{file}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=given, capture_output=True, text=True, check=False
    )
    assert done.stdout == "True\n", done.stderr
    assert {"flow_run", "work_pool", "alembic_version"} <= tables(file)


def killed(file: Path, command: list[str]) -> None:
    """Start what makes a database, and kill it in the middle."""
    before = set(file.parent.rglob(file.name))
    maker = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    while not set(file.parent.rglob(file.name)) - before:
        assert maker.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)
    os.killpg(maker.pid, signal.SIGKILL)
    maker.wait()
    assert not file.exists()
    assert len(list(file.parent.glob(f"{PARTIAL}*"))) == 1


MAKE = """
import sys
from pathlib import Path
from tasks.databases import make_whole
make_whole(("-c", sys.argv[2], "{file}", "note"), Path(sys.argv[1]))
"""


def test_each_removes_what_the_one_before_was_making(tmp_path: Path) -> None:
    file, slow = tmp_path / "x.db", f"{STEPS}\nimport time; time.sleep(60)"
    for _ in range(2):
        killed(file, [sys.executable, "-c", MAKE, str(file), slow])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "name", "works"),
    [(MLFLOW, "mlflow", mlflow_works), (PREFECT, "prefect-server", prefect_works)],
    ids=["mlflow", "prefect"],
)
def test_a_kill_while_it_is_made_costs_nothing(
    tmp_path: Path, arguments: tuple[str, ...], name: str, works: Callable[[Path], None]
) -> None:
    """Killed 0.2 s after its first table, with all that works for it."""
    file = tmp_path / "x.db"
    killed(file, [sys.executable, "-m", "tasks.databases", name, str(file), sys.executable, "-V"])
    make_whole(arguments, file)
    assert names(tmp_path) == {"x.db", "x.db.lock"}
    works(file)
