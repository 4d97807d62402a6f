"""Kill what the benchmark runs on, again and again, and see that nothing comes of it.

    python -m tests.faults --kills 100 --seed 0

Last line: one JSON object. Exit code 1 when a piece was lost, made twice or came out differently,
or when a run did not come to its end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from infra.local.settings import StackError
from tests.faults.driver import Driver
from tests.faults.kinds import KINDS
from tests.faults.ways import FaultError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="how many faults")
    parser.add_argument("--seed", type=int, default=0, help="decides kinds, moments, targets")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of faults")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that work for a run; 0: its own thread"
    )
    parser.add_argument(
        "--tables", type=Path, help="a folder whose prefect.db and mlflow.db runs begin with"
    )
    parser.add_argument("--folder", type=Path, help="an empty folder to use, and to keep")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: through every `finally`
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="mta-faults-"))).absolute()
    driver = Driver(folder, arguments.kills, arguments.seed, arguments.kinds, arguments.workers)
    if arguments.tables:
        shutil.copytree(arguments.tables, driver.layout.state / "local")
    stuck = ""
    try:
        driver.run()
    except (FaultError, StackError) as error:
        stuck = str(error)
    except KeyboardInterrupt:
        stuck = "interrupted"
    good = driver.outcome.good() and not stuck
    if not good:
        print(f"{stuck or 'not as it should be'}; logs: {driver.layout.logs}", flush=True)
    elif arguments.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(asdict(driver.outcome) | ({"stuck": stuck} if stuck else {})))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
