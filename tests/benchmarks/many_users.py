"""Training many users' stacked LoRAs: the grouped engine against what people do today.

    python -m tests.benchmarks.many_users [--quick] [--model embedded|40m|1b|8b] [--threads N]

Same model (random init), same users and token ids, one run; each opponent is timed in turns with
the engine and the median taken. Ratios are users per second of the engine over the opponent's; the
merged LoRA lies below in both, but for `ratio_vs_peft_without_merged`, where it does in neither.
The last line is one JSON object; a picture and the figures in full go to `--out`.

FLOPs, for the share of the machine's own matmul peak (MFU), per token: 4 x parameters of the frozen
linear layers that a position passes (forward, and backward to the inputs only), 2 x 3 x the LoRAs'
trained numbers (forward, gradients of inputs and weights), 4 x those of the frozen merged LoRA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from tasks.lora.adapters import write_peft
from tasks.lora.bank import Bank
from tasks.lora.base import load_base
from tasks.lora.batches import Encoded
from tasks.lora.group_train import train_group
from tasks.lora.grouped import grouped, shapes_of
from tasks.lora.merge import MergedUsers, merge
from tasks.lora.tiny import train_tokenizer
from tasks.lora.train import Recipe, epochs
from tests.benchmarks.opponents import train_peft, train_published

# `tokens` per item on average; `batch` x `accumulation` items per optimiser step.
SHAPES: dict[str, dict[str, Any]] = {
    "embedded": {
        "hidden": 64, "layers": 2, "heads": 4, "wide": 170, "vocabulary": 2000,
        "tokens": 15, "items": 10, "batch": 4, "accumulation": 1, "epochs": 5, "rank": 8,
    },
    "40m": {
        "hidden": 512, "layers": 8, "heads": 8, "wide": 1376, "vocabulary": 8000,
        "tokens": 256, "items": 10, "batch": 2, "accumulation": 1, "epochs": 1, "rank": 8,
    },
    "1b": {
        "hidden": 2048, "layers": 16, "heads": 32, "wide": 8192, "vocabulary": 32000,
        "tokens": 300, "items": 10, "batch": 2, "accumulation": 4, "epochs": 1, "rank": 8,
    },
    "8b": {
        "hidden": 4096, "layers": 32, "heads": 32, "wide": 14336, "vocabulary": 32000,
        "tokens": 300, "items": 10, "batch": 2, "accumulation": 4, "epochs": 1, "rank": 8,
    },
}  # fmt: skip
STACKED_RANK, MERGED_MEMBERS = 4, 2


def build(shape: dict[str, Any], folder: Path, dtype: torch.dtype) -> None:
    """A Llama of the shape by random init, with a byte-level tokenizer, written to `folder`."""
    tokenizer = train_tokenizer(["a film of a quiet harbour"], 300)
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["wide"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_users(shape: dict[str, Any], count: int) -> list[list[Encoded]]:
    """Users of random tokens, with lengths that vary as LaMP's do (a quarter around the mean)."""
    generator = torch.Generator().manual_seed(1)
    users = []
    for _ in range(count):
        own = []
        for _ in range(shape["items"]):
            spread = float(torch.randn(1, generator=generator)) * 0.25
            length = max(4, int(shape["tokens"] * (1 + spread)))
            ids = torch.randint(3, shape["vocabulary"], (length,), generator=generator).tolist()
            own.append(Encoded(ids[:-2], [*ids[-2:-1], 2]))
        users.append(own)
    return users


