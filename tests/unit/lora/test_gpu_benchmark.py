"""The benchmark for a GPU, on a CPU: every kind of case, on a machine with few libraries."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from tests.benchmarks.gpu_cases import DRY, ITEMS_A_STEP, KINDS
from tests.benchmarks.shapes import make_users

# As on a machine that has none of these; nor may it ask the hub for anything.
WITHOUT = ("prefect", "polars", "mlflow", "pydantic")
RUN = f"""
import sys
sys.modules.update(dict.fromkeys({WITHOUT}))
from tests.benchmarks.gpu import main
main()
"""


def test_every_case_runs_without_what_the_machine_lacks(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, "--to", str(tmp_path), "--dry"],
        capture_output=True, text=True, timeout=600,
        cwd=Path(__file__).resolve().parents[3],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / "results.json").read_text())
    rows = {row["kind"]: row for row in found["rows"]}
    assert set(rows) == set(KINDS)
    assert not [row for row in rows.values() if "error" in row or "skipped" in row]
    assert "aten::bmm" in (tmp_path / rows["profile"]["table"]).read_text()
    train = rows["train"]
    users = [own[:ITEMS_A_STEP] for own in islice(make_users(DRY), 2)]
    tokens = sum(sample.length for own in users for sample in own)
    step = train["step_seconds"]
    assert train["tokens_per_second"] * step == pytest.approx(tokens, rel=0.01)
    # Ten items are two steps, and the time of two users.
    per_user = (train["initial_seconds"] + 2 * step) / 2
    assert train["seconds_per_user"] == pytest.approx(per_user, rel=0.05)
    for kind in ("peft", "published"):
        ratio = rows[kind]["seconds_per_user"] / train["seconds_per_user"]
        assert found["ratios"][f"dry {kind} / train of 2"] == pytest.approx(ratio, rel=0.01)
