"""One run of the benchmark on the stack, watched to its end: `python -m infra.local benchmark`."""

import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from infra.command import say
from infra.local.processes import Service
from infra.local.server import PrefectApi
from infra.local.settings import DEPLOYMENT, PROJECT, SERVER, WORKER, StackError

LOOK_SECONDS = 5.0
STAGES_SHOWN = 8
# Events that come each second while a model trains. `_progress` has what they are about.
NOISE = ("prefect.artifact", "prefect.concurrency-limit")
# So wide that none of them takes two lines.
WIDE = {"COLUMNS": "160", "PYTHONUNBUFFERED": "1"}


def benchmark(env: Mapping[str, str], arguments: Sequence[str]) -> int:
    """Run, watch, print the comparison, or a dry run's plan; the exit code of the run.

    env: of the worker. arguments: go to `prefect deployment run` as they stand.
    """
    api = PrefectApi(env["PREFECT_API_URL"])
    began = datetime.now(UTC)
    argv = [sys.executable, "-m", "prefect", "deployment", "run", DEPLOYMENT, "--watch"]
    with subprocess.Popen(
        [*argv, *arguments],
        cwd=PROJECT.root,
        env={**env, **WIDE},
        stdout=subprocess.PIPE,
        text=True,
    ) as run:
        shown = threading.Thread(target=_show, args=(run.stdout,), daemon=True)
        shown.start()
        try:
            code = _watch(run, api)
        except KeyboardInterrupt:
            say("no longer watching; the run goes on (`make stop` ends it)")
            return 130
        finally:
            if run.poll() is None:
                run.terminate()
            shown.join()
    # A run with pieces missing fails, and has a table all the same.
    files = [file for file in (PROJECT.comparison, PROJECT.plan, PROJECT.report) if file.exists()]
    written = [file for file in files if file.stat().st_mtime >= began.timestamp()]
    for table in (file for file in written if file != PROJECT.report):
        print(f"\n{table.read_text(encoding='utf-8').rstrip()}\n", flush=True)
    if code:
        reason = _last_words(api, began)
        if reason is None:
            return code  # refused before it began; Prefect has said why
        say(f"the run failed: {reason}")
        say(f"its log is in the Prefect UI and in {PROJECT.logs / 'worker.log'}")
    if PROJECT.report in written:
        say(f"report   {PROJECT.report}")
    say(f"MLflow   {env['MLFLOW_TRACKING_URI']}")
    return code


def _show(lines: Iterable[str]) -> None:
    """Print what Prefect says of the run, but NOISE."""
    for line in lines:
        if not any(one in line for one in NOISE):
            print(line, end="", flush=True)


def _last_words(api: PrefectApi, began: datetime) -> str | None:
    """The final message of a run of the deployment since `began`; None without one."""
    over = {"state": {"type": {"any_": ["FAILED", "CRASHED", "CANCELLED"]}}}
    runs = api.rows(
        "flow_runs",
        flow_runs={**over, "expected_start_time": {"after_": began.isoformat()}},
        deployments={"name": {"any_": [DEPLOYMENT.split("/")[1]]}},
        sort="END_TIME_DESC",
    )
    return " ".join((runs[0]["state"]["message"] or "no reason known").split()) if runs else None


def _progress(api: PrefectApi) -> dict[str, str]:
    """The stages' progress by artifact, the newest last; empty if the server does not answer."""
    wanted = {"artifacts": {"type": {"any_": ["progress"]}}, "sort": "UPDATED_DESC"}
    try:
        rows = api.call("POST", "/artifacts/latest/filter", {**wanted, "limit": STAGES_SHOWN})
    except StackError:
        return {}  # `_watch` looks whether the server lives
    return {row["key"]: row["description"] or "" for row in reversed(rows or [])}


def _watch(run: subprocess.Popen[str], api: PrefectApi) -> int:
    """Wait for the run's end, and say how far it is; returns its exit code.

    Raises StackError if the server or the worker has ended: the run would never end.
    """
    needed = [service for name in (SERVER, WORKER) if (service := Service.load(PROJECT, name))]
    shown = _progress(api)
    while True:
        gone = next((service for service in needed if service.process() is None), None)
        try:
            return run.wait(LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            if gone:
                raise StackError(
                    f"{gone.name} ended while the run was under way (see {gone.log}); "
                    "the next `make benchmark` starts it again and clears up"
                ) from None
        progress = _progress(api)
        for line in (line for key, line in progress.items() if shown.get(key) != line):
            say(line)
        shown |= progress
