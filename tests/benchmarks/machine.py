"""What is measured of the machine: seconds, memory at its highest, its matmul peak; and FLOPs."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tasks.lora.grouped import Shapes

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


def training_flops(config: Any, shapes: Shapes, under: int, tokens: int, labels: int) -> int:
    """FLOPs of training a Llama of `config` on `tokens` positions, `labels` of them labels.

    Per position and layer of i inputs and o outputs, with stacked rank r and merged rank R:

        2 i o                     x W^T
      + 2 (R + r) (i + o)         the LoRAs
      + 2 o (R + r)               G B
      + 2 i o + 2 i (R + r)       gradient of x: G W + (G B) A
      + 2 r (i + o)               gradients of A and B of the stacked LoRA

    Positions are `tokens`, but for o_proj and the feed-forward of the last layer, and the output
    embedding (4 i o, no LoRA): `labels`. q, k and v of the first layer need no gradient of x. Not
    counted: attention's own products, whatever works element by element, padding.
    """
    last = f"model.layers.{config.num_hidden_layers - 1}."
    total = 4 * config.hidden_size * config.vocab_size * labels
    for name, (i, o) in shapes.sizes.items():
        wide = under + shapes.rank
        each = 2 * i * o + 2 * wide * (i + o) + 2 * o * wide + 2 * shapes.rank * (i + o)
        first = name.startswith("model.layers.0.self_attn.") and not name.endswith("o_proj")
        if not first:
            each += 2 * i * o + 2 * i * wide
        late = name.startswith(last) and (name.endswith("o_proj") or ".mlp." in name)
        total += each * (labels if late else tokens)
    return total
