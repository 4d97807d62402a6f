"""The store: what killed processes were making is swept, and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.store import processes
from tasks.store.artifacts import Store
from tasks.store.pieces import digest
from tests.unit.store.pieces_case import KEY, never, write


def half_made(pieces: Store, host: str, process: str) -> Path:
    """`process`: pid~start."""
    folder = pieces.root / "bank" / KEY[:2] / f".making-{host}~{process}~abc_123"
    folder.mkdir(parents=True)
    (folder / "half").write_text("x")
    return folder


def test_sweep_takes_what_dead_processes_left(pieces: Store) -> None:
    """A process that has ended, one whose pid another has by now (this one's, from before a restart
    of the machine), one that lives (this one, however old), one of another machine."""
    piece = pieces.get("bank", KEY, write())
    ended = subprocess.Popen(["true"])
    ended.wait()
    host, now = processes.host(), time.time()
    start = psutil.Process().create_time()
    dead = half_made(pieces, host, f"{ended.pid}~{now:.0f}")
    before = half_made(pieces, host, f"{os.getpid()}~{start - 3600:.0f}")
    living = half_made(pieces, host, f"{os.getpid()}~{start:.0f}")
    elsewhere = half_made(pieces, "other-host", f"{ended.pid}~{now:.0f}")
    two_days_ago = time.time() - 2 * 86_400
    for folder in (living, piece.folder):
        os.utime(folder, (two_days_ago, two_days_ago))
    pieces.sweep()
    assert not dead.exists()
    assert not before.exists()
    assert living.exists()
    assert elsewhere.exists()
    assert pieces.get("bank", KEY, never).cached


def test_sweep_leaves_another_containers_alone(pieces: Store) -> None:
    """Its host has this one's name and boot, its processes' numbers say nothing here."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    container = re.sub(r"\d+$", "7", processes.host())
    assert container != processes.host()
    theirs = half_made(pieces, container, f"{ended.pid}~{time.time():.0f}")
    pieces.sweep()
    assert theirs.exists()


def test_sweep_takes_what_was_left_before_the_machine_was_started(
    pieces: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another boot of the machine, by name and id; of another machine of that name it is not."""
    monkeypatch.setattr(processes, "host", lambda: "vm-m0123abcd-aaaaaaaa-pid-1")
    before = half_made(pieces, "vm-m0123abcd-bbbbbbbb-pid-2", "1~1")
    another = half_made(pieces, "vm-m4567abcd-bbbbbbbb-pid-2", "1~1")
    unknown = half_made(pieces, "vm-bbbbbbbb-pid-2", "1~1")
    pieces.sweep()
    assert not before.exists()
    assert another.exists()
    assert unknown.exists()


def test_sweep_knows_the_folders_that_are_made(pieces: Store) -> None:
    """The folder `make` works in is this process's; left behind by a dead one it goes."""
    seen: list[Path] = []

    def make(out: Path) -> dict[str, Any]:
        pieces.sweep()
        seen.append(out)
        return write()(out)

    pieces.get("bank", KEY, make)
    script = (
        "import os, sys; from pathlib import Path; from tasks.store.artifacts import Store; "
        "Store(Path(sys.argv[1])).make('bank', sys.argv[2], lambda out: os._exit(9))"
    )
    other = digest("other")
    subprocess.run([sys.executable, "-c", script, str(pieces.root), other], check=False)
    assert len(list(pieces.root.glob("*/*/.making-*"))) == 1
    pieces.sweep()
    assert list(pieces.root.glob("*/*/.making-*")) == []
    assert pieces.get("bank", KEY, never).cached
