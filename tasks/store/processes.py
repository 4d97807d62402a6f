"""Whose something in the store is: a process by its pid and start, since a pid is given again.

A file or folder that is being filled is called `<prefix><host>~<pid>~<start>~<random>`. Containers
of one machine do not see each other's processes, so a host is one container, since it was started.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
from functools import cache
from pathlib import Path

import psutil

# A start of a process as two readers see it; the clock may be set between them.
SAME_START_SECONDS = 5
# As `host` gives it where a machine has an id: the machine, the boot, the namespace of pids.
SINCE_BOOT = re.compile(r"(.+-m[0-9a-f]{8})-([0-9a-f]{8})-pid-\d+")
MACHINE_ID = Path("/etc/machine-id")


@cache
def host() -> str:
    """This machine since it was started, and where there are several, this container of it."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        if identity := MACHINE_ID.read_bytes().strip():
            parts.append(f"m{hashlib.sha256(identity).hexdigest()[:8]}")
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text()[:8])
        parts.append(os.readlink("/proc/self/ns/pid"))
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(parts)).strip("-")


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
    return f"{prefix}{host()}~{me()}~"


def ended(owner: str) -> bool:
    """Whether `owner`, `<host>~<pid>~<start>...`, is a process of this machine that is gone.

    Of one in another container nothing is known, unless the machine was started again since: that
    is told by the machine's id, since machines of one image may have one name.
    """
    where, pid, start, *_ = [*owner.split("~"), "", ""]
    if where == host():
        return pid.isdigit() and not lives(int(pid), start)
    theirs, own = SINCE_BOOT.fullmatch(where), SINCE_BOOT.fullmatch(host())
    return bool(theirs and own and theirs[1] == own[1] and theirs[2] != own[2])


def abandoned(name: str, prefix: str) -> bool:
    """Whether a process of this machine that is gone was filling what has this name."""
    return ended(name.removeprefix(prefix))
