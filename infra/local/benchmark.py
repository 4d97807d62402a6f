"""One run of the benchmark on the stack, watched to its end.

    python -m infra.local benchmark -p seed=1

Not run by itself. What follows `benchmark` goes to `prefect deployment run` as it stands.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

from infra.local.api import PrefectApi
from infra.local.processes import Record
from infra.local.settings import DEPLOYMENT, Layout, StackError
from infra.local.stack import SERVER, WORKER_PROCESS, up

LOOK_SECONDS = 1.0
PROGRESS_SECONDS = 5.0
STAGES_SHOWN = 8


def benchmark(
    layout: Layout, environ: Mapping[str, str], arguments: Sequence[str], say: Callable[[str], None]
) -> int:
    """Run, watch, print the comparison, or a dry run's plan; return the exit code of the run."""
    running = up(layout, environ, say)
    began = time.time()
    argv = [sys.executable, "-m", "prefect", "deployment", "run", DEPLOYMENT, "--watch"]
    if "--watch-interval" not in arguments:
        argv += ["--watch-interval", "1"]
    with subprocess.Popen([*argv, *arguments], cwd=layout.root, env=running.env) as watch:
        try:
            code = _watch(layout, watch, running.api, say)
        except KeyboardInterrupt:
            say("no longer watching; the run goes on (`make stop` ends it)")
            return 130
        finally:
            if watch.poll() is None:
                watch.terminate()
    # A run with pieces missing fails, and has a table all the same.
    tables = (layout.comparison, layout.plan)
    written = [table for table in tables if table.exists() and table.stat().st_mtime >= began]
    for table in written:
        print(f"\n{table.read_text(encoding='utf-8').rstrip()}\n", flush=True)
    if not written and not code:
        say(f"the run wrote no comparison to {layout.comparison}")
    if code:
        reason = _last_words(running.api, began)
        if reason is None:
            return code  # refused before it began; Prefect has said why
        say(f"the run failed: {reason}")
        say(f"its log is in the Prefect UI and in {layout.logs / 'worker.log'}")
    say(f"MLflow   {running.mlflow_uri}")
    return code


def _last_words(api: PrefectApi, began: float) -> str | None:
    """The final message of the deployment's newest run created since `began`; None without one."""
    flow, deployment = DEPLOYMENT.split("/")
    runs = api.call(
        "POST",
        "/flow_runs/filter",
        {
            "flows": {"name": {"any_": [flow]}},
            "deployments": {"name": {"any_": [deployment]}},
            "flow_runs": {"state": {"type": {"any_": ["FAILED", "CRASHED", "CANCELLED"]}}},
            "sort": "END_TIME_DESC",
            "limit": 1,
        },
    )
    if not runs or datetime.fromisoformat(runs[0]["created"]).timestamp() < began:
        return None
    message = (runs[0]["state"] or {}).get("message")
    return " ".join((message or "the server knows no reason").split())


def _progress(api: PrefectApi) -> dict[str, str]:
    """What stages say of themselves, by their progress artifacts, the one that moved last at the
    end: LaMP tasks run side by side."""
    where = {
        "artifacts": {"type": {"any_": ["progress"]}},
        "sort": "UPDATED_DESC",
        "limit": STAGES_SHOWN,
    }
    try:
        newest = api.call("POST", "/artifacts/latest/filter", where) or []
    except StackError:
        return {}  # only a look; whether the server lives is seen elsewhere
    return {row["key"]: row["description"] or "" for row in reversed(newest)}


def _watch(
    layout: Layout, watch: subprocess.Popen[bytes], api: PrefectApi, say: Callable[[str], None]
) -> int:
    """Wait for the run's end, or for that of what it needs: without these it would never come."""
    needed = [Record.load(layout.run, name) for name in (SERVER, WORKER_PROCESS)]
    shown, looked = _progress(api), time.monotonic()
    while True:
        try:
            return watch.wait(LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        if time.monotonic() - looked > PROGRESS_SECONDS:
            progress, looked = _progress(api), time.monotonic()
            for key, line in progress.items():
                if shown.get(key) != line:
                    say(line)
            shown |= progress
        for record in needed:
            if record is not None and record.process() is None:
                try:
                    return watch.wait(5)  # it may have seen the end itself
                except subprocess.TimeoutExpired:
                    log = layout.logs / f"{record.name}.log"
                    raise StackError(
                        f"{record.name} ended while the run was under way (see {log}); "
                        "the next `make benchmark` starts it again and clears up"
                    ) from None
