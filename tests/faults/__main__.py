"""Kill what the benchmark runs on, again and again, and see that nothing comes of it.

    python -m tests.faults --kills 100 --seed 0

Last line: one JSON object. Exit code 1 when a piece was lost, made twice or came out differently,
or when a run did not come to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from infra.local.settings import StackError
from tests.faults.driver import Driver
from tests.faults.ways import INSIDE, FaultError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="how many faults")
    parser.add_argument("--seed", type=int, default=0, help="decides kinds, moments, targets")
    parser.add_argument("--folder", type=Path, help="an empty folder to use, and to keep")
    arguments = parser.parse_args()
    _into_namespace()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: through every `finally`
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="mta-faults-"))).absolute()
    driver = Driver(folder, arguments.kills, arguments.seed)
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
    print(json.dumps(driver.outcome.as_json() | ({"stuck": stuck} if stuck else {})))
    return 0 if good else 1


def _into_namespace() -> None:
    """Go on in a mount namespace of our own, where there may be one: the small disk is then
    mounted for us only, and goes with us however we end."""
    if INSIDE in os.environ or shutil.which("unshare") is None:
        return
    for options in (["--mount"], ["--user", "--map-root-user", "--mount"]):
        command = ["unshare", *options, "--"]
        if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
            os.environ[INSIDE] = "1"
            again = [sys.executable, "-m", "tests.faults", *sys.argv[1:]]
            os.execvp("unshare", [*command, *again])


if __name__ == "__main__":
    sys.exit(main())
