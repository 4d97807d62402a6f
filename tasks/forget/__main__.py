"""Remove a user, and all that was made of the user's texts, and prove it by a search.

    python -m tasks.forget USER_ID [--data PATH] [--store PLACE]

Removed from the store: every piece that holds the user's id or a text of the user's; every LoRA and
tiny base model that was trained on the user's items, and what was made with those for the users of
the same data; every piece without names (tokens, maps, draws), since nothing tells whose they are.
Removed beside it: reports and runs that name any of it, and the id in logs. In MLflow: artifacts
and names. What others lose with it is computed again by their next run, from their data.

The file the user came from is not touched: it is named, and the user is back after the next run
where it still holds the user. `--data` names one that no run remembers. The search afterwards goes
over everything again. Exit code 0: nothing is left; 1: something is, and is said; 2: no such user.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tasks.command import in_one_line, parser, store_of
from tasks.forget.user import forget


@in_one_line
def main(arguments: list[str] | None = None) -> int:
    options = parser("forget", __doc__)
    options.add_argument("user", help="the user's id")
    options.add_argument("--data", type=Path, help="a file or folder that the user came from")
    given = options.parse_args(arguments)
    done, left = forget(store_of(given), given.user, given.data)
    for line in done:
        print(f"mta: {line}")
    for line in left:
        print(f"mta: LEFT: {line}", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
