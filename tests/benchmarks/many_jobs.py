"""What it costs to send a job through Prefect: 1,000 users and 250 anchors, a job for each.

    python -m tests.benchmarks.many_jobs             1,000 users, 250 anchors; minutes
    python -m tests.benchmarks.many_jobs --quick     40 users, 10 anchors

The embedded model with budgets as small as they go, in a temporary folder, through the one Prefect
server (sqlite) that `python -m flows.mta` starts. Every user is trained and answered for by a job
of their own, every anchor as well, although the project never does that by itself
(`stacking.users_per_job`, `anchors.per_job`): what is left is what a job costs.

The work is what the stages note of each user and anchor; all other time of the workers is overhead,
of Prefect, of starting processes and of looking things up in the store. The opponent is the same
run in jobs of many (the presets' sizes): `ratio_vs_batches` is its seconds over ours, so below 1
batches are faster. The last line is one JSON object. Exit code 1 when a job's result is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import polars as pl

from tasks.results.run import Run

ROOT = Path(__file__).resolve().parents[2]


def parameters(users: int, anchors: int, workers: int, single: bool) -> dict[str, Any]:
    return {
        "lamp_tasks": ["LaMP-2M"],
        "methods": ["mta"],
        "items_curve": [],
        "split": {"few_shot_items": 4},
        "synthetic": {
            "base_users": 20,
            "anchor_candidates": anchors,
            "few_shot_users": users,
            "items_min": 5,
            "items_max": 6,
            "few_shot_items": 4,
            "queries": 1,
            "themes": 4,
        },
        "base": {"tiny": {"hidden": 16, "layers": 1, "heads": 2, "steps": 20, "batch_size": 16}},
        "anchors": {
            "train_on": "user",
            "clustering": "kmeans",
            "count": anchors,
            "min_items": 4,
            "refits": 0,
            **({"per_job": 1} if single else {}),
        },
        "meta_lora": {"rank": 1, "alpha": 1.0, "epochs": 1, "batch_size": 8},
        "fusion": {"top_m": 2, "weights": "cosine"},
        "stacking": {
            "rank": 1,
            "alpha": 1.0,
            "epochs": 1,
            **({"users_per_job": 1} if single else {}),
        },
        "compute": {"max_workers": workers},
    }


def run(folder: Path, given: dict[str, Any]) -> tuple[float, dict[str, int], float]:
    """Seconds of the whole process, jobs' results per stage, and the seconds that the work took."""
    folder.mkdir()
    argv = [sys.executable, "-m", "flows.mta"]
    for name, value in given.items():
        argv += ["-p", f"{name}={json.dumps(value)}"]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MTA_", "PREFECT_", "MLFLOW_"))}
    env |= {"MTA_STORE": str(folder / ".mta" / "store"), "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    with (folder / "log").open("w") as log:
        code = subprocess.call(argv, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    seconds = time.perf_counter() - started
    if code:
        tail = (folder / "log").read_text().splitlines()[-5:]
        raise SystemExit("\n".join([f"the run failed (exit code {code}):", *tail]))
    (file,) = (folder / ".mta" / "runs").glob("*.json")
    (cell,) = Run.model_validate_json(file.read_text()).cells
    batches, anchors = cell.answers["mta"], cell.mergings[0].merged.bank.members
    tables = [pl.read_parquet(folder / ".mta" / "store" / one.work.uri) for one in batches]
    work = sum(float(table["seconds"].sum()) for table in tables)
    work += sum(one.seconds for one in anchors)
    counts = {"answers": len(batches), "meta_lora": len(anchors)}
    return seconds, counts, work


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="40 users and 10 anchors")
    parser.add_argument("--users", type=int, help="1,000, or 40 with --quick")
    parser.add_argument("--anchors", type=int, help="250, or 10 with --quick")
    parser.add_argument("--workers", type=int, default=2, help="jobs at once")
    given = parser.parse_args()
    users = given.users or (40 if given.quick else 1000)
    anchors = given.anchors or (10 if given.quick else 250)
    with tempfile.TemporaryDirectory() as name:
        single = parameters(users, anchors, given.workers, True)
        seconds, counts, work = run(Path(name) / "single", single)
        print(f"single jobs: {seconds:.1f} s, {counts}", flush=True)
        batched = parameters(users, anchors, given.workers, False)
        other, batches, _ = run(Path(name) / "batched", batched)
        print(f"in batches: {other:.1f} s, {batches}", flush=True)
    jobs = sum(counts.values())
    figures = {
        "users": users,
        "anchors": anchors,
        "workers": given.workers,
        "jobs": jobs,
        "seconds": round(seconds, 1),
        "work_seconds": round(work, 1),
        "overhead_seconds_per_job": round((seconds * given.workers - work) / jobs, 3),
        "batched_seconds": round(other, 1),
        "ratio_vs_batches": round(other / seconds, 3),
    }
    complete = counts == {"answers": users, "meta_lora": anchors}
    print(json.dumps(figures | {"missing": not complete}))
    return 0 if complete else 1


if __name__ == "__main__":
    raise SystemExit(main())