def timed(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of the machine's own best square product, measured."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, dtype=dtype, device=device)
    times = [timed(lambda: a @ a, device) for _ in range(8)]
    return 2 * size**3 / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under two minutes on two cores")
    parser.add_argument("--model", choices=sorted(SHAPES), default="embedded")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--users", type=int, nargs="*", default=None)
    parser.add_argument("--repetitions", type=int, default=None)
    parser.add_argument("--out", type=Path, default=Path(".mta/benchmarks"))
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(given.threads)
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    shape = SHAPES[given.model]
    counts = given.users or ([64] if given.quick else [1, 8, 32, 128, 512])
    repetitions = given.repetitions or (3 if given.quick else 5)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "base"
        build(shape, folder, dtype)
        rows = [
            measure(shape, folder, Path(scratch), count, repetitions, dtype, given.quick)
            for count in counts
        ]
    given.out.mkdir(parents=True, exist_ok=True)
    name = f"many_users_{given.model}"
    (given.out / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, given.model, given.out / f"{name}.png")
    for row in rows:
        print({key: value for key, value in row.items() if key != "times"})
    print(json.dumps({**rows[-1], "times": None, "model": given.model, "threads": given.threads}))


def measure(
    shape: dict[str, Any],
    folder: Path,
    scratch: Path,
    count: int,
    repetitions: int,
    dtype: torch.dtype,
    quick: bool,
) -> dict[str, Any]:
    """One row: `count` users through the engine and its opponents, in turns."""
    base = load_base(folder, max_tokens=4096)
    users = make_users(shape, count)
    recipe = Recipe(
        5e-3, shape["epochs"], shape["batch"], shape["accumulation"], "cosine", 0.1, 1.0, 0.0
    )
    shapes = shapes_of(base.model, "all-linear", STACKED_RANK)
    generator = torch.Generator().manual_seed(2)
    rank = shape["rank"]
    layers = {
        name: (
            torch.randn(MERGED_MEMBERS, rank, fan_in, generator=generator) / fan_in**0.5,
            torch.randn(MERGED_MEMBERS, fan_out, rank, generator=generator) * 0.01,
        )
        for name, (fan_in, fan_out) in shapes.sizes.items()
    }
    bank = Bank(("0", "1"), layers, 2.0)
    recipes = [(["0", "1"], [0.6, 0.4])] * count
    merged = MergedUsers(bank, recipes, "exact", base.device)
    adapter = scratch / "merged-adapter"
    write_peft(adapter, merge([bank.lora("0"), bank.lora("1")], [0.6, 0.4], "exact"), "base")
    outcomes = []

    def engine(frozen: Any = merged.parts) -> None:
        with grouped(base.model, list(shapes.sizes)) as found:
            outcomes.append(
                train_group(
                    base,
                    found,
                    shapes,
                    users,
                    recipe,
                    list(range(count)),
                    scale=2.0,
                    frozen=frozen,
                )
            )

    # Opponents do the same work per user whatever the number of users: a sample of users is enough.
    few = users[: min(count, 4 if quick else 8)]
    under = load_base(folder, max_tokens=4096).model
    pad = base.tokenizer.pad_token_id
    names = ("engine", "peft", "engine_bare", "peft_bare", "published")
    times: dict[str, list[float]] = {name: [] for name in names}
    timed(engine, base.device)
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    two = users[:2]

    def peft(adapter: Path | None = adapter) -> None:
        train_peft(under, few, recipe, STACKED_RANK, 8.0, pad, adapter)

    def published() -> None:
        train_published(folder, two, recipe, STACKED_RANK, 8.0, pad, adapter, dtype, base.device)

    for repetition in range(repetitions):
        times["engine"].append(timed(engine, base.device) / count)
        times["peft"].append(timed(peft, base.device) / len(few))
        times["engine_bare"].append(timed(partial(engine, None), base.device) / count)
        times["peft_bare"].append(timed(partial(peft, None), base.device) / len(few))
        if repetition < (1 if quick else 3):
            times["published"].append(timed(published, base.device) / len(two))
    median = {name: statistics.median(values) for name, values in times.items()}
    outcome = outcomes[0]
    steps = sum(1 for _ in epochs(shape["items"], recipe, 0))
    frozen_numbers = sum(fan_in * fan_out for fan_in, fan_out in shapes.sizes.values())
    wide = sum(rank * MERGED_MEMBERS * (i + o) for i, o in shapes.sizes.values())
    flops = (4 * frozen_numbers + 6 * shapes.width + 4 * wide) * sum(outcome.tokens)
    peak = matmul_peak(base.device, base.model.dtype)
    return {
        "users": count,
        "steps": steps,
        "users_per_hour": round(3600 / median["engine"], 1),
        "tokens_per_second": round(sum(outcome.tokens) / (median["engine"] * count), 1),
        "ratio_vs_peft": round(median["peft"] / median["engine"], 2),
        "ratio_vs_peft_without_merged": round(median["peft_bare"] / median["engine_bare"], 2),
        "ratio_vs_published": round(median["published"] / median["engine"], 2),
        "mfu": round(flops / (median["engine"] * count) / peak, 4),
        "padding": round(outcome.padding, 4),
        "peak_bytes": peak_bytes(base.device),
        "bytes_per_user": 4 * shapes.width,
        "device": torch.cuda.get_device_name() if base.device.type == "cuda" else "cpu",
        "times": times,
    }


def peak_bytes(device: torch.device) -> int:
    """Peak memory: of the GPU since the engine was warm, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def draw(rows: list[dict[str, Any]], model: str, path: Path) -> None:
    """Users per hour against the number of users, engine and opponents."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    users = [row["users"] for row in rows]
    rate = [row["users_per_hour"] for row in rows]
    for name, values in (
        ("grouped engine", rate),
        ("PEFT, one by one", [r / row["ratio_vs_peft"] for r, row in zip(rate, rows, strict=True)]),
        (
            "published recipe",
            [r / row["ratio_vs_published"] for r, row in zip(rate, rows, strict=True)],
        ),
    ):
        axes.plot(users, values, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("users trained together")
    axes.set_ylabel("users per hour")
    axes.set_title(f"Stacked LoRAs, {model} model")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, bbox_inches="tight")


if __name__ == "__main__":
    main()
