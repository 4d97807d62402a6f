"""What the programs of this folder that take one word share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from infra.local.settings import StackError
from tasks.errors import masked


def say(text: str) -> None:
    print(f"mta: {masked(text)}", file=sys.stderr, flush=True)


def one_word(
    program: str, described: str | None, commands: Mapping[str, Callable[[], None]], argv: list[str]
) -> int:
    """Do what the one word in `argv` asks for; the exit code (1: it failed, 2: no such word)."""
    if argv in (["-h"], ["--help"]):
        print(described)
        return 0
    if len(argv) != 1 or argv[0] not in commands:
        say(f"usage: python -m {program} {'|'.join(commands)}")
        return 2
    try:
        commands[argv[0]]()
    except StackError as error:
        say(str(error))
        return 1
    return 0
