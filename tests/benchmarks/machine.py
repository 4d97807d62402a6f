"""What is measured of the machine: seconds, memory at its highest, its matmul peak."""

from __future__ import annotations

import gc
import resource
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

PROCESS = Path("/proc/self")
CPU = torch.device("cpu")


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


def kernels(seen: profile, wall: float) -> dict[str, Any]:
    """What the GPU did in `wall` profiled seconds: seconds busy and idle, counts, longest kernels.

    launches, syncs: calls of the CUDA runtime by the host. On a CPU all is 0.
    """
    on_gpu = sorted(
        (one for one in seen.events() if one.device_type == DeviceType.CUDA),
        key=lambda one: one.time_range.start,
    )
    busy, end = 0.0, 0.0
    by_name: dict[str, list[float]] = {}
    for one in on_gpu:
        busy += max(0.0, one.time_range.end - max(end, one.time_range.start))
        end = max(end, one.time_range.end)
        held = by_name.setdefault(one.name[:160], [0.0, 0])
        held[0] += one.time_range.elapsed_us() / 1e3
        held[1] += 1
    calls = Counter(
        one.name
        for one in seen.events()
        if one.device_type == DeviceType.CPU and one.name.startswith("cu")
    )
    longest = sorted(by_name.items(), key=lambda one: -one[1][0])[:40]
    return {
        "wall": round(wall, 4),
        "busy": round(busy / 1e6, 4),
        "gaps": round(wall - busy / 1e6, 4),
        "kernels": len(on_gpu),
        "launches": sum(n for name, n in calls.items() if "Launch" in name),
        "syncs": sum(n for name, n in calls.items() if "Synchronize" in name),
        "calls": dict(calls.most_common(15)),
        "longest": {name: [round(ms, 2), count] for name, (ms, count) in longest},
    }


@dataclass
class Waits:
    """How often the host waited for the GPU, by file and line; counted until `stop`."""

    caught: list[warnings.WarningMessage]
    counting: bool
    places: Counter[str] = field(default_factory=Counter)

    def stop(self) -> None:
        if self.counting:
            self.counting = False
            torch.cuda.set_sync_debug_mode("default")
            self.places.update(
                f"{'/'.join(Path(one.filename).parts[-2:])}:{one.lineno}"
                for one in self.caught
                if "synchronizing CUDA operation" in str(one.message)
            )


@contextmanager
def waits_of_host(device: torch.device) -> Iterator[Waits]:
    """Count waits from here; on a CPU there are none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        waits = Waits(caught, device.type == "cuda")
        if waits.counting:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            waits.stop()


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
