"""What is measured on one GPU (`gpu`): the engine on one model, and its opponents."""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tasks.lora.adapters import LoraBatch
from tasks.lora.answer import evidence
from tasks.lora.base import as_base, pick_device, pick_dtype
from tasks.lora.batches import Encoded
from tasks.lora.cost import flops
from tasks.lora.group_train import default_positions, train_group
from tasks.lora.grouped import fresh, grouped
from tasks.lora.merge import MergedUsers
from tasks.lora.train import Outcome
from tests.benchmarks.engine import SCALE, STACKED_RANK, Engine
from tests.benchmarks.machine import (
    kernels,
    matmul_peak,
    peak_bytes,
    reset_peak,
    timed,
    wait,
    waits_of_host,
)
from tests.benchmarks.opponents import Job, train_peft, train_published
from tests.benchmarks.shapes import SHAPES, make, make_questions, make_users
from tests.benchmarks.steps import MOST_WARM, Enough, Steps

ITEMS_A_STEP = 5
TIMED = 3
DRY: dict[str, Any] = {
    "hidden": 16, "layers": 2, "heads": 2, "wide": 32, "vocabulary": 304,
    "tokens": 12, "items": 10, "batch": 2, "accumulation": 4, "epochs": 1, "rank": 8, "new": 2,
}  # fmt: skip


