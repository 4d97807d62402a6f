"""Log what MLflow did not take.

    python -m tasks.tracking [--store .mta/store]

logs what waits in `spool` beside the store, one line per run. Exit code 0: nothing waits any more;
1: something does; 2: there is no MLflow to ask.
"""

from __future__ import annotations

import os
import sys

from tasks.command import in_one_line, parser, store_of
from tasks.tracking.replay import mlflow_uris
from tasks.tracking.spool import FOLDER, replay_all, waiting


@in_one_line
def main(arguments: list[str] | None = None) -> int:
    where = store_of(parser("tracking", __doc__).parse_args(arguments))
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if not waiting(where.root.parent):
        print("mta: nothing waits to be logged")
        return 0
    left = replay_all(where, mlflow_uris(where.root.parent), lambda line: print(f"mta: {line}"))
    if left:
        print(f"mta: {left} entries still wait in {where.root.parent / FOLDER}", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
