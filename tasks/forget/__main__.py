"""`python -m tasks.forget`: see `tasks/forget/user.py`."""

from __future__ import annotations

import sys
from pathlib import Path

from tasks.command import in_one_line, parser, store_of
from tasks.forget import user


@in_one_line
def main(arguments: list[str] | None = None) -> int:
    options = parser("forget", user.__doc__)
    options.add_argument("user", help="the user's id")
    options.add_argument("--data", type=Path, help="a file or folder that the user came from")
    given = options.parse_args(arguments)
    done, left = user.forget(store_of(given), given.user, given.data)
    for line in done:
        print(f"mta: {line}")
    for line in left:
        print(f"mta: LEFT: {line}", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
