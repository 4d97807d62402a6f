"""Which process is which: by pid and start time, since pids are reused."""

from __future__ import annotations

import os

import psutil

# A start as two readers see it; the clock may be set between them.
SAME_START_SECONDS = 5


def me() -> str:
    """This process as `pid~start`, the start in seconds since 1970."""
    return f"{os.getpid()}~{psutil.Process().create_time():.0f}"


def lives(pid: int, start: str) -> bool:
    """Whether the process that had this pid and start still runs (killed and not fetched: no)."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return abs(process.create_time() - float(start or 0)) <= SAME_START_SECONDS
    except psutil.NoSuchProcess:
        return False
    except (psutil.AccessDenied, ValueError):
        return True
