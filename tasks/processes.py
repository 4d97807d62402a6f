"""Whose something on the disk is: a process by its pid and start, since a pid is given again.

A file or folder that is being filled is called `<prefix><host>~<pid>~<start>~<random>`.
"""

from __future__ import annotations

import os
import socket

import psutil

# A start of a process as two readers see it; the clock may be set between them.
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


def own_prefix(prefix: str) -> str:
    """How names begin of what this process is filling."""
    return f"{prefix}{socket.gethostname()}~{me()}~"


def ended(owner: str, host: str) -> bool:
    """Whether `owner`, `<host>~<pid>~<start>...`, is a process of this host that is gone."""
    own, pid, start, *_ = [*owner.split("~"), "", ""]
    return own == host and pid.isdigit() and not lives(int(pid), start)


def abandoned(name: str, prefix: str) -> bool:
    """Whether a process of this machine that is gone was filling what has this name."""
    return ended(name.removeprefix(prefix), socket.gethostname())
