"""The program behind the Makefile.

    python -m infra.local up                   start what does not run yet
    python -m infra.local deploy               the same, and deploy in any case
    python -m infra.local benchmark -p seed=1  the same, then one run, watched to its end
    python -m infra.local status               exit code 3 unless all of it is well
    python -m infra.local down                 end what was started
    python -m infra.local clean                remove .mta

Variables: PREFECT_PORT (4200), MLFLOW_PORT (5000), GPU_SLOTS (1; without a GPU one per core, at
most 4), MLFLOW_TRACKING_URI (another MLflow; then none is started here), MTA_PREFECT_DATABASE,
MTA_MLFLOW_DATABASE and MTA_MLFLOW_ARTIFACTS (instead of files below .mta; read when a server
starts).
"""

from __future__ import annotations

import os
import sys

from infra.command import say
from infra.local import stack
from infra.local.benchmark import benchmark
from infra.local.settings import StackError, project_layout

COMMANDS = ("up", "deploy", "benchmark", "status", "down", "clean")


def main(argv: list[str]) -> int:
    # No argparse: what follows `benchmark` belongs to Prefect, options and all.
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command in ("-h", "--help"):
        print(__doc__)
        return 0
    if command not in COMMANDS or (rest and command != "benchmark"):
        say(f"usage: python -m infra.local {'|'.join(COMMANDS)}, arguments only to `benchmark`")
        return 2
    layout = project_layout()
    try:
        match command:
            case "benchmark":
                return benchmark(layout, os.environ, rest, say)
            case "status":
                rows = stack.status(layout)
                for row in rows:
                    print(f"{row['name']:15} {row['state']:16} {row['pid'] or '':>8} {row['url']}")
                return 0 if all(row["state"] == "running" for row in rows) else 3
            case "down":
                stack.down(layout, say)
            case "clean":
                stack.clean(layout)
            case _:
                stack.up(layout, os.environ, say, deploy=command == "deploy")
    except StackError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
