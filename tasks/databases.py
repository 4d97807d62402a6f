"""MLflow's and Prefect's SQLite files: made in a scratch folder, moved into place when whole.

    python -m tasks.databases prefect .mta/prefect/prefect.db COMMAND...

makes the file unless it is there, then becomes COMMAND, a server on it. A server left alone makes
its tables in hundreds of steps. One that is killed at the wrong step cannot go on.
"""

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from filelock import FileLock

from tasks.errors import InputError
from tasks.files import PARTIAL

# The arguments of Python that make such a file.
MLFLOW = ("-m", "mlflow", "db", "upgrade", "sqlite:///{file}")
PREFECT = ("-m", "prefect", "server", "database", "upgrade", "-y")


def make_whole(arguments: tuple[str, ...], file: Path) -> None:
    """Make the database unless it is there. Raises InputError where it cannot be made."""
    if file.exists():
        return
    with FileLock(f"{file}.lock"):
        if file.exists():
            return  # another process made it meanwhile
        for left in file.parent.glob(f"{PARTIAL}*"):  # of processes that were killed
            shutil.rmtree(left, ignore_errors=True)
        # A new folder each time: a process that makes the file may outlive, by seconds, its parent.
        with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=file.parent) as folder:
            made = Path(folder, file.name)
            address = f"sqlite+aiosqlite:///{made}"
            done = subprocess.run(
                [sys.executable, *(part.format(file=made) for part in arguments)],
                env={**os.environ, "PREFECT_SERVER_DATABASE_CONNECTION_URL": address},
                cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                said = (done.stdout + done.stderr).strip() or f"exit code {done.returncode}"
                raise InputError(f"{file}: not made ({said.splitlines()[-1][:300]}); try again")
            with closing(sqlite3.connect(made)) as database:
                # Without this, parts may lie in files beside it, which no rename moves.
                database.execute("PRAGMA journal_mode = DELETE")
            made.replace(file)


if __name__ == "__main__":
    try:
        make_whole(MLFLOW if sys.argv[1] == "mlflow" else PREFECT, Path(sys.argv[2]))
    except InputError as failure:
        sys.exit(f"mta: {failure}")
    os.execv(sys.argv[3], sys.argv[3:])
