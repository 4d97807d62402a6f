"""Programs of one word: what they say and how they end."""

from __future__ import annotations

import pytest

from infra.command import one_word
from infra.local.settings import StackError


def fails() -> None:
    raise StackError("nothing answers at http://me:hunter2@host")


COMMANDS = {"go": lambda: print("went"), "fail": fails}


@pytest.mark.parametrize(
    ("argv", "code", "out", "err"),
    [
        (["go"], 0, "went\n", ""),
        (["fail"], 1, "", "mta: nothing answers at http://***@host\n"),
        (["--help"], 0, "what it is\n", ""),
        ([], 2, "", "mta: usage: python -m infra.x go|fail\n"),
        (["stop"], 2, "", "mta: usage: python -m infra.x go|fail\n"),
        (["go", "fail"], 2, "", "mta: usage: python -m infra.x go|fail\n"),
    ],
)
def test_one_word(
    capsys: pytest.CaptureFixture[str], argv: list[str], code: int, out: str, err: str
) -> None:
    assert one_word("infra.x", "what it is", COMMANDS, argv) == code
    said = capsys.readouterr()
    assert (said.out, said.err) == (out, err)
