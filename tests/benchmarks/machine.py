"""What is measured of the machine: seconds, memory at its highest, its matmul peak."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PROCESS = Path("/proc/self")


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `call` takes, until the device has done it."""
    wait(device)
    started = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def profiled(call: Callable[[], Any], device: torch.device) -> str:
    """A table of what `call` spends its time on, operator by operator, longest first."""
    on_gpu = device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as seen:
        call()
        wait(device)
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    table: str = seen.key_averages().table(sort_by=order, row_limit=25)
    return table


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of the machine's own best square product, measured."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, dtype=dtype, device=device)
    times = [timed(lambda: a @ a, device) for _ in range(8)]
    return 2 * size**3 / min(times)


def reset_peak(device: torch.device) -> None:
    """Count the highest memory anew from here (off Linux it stays that of the whole process)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        (PROCESS / "clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes(device: torch.device) -> int:
    """The highest memory since `reset_peak`: torch's on the GPU, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        for line in (PROCESS / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
