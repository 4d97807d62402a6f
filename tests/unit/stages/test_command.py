"""The commands of `tasks`: bad input is one line, whichever is asked."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tasks import export
from tasks.forget import __main__ as forget
from tasks.tracking import __main__ as tracking

COMMANDS: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
    "export": (export.main, ["--user", "few-1", "--to", "there"]),
    "forget": (forget.main, ["few-1"]),
    "tracking": (tracking.main, []),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_store_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setenv("MTA_STORE", "nonsense://x")
    main, arguments = COMMANDS[name]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("mta: MTA_STORE nonsense://x: ")
    assert said.err.count("\n") == 1