class Bench:
    """The engine on one model at a time, and each kind of case on it."""

    def __init__(self, to: Path, dry: bool) -> None:
        self.to, self.dry, self.device = to, dry, pick_device("auto")
        self.dtype = pick_dtype("auto", self.device)
        # Until when training is timed; at least one step.
        self.until = time.monotonic()
        self.peak = matmul_peak(self.device, self.dtype)
        self.model, self.build_seconds = "", 0.0
        self.shape: dict[str, Any] = {}
        self.engine: Engine | None = None

    def take(self, model: str) -> Engine:
        """The engine with this model, made where it is not the last one."""
        if self.model != model or self.engine is None:
            self.engine = None
            empty()
            started = time.monotonic()
            shape = DRY if self.dry else SHAPES[model]
            base = as_base(*make(shape, self.dtype), self.device, 4096)
            self.shape, self.engine, self.model = shape, Engine(shape, base), model
            wait(self.device)
            self.build_seconds = round(time.monotonic() - started, 2)
        return self.engine

    def train(self, engine: Engine, count: int) -> dict[str, Any]:
        users = self.users(count)
        steps = Steps(self.device, self.until)
        positions, started = default_positions(engine.base), time.monotonic()
        initial = fresh(engine.shapes, range(len(users))).to(self.device)
        initial_seconds = time.monotonic() - started
        merged = engine.merged(count)
        reset_peak(self.device)
        with waits_of_host(self.device) as waits:
            steps.after = lambda _: waits.stop()
            most = MOST_WARM + TIMED
            outcome, batches = self.steps(engine, users, merged, initial, steps, most)
        step = statistics.median(steps.timed or steps.seconds[-1:])
        tokens = sum(s.length for own in users for s in own)
        loras = engine.shapes.width + engine.merged_width
        useful = flops(engine.base.model, [s for own in users for s in own], loras, backward=True)
        per_user = (initial_seconds + self.shape["items"] / ITEMS_A_STEP * step) / len(users)
        return {
            "step_seconds": round(step, 4),
            "all_steps": [round(one, 4) for one in steps.seconds],
            "timed_steps": len(steps.timed),
            "initial_seconds": round(initial_seconds, 3),
            "seconds_per_user": round(per_user, 4),
            "tokens_per_second": round(tokens / step, 1),
            "mfu": round(useful / step / self.peak, 4),
            "micro_batches": round(batches / len(steps.seconds), 1),
            "attention": "end to end" if engine.base.end_to_end else "masked",
            "positions": positions,
            "padding": round(1 - sum(outcome.tokens) / max(outcome.computed, 1), 4)
            if outcome
            else None,
            "halved": outcome.halved if outcome else None,
            "losses": [round(statistics.mean(one), 4) for one in zip(*outcome.losses, strict=True)]
            if outcome
            else None,
            "peak_bytes": peak_bytes(self.device),
            "bytes_per_user": 4 * engine.shapes.width,
            "waits_of_a_step": sum(waits.places.values()),
            "waits": dict(sorted(waits.places.items(), key=lambda one: -one[1])[:12]),
        }

    def users(self, count: int) -> list[list[Encoded]]:
        """The items of one optimiser step per user."""
        return [own[:ITEMS_A_STEP] for own in islice(make_users(self.shape), count)]

    def steps(
        self, engine: Engine, users: Sequence[Sequence[Encoded]], merged: MergedUsers,
        initial: torch.Tensor, steps: Steps, most: int,
    ) -> tuple[Outcome | None, int]:  # fmt: skip
        """Train for at most so many steps of all items; the number of micro-batches, too."""
        batches = []

        def under(numbers: Sequence[int]) -> LoraBatch:
            batches.append(len(numbers))
            return merged.parts(numbers)

        options = replace(engine.options, batch_size=ITEMS_A_STEP, accumulation=1, epochs=most)
        outcome = None
        with grouped(engine.base.model, list(engine.shapes.sizes)) as layers:
            steps.begin()
            with suppress(Enough):
                outcome = train_group(
                    engine.base, layers, engine.shapes, users, options, range(len(users)),
                    scale=SCALE, frozen=under, initial=initial, progress=steps,
                )  # fmt: skip
        return outcome, len(batches)

    def profile(self, engine: Engine, count: int) -> dict[str, Any]:
        """One warm step and one under the profiler."""
        users = self.users(count)
        on_gpu = self.device.type == "cuda"
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        seen = profile(activities=kinds)
        steps = Steps(self.device, float("inf"))
        # As part of its step the profiler's own start would count.
        steps.after = lambda done: seen.start() if done == 2 else seen.stop() if done == 3 else None
        initial = fresh(engine.shapes, range(len(users))).to(self.device)
        _, batches = self.steps(engine, users, engine.merged(count), initial, steps, 3)
        found = kernels(seen, steps.seconds[2])
        order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        table = seen.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=90)
        path = self.to / f"{self.model}_profile.txt"
        path.write_text(f"{json.dumps(found, indent=1)}\n{table}\n")
        tokens = sum(sample.length for own in users for sample in own)
        kept = ("wall", "busy", "gaps", "kernels", "launches", "syncs")
        some = {name: found[name] for name in kept}
        return {**some, "tokens": tokens, "micro_batches": batches / 3, "table": path.name,
                "unprofiled_step": round(steps.seconds[1], 4)}  # fmt: skip

    def peft(self, engine: Engine, count: int) -> dict[str, Any]:
        """One user as warm-up, then `count`, each with all ten items, on a model as it comes."""
        users = list(islice(make_users(self.shape), count + 1))
        model, _ = make(self.shape, self.dtype)
        with tempfile.TemporaryDirectory() as scratch:
            job = self.job(engine, Path(scratch))
            train_peft(model, users[:1], job, True)
            seconds = timed(lambda: train_peft(model, users[1:], job, True), self.device) / count
        return {"seconds_per_user": round(seconds, 3)}

    def published(self, engine: Engine, count: int) -> dict[str, Any]:
        users, questions = list(islice(make_users(self.shape), count)), self.questions(count)
        with tempfile.TemporaryDirectory() as scratch:
            job = self.job(engine, Path(scratch))
            make(self.shape, self.dtype)[0].save_pretrained(job.base)
            answering: list[float] = []

            def one() -> None:
                answering.append(train_published(users, questions, job, self.shape["new"]))

            seconds = (timed(one, self.device) - answering[-1]) / count
        return {"seconds_per_user": round(seconds, 3), "warm_up": 0,
                "answering": round(answering[-1] / count, 3)}  # fmt: skip

    def job(self, engine: Engine, scratch: Path) -> Job:
        engine.write_merged(scratch / "merged")
        return Job(
            scratch / "base", scratch / "merged", engine.base.tokenizer, engine.options,
            STACKED_RANK, int(SCALE * STACKED_RANK), self.dtype, self.device,
        )  # fmt: skip

    def questions(self, count: int) -> list[list[Encoded]]:
        return make_questions(self.shape, count, 2)

    def answer(self, engine: Engine, count: int) -> dict[str, Any]:
        """Two users as warm-up, then all."""
        merged, questions = engine.merged(count), self.questions(count)
        flat = fresh(engine.shapes, range(count)).to(self.device)
        outcome = Outcome(flat, [], [])
        engine.answer(questions[:2], merged, outcome)
        reset_peak(self.device)
        seconds = timed(lambda: engine.answer(questions, merged, outcome), self.device)
        return {"seconds_per_user": round(seconds / count, 4), "new_tokens": self.shape["new"],
                "peak_bytes": peak_bytes(self.device)}  # fmt: skip

    def evidence(self, engine: Engine, count: int) -> dict[str, Any]:
        """Once as warm-up, then timed: users' items under each of the two anchors."""
        users = list(islice(make_users(self.shape), count))
        anchors = engine.bank.to(self.device)

        def work() -> None:
            with grouped(engine.base.model, list(engine.shapes.sizes)) as layers:
                evidence(engine.base, layers, users, anchors)

        work()
        reset_peak(self.device)
        seconds = timed(work, self.device)
        samples = [sample for own in users for sample in own]
        width = sum(a.numel() + b.numel() for a, b in anchors.one(0).layers.values())
        useful = anchors.count * flops(engine.base.model, samples, width)
        tokens = anchors.count * sum(sample.length for sample in samples)
        return {
            "seconds_per_user": round(seconds / count, 4),
            "anchors": anchors.count,
            "tokens_per_second": round(tokens / seconds, 1),
            "mfu": round(useful / seconds / self.peak, 4),
            "peak_bytes": peak_bytes(self.device),
        }


KINDS = {name: getattr(Bench, name) for name in (
    "train", "profile", "peft", "published", "answer", "evidence")}  # fmt: skip


def empty() -> None:
    """Give the memory of what is no longer used back to the GPU."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
