"""What the programs of this folder share: their messages and their exit codes."""

import sys

import typer

from infra.local.settings import StackError
from tasks.errors import InputError, masked


def say(text: str) -> None:
    """One line for the person in front of the terminal."""
    print(f"mta: {masked(text)}", file=sys.stderr, flush=True)


def run(app: typer.Typer, arguments: list[str] | None = None) -> int:
    """Run a program; its exit code. Any trouble is one line: code 2 for bad input, else 1."""
    try:
        code: int = app(arguments, standalone_mode=False) or 0
        return code
    except typer.TyperException as error:
        say(f"{' '.join(error.format_message().split())} (--help lists what there is)")
        return error.exit_code
    except InputError as error:
        say(str(error))
        return 1 if isinstance(error, StackError) else 2
