"""Reading gigabytes of LaMP against `json.load`, and BM25 against the published loop.

    python -m tests.benchmarks.read_lamp             20,000 users x 185 reviews, 2 GiB
    python -m tests.benchmarks.read_lamp --quick     a tenth of it, under a minute
    python -m tests.benchmarks.read_lamp --prepare   and the whole of `prepare` on the same files

A folder of LaMP's official files in LaMP-3's shape is generated (and deleted in the end; `--folder`
says where). Each side runs in a process of its own, in turns, and the whole process counts, from
its start to its end:

* ours: `tasks.lamp.formats.copy_users`, files checked and users written to one file;
* the opponent: `json.load` of the questions, and nothing else.

BM25: the nearest other item of each item of a user, by `tasks.lamp.history` and by the published
loop, which builds `rank_bm25.BM25Okapi` on the other items anew for each. Seconds per user; both
must find the same neighbours.

Ratios are the opponent's over ours, so above 1 ours is better. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tests.benchmarks.lamp_files import write_lamp3

PEAK = """
import sys
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""
OURS = """
import sys
from pathlib import Path
from tasks.lamp.definitions import get_task
from tasks.lamp.formats import copy_users
copy_users(Path(sys.argv[1]), get_task("LaMP-3"), Path(sys.argv[1]) / "users.arrow")
"""
JSON_LOAD = """
import json, sys
with open(sys.argv[1] + "/dev_questions.json", encoding="utf-8") as file:
    users = json.load(file)
"""
PREPARE = """
import sys
from collections import Counter
from pathlib import Path
from tasks.lamp.dataset import write_dataset
from tasks.lamp.definitions import get_task
from tasks.lamp.formats import copy_users
from tasks.lamp.options import SplitOptions
everyone = Path(sys.argv[1]) / "prepared" / "everyone.arrow"
everyone.parent.mkdir()
task = get_task("LaMP-3")
found = copy_users(Path(sys.argv[1]), task, everyone)
write_dataset(everyone, Counter(found.dropped), SplitOptions(), task, 0)
"""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the users")
    parser.add_argument("--prepare", action="store_true", help="measure `prepare`, too")
    parser.add_argument("--users", type=int, help="20,000, or 2,000 with --quick")
    parser.add_argument("--items", type=int, default=185)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where files are generated, and deleted")
    given = parser.parse_args(arguments)
    users = given.users or (2_000 if given.quick else 20_000)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        started = time.perf_counter()
        size = write_lamp3(folder, users, given.items)
        print(f"{size:,} bytes generated in {time.perf_counter() - started:.0f} s", flush=True)
        figures = {"users": users, "items": given.items, "file_bytes": size}
        figures |= measure_reading(folder, given.repetitions)
        if given.prepare:
            seconds, peak = alone(PREPARE, folder)
            figures |= {"prepare_seconds": round(seconds, 2), "prepare_peak_bytes": peak}
        figures |= measure_bm25(folder, *((10, 1) if given.quick else (100, 5)))
    print(json.dumps(figures))
    return figures


def measure_reading(folder: Path, repetitions: int) -> dict[str, Any]:
    """Medians of both sides, in turns; a peak is the highest of all."""
    ours, theirs = [], []
    for _ in range(repetitions):
        ours.append(alone(OURS, folder))
        theirs.append(alone(JSON_LOAD, folder))
        print(f"ours {ours[-1]}, json.load {theirs[-1]} (seconds, bytes)", flush=True)
    seconds, other = (statistics.median(t for t, _ in side) for side in (ours, theirs))
    peak, other_peak = (max(bytes_ for _, bytes_ in side) for side in (ours, theirs))
    return {
        "seconds": round(seconds, 3),
        "peak_bytes": peak,
        "json_load_seconds": round(other, 3),
        "json_load_peak_bytes": other_peak,
        "ratio_vs_json_load_seconds": round(other / seconds, 3),
        "ratio_vs_json_load_bytes": round(other_peak / peak, 3),
    }


def alone(code: str, folder: Path) -> tuple[float, int]:
    """Seconds from start to end of a fresh Python, and the highest memory it had resident.

    From /proc: what `getrusage` calls a process's maximum may be that of the one that started it.
    """
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code + PEAK, str(folder)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return time.perf_counter() - started, int(done.stdout.split()[-1]) * 1024


def measure_bm25(folder: Path, users: int, looped: int) -> dict[str, Any]:
    """Seconds per user of `users` by ours, of the first `looped` by the published loop."""
    from tasks.lamp.history import Neighbours
    from tasks.lamp.records import read_records

    read = islice(read_records(folder / "dev_questions.json"), users)
    profiles = [[item["text"] for item in user["profile"]] for _, user in read]
    started = time.perf_counter()
    found = [Neighbours(texts).others(1) for texts in profiles]
    each = (time.perf_counter() - started) / len(profiles)
    started = time.perf_counter()
    published = [published_loop(texts) for texts in profiles[:looped]]
    loop = (time.perf_counter() - started) / looped
    same = found[:looped] == published
    print(f"BM25: ours {each:.4f} s per user, the loop {loop:.2f} s; same neighbours: {same}")
    if not same:
        raise SystemExit("BM25: not the same neighbours")
    return {
        "bm25_seconds_per_user": round(each, 5),
        "bm25_loop_seconds_per_user": round(loop, 4),
        "bm25_ratio_vs_loop": round(loop / each, 1),
    }


def published_loop(texts: Sequence[str]) -> list[list[int]]:
    """The nearest other item of each, as the published code looks for it; ties by lower index."""
    import numpy as np
    from rank_bm25 import BM25Okapi

    from tasks.lamp.history import lower_words

    found = []
    for own, text in enumerate(texts):
        others = [number for number in range(len(texts)) if number != own]
        index = BM25Okapi([lower_words(texts[number]) for number in others])
        scores = index.get_scores(lower_words(text))
        found.append([others[int(np.argmax(np.round(scores, 9)))]])
    return found


if __name__ == "__main__":
    main()
