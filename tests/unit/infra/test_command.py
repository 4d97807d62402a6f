"""Programs: what they say and how they end."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer

from infra.command import run
from infra.local.settings import StackError

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def go(slots: int = typer.Option(1, envvar="SLOTS", min=1)) -> int:
    print("went")
    return 3 if slots > 5 else 0


@app.command()
def fail() -> None:
    raise StackError("nothing answers at http://me:hunter2@host")


@pytest.mark.parametrize(
    ("argv", "slots", "code", "out", "err"),
    [
        (["go"], "", 0, "went\n", ""),
        (["go"], "6", 3, "went\n", ""),
        (["fail"], "", 1, "", "mta: nothing answers at http://***@host\n"),
        ([], "", 2, "", "mta: Missing command."),
        (["stop"], "", 2, "", "mta: No such command 'stop'."),
        (["fail", "-p", "x"], "", 2, "", "mta: No such option: -p"),
        (["go"], "0", 2, "", "mta: Invalid value for '--slots' (env var: 'SLOTS'): "),
        (["go"], "x", 2, "", "mta: Invalid value for '--slots' (env var: 'SLOTS'): "),
    ],
)
def test_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    argv: list[str], slots: str, code: int, out: str, err: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("SLOTS", slots)
    assert run(app, argv) == code
    said = capsys.readouterr()
    assert said.out == out
    assert said.err.startswith(err)
    assert said.err.count("\n") == bool(err)


def test_the_command_imports_no_prefect() -> None:
    """`mta run` sets its server's address first; without one Prefect would start another."""
    code = "import sys, infra.local.alone, tasks.tools.main; print('prefect' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
