"""The grouped engine on one GPU, in minutes: how much of the chip's peak it uses, and on what.

    python -m tests.benchmarks.gpu --to FOLDER                  at most 3.3 minutes, on an H200
    python -m tests.benchmarks.gpu --to FOLDER --minutes 8 --cases 8b:train:32 1b:peft:2
    python -m tests.benchmarks.gpu --to FOLDER --dry            a tiny model, seconds on a CPU

Llamas of `shapes` by random init, made on the GPU in bfloat16, and random tokens: users of 10 items
of 300 tokens, a stacked LoRA of rank 4 each over two anchors' merged exactly (rank 16). CASES stand
in the order of their worth. Each is alone: what goes wrong in one is written in its row, one for
which the time is too short is named as skipped, and `results.json` in FOLDER is written after each.

* `train`: optimiser steps of 5 items a user, always the same ones, so all are of one shape: one or
  two as warm-up, then the median of up to three (none: of the warm-up). `seconds_per_user` is of 10
  items: initial weights and two steps.
  `mfu` is the share of the measured matmul peak that the model's FLOPs make up, by its number of
  parameters and without padding (`tasks/lora/cost.py`). `waits`: where the host waited for the GPU
  in one step, and how often.
* `peft`, `published`: the opponents of `many_users`, user by user, without answering. Few users are
  timed, as each costs the same whatever their number. `ratios` are their seconds per user by
  `train`'s.
* `answer`, `evidence`: two questions a user; 10 items a user under each anchor's LoRA.
* `profile`: one step of few users under torch's profiler; the tables are in `<model>_profile.txt`.

The last line is one JSON object. Nothing that this imports needs prefect, polars, mlflow or
pydantic.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

from tasks.errors import short
from tests.benchmarks.gpu_cases import KINDS, Bench, empty


@dataclass(frozen=True)
class Case:
    """needs, most: seconds without which it does not begin, and that its steps may take."""

    model: str
    kind: str
    users: int
    needs: float
    most: float = 30.0


CASES = (
    Case("8b", "train", 32, 40, 75),
    Case("8b", "profile", 4, 12),
    Case("8b", "peft", 2, 12),
    Case("1b", "train", 32, 12, 25),
    Case("1b", "profile", 8, 8),
    Case("1b", "peft", 2, 6),
    Case("1b", "evidence", 32, 6),
    Case("1b", "answer", 32, 6),
    Case("1b", "train", 8, 6, 15),
    Case("1b", "train", 128, 20, 40),
    Case("1b", "published", 1, 20),
    Case("8b", "train", 8, 20, 30),
    Case("8b", "evidence", 8, 10),
    Case("8b", "answer", 8, 10),
)


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """So many times the engine's seconds per user each opponent takes, by model and users."""
    done = [row for row in rows if "seconds_per_user" in row]
    return {
        f"{one['model']} {other['kind']} / train of {one['users']}": round(
            other["seconds_per_user"] / one["seconds_per_user"], 2
        )
        for one in done
        for other in done
        if one["kind"] == "train" and other["kind"] in ("peft", "published")
        if one["model"] == other["model"]
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path, required=True, help="the folder of the results")
    parser.add_argument("--minutes", type=float, default=3.3)
    parser.add_argument("--cases", nargs="*", help="some, as 8b:train:32", default=[])
    parser.add_argument("--dry", action="store_true", help="tiny models, every case")
    return parser.parse_args()


def run(bench: Bench, case: Case, end: float) -> dict[str, Any]:
    """The row of one case, whatever becomes of it; `end`: when all must be done."""
    started = time.monotonic()
    row: dict[str, Any] = {**asdict(case), "left": round(end - started, 1)}
    if row["left"] < case.needs:
        return {**row, "skipped": "too little time is left"}
    bench.until = min(end, started + case.most)
    try:
        engine = bench.take(case.model)
        row |= {"build_seconds": bench.build_seconds, **KINDS[case.kind](bench, engine, case.users)}
    except Exception as error:
        traceback.print_exc()
        row["error"] = short(error, 500)
    empty()
    return {**row, "seconds": round(time.monotonic() - started, 2)}


def main() -> None:
    started, given = time.monotonic(), arguments()
    end = started + 60 * given.minutes
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    given.to.mkdir(parents=True, exist_ok=True)
    bench = Bench(given.to, given.dry)
    about = {
        "device": torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(bench.dtype),
        "peak_tflops": round(bench.peak / 1e12, 3),
    }
    rows: list[dict[str, Any]] = []
    # In a dry run each kind once.
    kinds = {case.kind: replace(case, users=2, needs=0, model="dry") for case in CASES}
    some = [c for c in CASES if f"{c.model}:{c.kind}:{c.users}" in given.cases or not given.cases]
    for case in kinds.values() if given.dry else some:
        rows.append(run(bench, case, end))
        print({n: v for n, v in rows[-1].items() if n not in ("waits", "all_steps")}, flush=True)
        seconds = round(time.monotonic() - started, 1)
        whole = {**about, "seconds": seconds, "ratios": ratios(rows), "rows": rows}
        (given.to / "results.json").write_text(json.dumps(whole, indent=1) + "\n")
    print(json.dumps(whole))


if __name__ == "__main__":
    main()
