"""What the commands `python -m tasks.NAME` share: the store they take, how bad input ends them."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from tasks.errors import InputError
from tasks.stage import store, store_at
from tasks.store.artifacts import Store

P = ParamSpec("P")


def in_one_line(main: Callable[P, int]) -> Callable[P, int]:
    """Decorator of a command: bad input is one line and exit code 2."""

    @functools.wraps(main)
    def run(*arguments: P.args, **named: P.kwargs) -> int:
        try:
            return main(*arguments, **named)
        except InputError as error:
            print(f"mta: {error}", file=sys.stderr)
            return 2

    return run


def parser(name: str, described: str | None) -> argparse.ArgumentParser:
    """Of a command that takes `--store`."""
    made = argparse.ArgumentParser(
        prog=f"python -m tasks.{name}",
        description=described,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--store", help="a folder or URL; default: MTA_STORE, else .mta/store")
    return made


def store_of(given: argparse.Namespace) -> Store:
    """The store that `--store` names, or else that of this process."""
    return store_at(given.store) if given.store else store()
