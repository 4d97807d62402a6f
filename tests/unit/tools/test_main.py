"""The command `mta`: what it hands on, and bad input as one line, whichever command is asked."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tasks.tools.main import main

COMMANDS = {
    "export": ["--user", "few-1", "--to", "there"],
    "personalise": ["--user", "new.json"],
    "ask": ["a film", "--user", "few-1"],
    "forget": ["few-1"],
    "log": [],
    "compare": ["last"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_store_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setenv("MTA_STORE", "nonsense://x")
    assert main([name, *COMMANDS[name]]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("mta: MTA_STORE nonsense://x: ")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["fly"], "'fly'"),
        (["export", "--user", "few-1"], "--to"),
        (["export", "--user", "few-1", "--to", "x", "--seed", "one"], "--seed"),
        (["personalise"], "--user"),
        (["personalise", "--user", "x", "--keep", "all"], "--keep"),
        (["ask", "--user", "x"], "'text'"),
        (["forget"], "'user'"),
        (["forget", "few-1", "--date", "x"], "--date"),
    ],
)
def test_a_wrong_call_is_one_line(
    capsys: pytest.CaptureFixture[str], given: list[str], words: str
) -> None:
    assert main(given) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("mta: ")
    assert words in said.err
    assert said.err.count("\n") == 1


def test_help_lists_the_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in ("run", "plan", *COMMANDS))
    # On one screen of 80 x 24, and no sentence is cut off.
    assert len(said.splitlines()) < 24
    assert "..." not in said.replace("[ARGS]...", "")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["run"], []),
        (["run", "-p", "seed=1", "-p", 'stacking={"rank": 8}'],
         ["seed=1", 'stacking={"rank": 8}']),
        (["plan", "-p", "preset=paper"], ["preset=paper", "dry_run=true"]),
    ],
)  # fmt: skip
def test_a_run_gets_its_parameters_and_gives_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, given: list[str], wanted: list[str]
) -> None:
    asked: list[list[str]] = []

    def alone(arguments: list[str]) -> int:
        asked.append(arguments)
        return 1

    monkeypatch.setitem(sys.modules, "infra.local.alone", SimpleNamespace(run_alone=alone))
    assert main(given) == 1
    assert asked == [wanted]


@pytest.mark.parametrize(
    ("words", "offered"),
    [("mta p", ["plan", "personalise"]), ("mta export --format p", ["peft"])],
)
def test_the_tab_key_completes(words: str, offered: list[str]) -> None:
    """As bash asks, by the script that `mta --install-completion` installs."""
    code = "import sys; sys.argv[0] = 'mta'; from tasks.tools.main import main; main()"
    asked = {"_MTA_COMPLETE": "complete_bash", "COMP_WORDS": words}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300,
        env=os.environ | asked | {"COMP_CWORD": str(words.count(" "))},
    )  # fmt: skip
    assert done.stdout.split() == offered
