"""MLflow's and Prefect's SQLite files: made beside their place, and put there when they are whole.

    python -m tasks.store.databases mlflow .mta/mlflow/mlflow.db COMMAND...
    python -m tasks.store.databases prefect-server .mta/prefect/prefect.db COMMAND...

make sure of the file and become COMMAND, a server on it. Both make their tables in hundreds of
steps, and cannot go on from every step that a kill cut short: each later run would end with
"table _alembic_tmp_experiments already exists".
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from tasks.errors import InputError
from tasks.store.files import PARTIAL, fsync
from tasks.store.processes import abandoned, own_prefix

# In a file's header (PRAGMA application_id), where neither MLflow nor Prefect has anything: "MTA1".
WHOLE = 0x4D544131
# Tables by these names are there within a step only.
CUT_SHORT = "_alembic_tmp_"
OLD = ".old"


@dataclass(frozen=True)
class Kind:
    """Whose database: the arguments of Python that make it, `{file}` in them and in `variables`."""

    name: str
    arguments: tuple[str, ...]
    variables: tuple[tuple[str, str], ...]
    runs: str  # the table of runs


MLFLOW = Kind("MLflow", ("-m", "mlflow", "db", "upgrade", "sqlite:///{file}"), (), "runs")
PREFECT = Kind(
    "Prefect",
    ("-m", "prefect", "server", "database", "upgrade", "-y"),
    (("PREFECT_SERVER_DATABASE_CONNECTION_URL", "sqlite+aiosqlite:///{file}"),),
    "flow_run",
)


def make_whole(kind: Kind, file: Path) -> None:
    """Make the database unless it is there; one that was left half made and has no run, anew.

    Raises InputError where one that has runs was cut short, and where none can be made.
    """
    if _usable(kind, file):
        return
    with FileLock(f"{file}.lock"):
        if _usable(kind, file):
            return  # another process made it meanwhile
        for left in file.parent.glob(f"{PARTIAL}*"):
            if abandoned(left.name, PARTIAL):
                shutil.rmtree(left, ignore_errors=True)
        # Not one place for all: who makes it outlives, for seconds, the process that asked for it.
        folder = Path(tempfile.mkdtemp(prefix=own_prefix(PARTIAL), dir=file.parent))
        try:
            made = folder / file.name
            _make(kind, made)
            fsync(made)
            if file.exists():
                old = file.replace(file.with_name(file.name + OLD))
                logging.getLogger(__name__).warning(
                    "mta: %s has no run and may be half made: made anew, kept as %s", file, old.name
                )
            made.replace(file)
            fsync(file.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _usable(kind: Kind, file: Path) -> bool:
    """Whether the file is there and whole, or has runs, or is locked."""
    if not file.exists():
        return False
    try:
        with closing(sqlite3.connect(file)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
            cut_short = any(name.startswith(CUT_SHORT) for name in tables)
            ((mark,),) = database.execute("PRAGMA application_id")
            if mark == WHOLE and not cut_short:
                return True
            used = kind.runs in tables and database.execute(f"SELECT 1 FROM {kind.runs}").fetchone()
            if not used:
                _settle(database)
    except sqlite3.OperationalError:
        return True  # locked
    except sqlite3.DatabaseError as error:
        raise InputError(f"{file}: {kind.name} cannot use it ({error}): move it away") from None
    if used and cut_short:
        raise InputError(
            f"{file}: {kind.name} was cut short while it changed this database, which has runs: "
            "put back a copy of it, or move it away and start again without these runs"
        )
    return bool(used)


def _make(kind: Kind, file: Path) -> None:
    given = {**os.environ, "PREFECT_HOME": str(file.parent)}
    given |= {name: value.format(file=file) for name, value in kind.variables}
    done = subprocess.run(
        [sys.executable, *(part.format(file=file) for part in kind.arguments)],
        env=given, cwd=file.parent, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        said = (done.stdout + done.stderr).split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "no word")
        if done.returncode < 0:
            last = f"it was ended by signal {-done.returncode}"
        raise InputError(
            f"{file.parent.parent}: {kind.name} made no database there ({last[:300]}); try again"
        )
    with closing(sqlite3.connect(file)) as database:
        _settle(database)
        database.execute(f"PRAGMA application_id = {WHOLE}")


def _settle(database: sqlite3.Connection) -> None:
    """All of it in its one file, which can then be renamed; OperationalError where it is in use."""
    database.execute("PRAGMA journal_mode = DELETE")


def main() -> None:
    name, file, *command = sys.argv[1:]
    try:
        make_whole(MLFLOW if name == "mlflow" else PREFECT, Path(file))
    except InputError as error:
        sys.exit(f"mta: {error}")
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
