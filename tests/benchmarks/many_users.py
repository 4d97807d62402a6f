"""Training many users' stacked LoRAs: the grouped engine against what people do today.

    python -m tests.benchmarks.many_users                 1, 8, 32, 128 and 512 users, embedded
    python -m tests.benchmarks.many_users --quick         64 users, under two minutes on two cores
    python -m tests.benchmarks.many_users --model 8b --users 32 128          (embedded|40m|1b|8b)
    python -m tests.benchmarks.many_users --stream        10,000 users in groups of 512 (`stream`)
    python -m tests.benchmarks.many_users --search        anchors of a million users (`search`)

`--threads N` sets torch's threads, `--queries N` the questions per user, `--repetitions N` how
often each is timed. `--stream` and `--search` add to the table, which is then of 128 users only,
where `--users` does not say otherwise. `--profile` adds what training the last row's users spends
its time on, operator by operator.

Same model (random init), same users and token ids, one run; each opponent is timed in turns with
the engine and the median taken. Ratios are users per second of the engine over the opponent's:

* `ratio_vs_peft`: stock PEFT, one user after another, training alone;
* `ratio_vs_published`: the published code's structure, all of it but answering, against training;
  `ratio_vs_published_answering`: all of it, against training and answering the same questions;
* `ratio_vs_plain`: all users in one padded batch with per-user bmm under autograd, training alone
  (in groups of `plain_users` where memory holds no more; null where it holds not even one).

The merged LoRA lies below in all, but for `ratio_vs_peft_without_merged`, where it does in neither.
`mfu` is the share of the machine's own matmul peak that the model's FLOPs make up, by its number of
parameters and without padding (`tasks/lora/cost.py`); `peak_bytes` is of the engine's training. The
last line is one JSON object; a picture and the figures in full go to `--out`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from tasks.lora.base import load_base
from tasks.lora.batches import Encoded
from tasks.lora.cost import flops
from tasks.lora.grouped import fresh
from tasks.lora.merge import MergedUsers
from tasks.lora.train import Outcome, epochs
from tests.benchmarks.engine import SCALE, STACKED_RANK, Engine
from tests.benchmarks.machine import matmul_peak, peak_bytes, profiled, reset_peak, timed
from tests.benchmarks.opponents import Job, train_peft, train_published
from tests.benchmarks.plain_bmm import train_plain, users_that_fit
from tests.benchmarks.shapes import SHAPES, build, make_questions, make_users
from tests.benchmarks.stream import FEW, measure_stream


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--brief", action="store_true", help="training alone, against (a) and (b)")
    parser.add_argument("--quick", action="store_true", help="under two minutes on two cores")
    parser.add_argument("--model", choices=sorted(SHAPES), default="embedded")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--users", type=int, nargs="*", default=None)
    parser.add_argument("--queries", type=int, default=2, help="questions per user")
    parser.add_argument("--repetitions", type=int, default=None)
    parser.add_argument("--profile", action="store_true", help="the engine, operator by operator")
    parser.add_argument("--stream", type=int, nargs="?", const=0, default=None, metavar="N")
    parser.add_argument("--group", type=int, default=512, help="users of the stream at a time")
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--search-users", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path(".mta/benchmarks"))
    return parser.parse_args()


def main() -> None:
    given = arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(given.threads)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    shape = SHAPES[given.model]
    counts = given.users or [1, 8, 32, 128, 512]
    if not given.users and (given.quick or given.search or given.stream is not None):
        counts = [64] if given.quick else [FEW]
    repetitions = given.repetitions or (3 if given.quick else 5)
    more: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, merged = Path(scratch) / "base", Path(scratch) / "merged"
        build(shape, folder, dtype)
        engine = Engine(shape, load_base(folder, max_tokens=4096))
        engine.write_merged(merged)
        job = Job(
            folder,
            merged,
            engine.base.tokenizer,
            engine.options,
            STACKED_RANK,
            int(SCALE * STACKED_RANK),
            dtype,
            engine.base.device,
        )
        rows = []
        for count in counts:
            row = measure(
                engine, job, shape, count, repetitions, given.queries, given.quick, given.brief
            )
            print(_short(row), flush=True)  # a large model's rows take minutes each
            rows.append(row)
        if given.profile:
            users = list(islice(make_users(shape), counts[-1]))
            again = partial(engine.train, users, engine.merged(len(users)))
            print(profiled(again, engine.base.device))
        if given.stream is not None:
            several = given.stream or shape["stream"]
            more |= measure_stream(engine, shape, several, given.group, repetitions)
    if given.search:
        from tests.benchmarks.search import measure_search

        more |= measure_search(given.search_users, repetitions)
    more |= {"model": given.model, "threads": given.threads}
    write(rows, more, given)


def measure(
    engine: Engine,
    job: Job,
    shape: dict[str, Any],
    count: int,
    repetitions: int,
    queries: int,
    quick: bool,
    brief: bool,
) -> dict[str, Any]:
    """One row: `count` users through the engine and its opponents, in turns.

    brief: training alone, against PEFT and the published structure, warmed up with two users.
    """
    device = job.device
    users = list(islice(make_users(shape), count))
    questions = make_questions(shape, count, queries)
    merged = engine.merged(count)
    outcomes: list[Outcome] = []

    def train(under: MergedUsers | None) -> None:
        outcomes[:] = [engine.train(users, under)]

    def answer() -> None:
        engine.answer(questions, merged, outcomes[0])

    if brief:
        engine.train(users[:2], merged)
    else:
        train(merged)
        answer()
    # Opponents that take users one by one cost the same per user, however many there are: a
    # sample of users is enough. They have a model of their own, as they leave traces on it.
    few, two = users[: 4 if quick else 8], users[:2]
    model = load_base(job.base, max_tokens=4096).model
    # The first time anything is slower, and here some opponents have few repetitions.
    plain_users = 0 if brief else warm_plain(engine, model, users, merged)
    train_peft(model, users[:1], job, True)
    train_published(users[:1], questions[:1], job, shape["new"])
    answering: list[float] = []

    def published() -> None:
        seconds = train_published(two, questions[:2], job, shape["new"])
        answering.append(seconds / len(two))

    names = ("engine", "answer", "engine_bare", "peft", "peft_bare", "plain", "published")
    times: dict[str, list[float]] = {name: [] for name in names}
    peak = 0
    for repetition in range(repetitions):
        # Without a merged LoRA first: what `answer` then uses is trained over merged ones.
        if not brief:
            times["engine_bare"].append(timed(partial(train, None), device) / count)
        reset_peak(device)
        times["engine"].append(timed(partial(train, merged), device) / count)
        peak = max(peak, peak_bytes(device))
        times["peft"].append(timed(partial(train_peft, model, few, job, True), device) / len(few))
        if not brief:
            times["answer"].append(timed(answer, device) / count)
            bare = partial(train_peft, model, few, job, False)
            times["peft_bare"].append(timed(bare, device) / len(few))
        if plain_users:
            call = partial(plain, engine, model, users[:plain_users], merged)
            times["plain"].append(timed(call, device) / plain_users)
        if repetition < (1 if quick else 3):
            times["published"].append(timed(published, device) / len(two))
    whole = statistics.median(times["published"])
    training = statistics.median(
        all_of_it - own for all_of_it, own in zip(times["published"], answering, strict=True)
    )
    times["published_answer"] = answering
    median = {name: statistics.median(values) for name, values in times.items() if values}
    outcome = outcomes[0]
    tokens = sum(outcome.tokens)
    loras = engine.shapes.width + engine.merged_width
    samples = [item for own in users for item in own]
    useful = shape["epochs"] * flops(engine.base.model, samples, loras, backward=True)
    each = median["engine"]
    return {
        "users": count,
        "steps": sum(1 for _ in epochs(shape["items"], engine.options, 0)),
        "queries": queries,
        "users_per_hour": round(3600 / each, 1),
        "tokens_per_second": round(tokens / (each * count), 1),
        "ratio_vs_peft": round(median["peft"] / each, 2),
        "ratio_vs_peft_without_merged": None
        if brief
        else round(median["peft_bare"] / median["engine_bare"], 2),
        "ratio_vs_published": round(training / each, 2),
        "ratio_vs_published_answering": None
        if brief
        else round(whole / (each + median["answer"]), 2),
        "ratio_vs_plain": round(median["plain"] / each, 2) if plain_users else None,
        "plain_users": plain_users,
        "mfu": round(useful / (each * count) / matmul_peak(device, engine.base.model.dtype), 4),
        "padding": round(1 - sum(outcome.tokens) / outcome.computed, 4),
        "peak_bytes": peak,
        "bytes_per_user": 4 * engine.shapes.width,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "times": times,
    }


def plain(
    engine: Engine, model: Any, users: Sequence[Sequence[Encoded]], merged: MergedUsers
) -> None:
    """Opponent (c) on `users`, from the engine's initial weights over the same merged LoRAs."""
    seeds = range(len(users))
    initial = fresh(engine.shapes, seeds).to(engine.base.device)
    under, pad = merged.parts(seeds), engine.base.tokenizer.pad_token_id
    train_plain(model, users, engine.options, seeds, engine.shapes, initial, SCALE, under, pad)


def warm_plain(
    engine: Engine, model: Any, users: Sequence[Sequence[Encoded]], merged: MergedUsers
) -> int:
    """Run opponent (c) once; how many of `users` it can take at once, 0 if not even one."""
    most = len(users)
    if engine.base.device.type == "cpu":
        most = users_that_fit(model.config, users, engine.options)
    while most:
        try:
            plain(engine, model, users[:most], merged)
            break
        except torch.OutOfMemoryError:
            most //= 2
        torch.cuda.empty_cache()
    return most


def write(rows: list[dict[str, Any]], more: dict[str, Any], given: argparse.Namespace) -> None:
    """Figures in full and a picture to `--out`; the last row as JSON to the terminal."""
    parts = ["many_users", given.model]
    parts += [part for part, asked in (("stream", "stream_users"), ("search", "search_users"))
              if asked in more]  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / ("_".join(parts) + ".json")
    path.write_text(json.dumps({"rows": rows, **more}, indent=1) + "\n")
    draw(rows, given.model, path.with_suffix(".png"))
    more = {key: value for key, value in more.items() if key != "stream_times"}
    if len(parts) > 2:
        print(more)
    print(json.dumps({**_short(rows[-1]), **more}))


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "times"}


def draw(rows: list[dict[str, Any]], model: str, path: Path) -> None:
    """Users per hour against the number of users, engine and opponents."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, ratio in (
        ("grouped engine", None),
        ("plain bmm, one padded batch", "ratio_vs_plain"),
        ("PEFT, one by one", "ratio_vs_peft"),
        ("published code", "ratio_vs_published"),
    ):
        shown = [row for row in rows if ratio is None or row[ratio]]
        rates = [row["users_per_hour"] / (row[ratio] if ratio else 1) for row in shown]
        axes.plot([row["users"] for row in shown], rates, marker="o", label=name)
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
