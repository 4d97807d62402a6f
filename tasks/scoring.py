"""Stage 8: answers of every method to the same queries, and LaMP's metrics of them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasks.base_model import load, model_parts, prompt_parts
from tasks.config import RunConfig
from tasks.lamp.definitions import get_task
from tasks.lamp.metrics import Rules, golds_without_token, remarks
from tasks.methods import METHODS, MethodName
from tasks.questions import content
from tasks.stacking import (
    Inputs,
    few_shot_users,
    merged_parts,
    merged_users,
    recipes_of,
    stacked_key,
)
from tasks.stage import gpu_slot, log, stage, store
from tasks.store.artifacts import Store
from tasks.store.pieces import NOTES, Piece, digest, library_versions
from tasks.tokens import tokens_of

VERSION = 3


@stage(name="predict", uses_model=True, task_run_name="predict-{method}-{batch}")
def predict(
    config: dict[str, Any],
    lamp_task: str,
    inputs: dict[str, Any],
    method: MethodName,
    batch: int,
    user_ids: list[str],
    stacked: dict[str, Any] | None,
) -> Piece:
    """`predictions.parquet`: row, user_id, query_id, gold, prediction, for one batch of users.

    `config` is the method's (`RunConfig.for_method`); `stacked` is the batch's `stacking` result,
    for a method that trains. A user whose adapter and queries did not change is taken from an
    earlier table.
    """
    options = RunConfig.model_validate(config)
    where = store()
    given = Inputs(**inputs)
    users = few_shot_users(where, given, user_ids)
    recipes = recipes_of(where, given)
    rows = []
    for user in users:
        parts = {
            "version": VERSION,
            "lamp_task": lamp_task,
            "user": user["user_id"],
            "answer": options.scoring.answer,
            # Ids too: they stand in the table.
            "queries": [[item["id"], item["input"], item["gold"]] for item in user["query"]],
            **prompt_parts(options, given.prepared["value"]["instruction"]),
            **model_parts(options, given.base, answering=True),
        }
        if options.prompt.history_items:
            parts["history"] = content(user["profile"])
        if METHODS[method].merged:
            parts["merged"] = merged_parts(options, given, recipes[user["user_id"]])
        if METHODS[method].trained:
            parts["stacked"] = stacked_key(options, lamp_task, method, given, user, recipes)
        rows.append(digest(parts))

    def make(out: Path) -> dict[str, Any]:
        import polars as pl

        known = _known(where, rows)
        todo = [user for user, row in zip(users, rows, strict=True) if row not in known]
        log(
            f"{lamp_task}, {method}: answering for {len(todo)} users, "
            f"{len(users) - len(todo)} known from before"
        )
        if todo:
            with gpu_slot():
                made = _answer(options, lamp_task, where, given, method, todo, stacked)
            todo_rows = [row for row in rows if row not in known]
            known |= dict(zip(todo_rows, made, strict=True))
        table = [
            {
                "row": number,
                "user_id": user["user_id"],
                "query_id": query["id"],
                "gold": query["gold"],
                "prediction": prediction,
            }
            for number, (user, row) in enumerate(zip(users, rows, strict=True))
            for query, prediction in zip(user["query"], known[row][0], strict=True)
        ]
        pl.DataFrame(table).write_parquet(out / "predictions.parquet")
        return {
            "rows": rows,
            "users": len(users),
            "queries": len(table),
            NOTES: {"per_user": [known[row][1] for row in rows]},
        }

    return where.get("predictions", digest(rows), make, rows)


@stage(name="score", task_run_name="score-{method}")
def score(
    lamp_task: str, method: str, answered: list[dict[str, Any]], rules: Rules = "lamp"
) -> Piece:
    """The metrics over all batches of a method (`predict` results, in order), by LaMP's rules.

    `predictions.parquet` of all users, and `golds.json`, the predictions in the format that LaMP
    takes submissions in. rules: `metrics.rules_of` the task. The notes have `golds_without_token`.
    """
    where = store()
    task = get_task(lamp_task)
    key = digest(
        {
            "version": VERSION,
            "libraries": library_versions(("rouge-score", "polars")),
            "lamp_task": lamp_task,
            "predictions": [item["ref"]["sha256"] for item in answered],
            "rules": rules,
        }
    )

    def make(out: Path) -> dict[str, Any]:
        import polars as pl

        from tasks.lamp import metrics

        table = pl.concat(
            pl.read_parquet(where.open(item["ref"]).folder / "predictions.parquet")
            for item in answered
        ).drop("row")
        table.write_parquet(out / "predictions.parquet")
        ids = table["query_id"].to_list()
        predictions = dict(zip(ids, table["prediction"].to_list(), strict=True))
        golds = dict(zip(ids, table["gold"].to_list(), strict=True))
        text = json.dumps(metrics.golds_json(task, predictions), indent=1, ensure_ascii=False)
        (out / "golds.json").write_text(text + "\n")
        return {
            "method": method,
            "rules": rules,
            "metrics": metrics.score(task, predictions, golds, rules),
            "users": table["user_id"].n_unique(),
            "queries": len(table),
        }

    found = where.get("score", key, make)
    return replace(found, notes=found.notes | _tokenless(found.folder, lamp_task, method, rules))


def _tokenless(folder: Path, lamp_task: str, method: str, rules: Rules) -> dict[str, int]:
    """`golds_without_token` of scored predictions, which is in no key and no value."""
    import polars as pl

    golds = pl.read_parquet(folder / "predictions.parquet", columns=["gold"])["gold"]
    count = golds_without_token(get_task(lamp_task), golds, rules)
    if count:
        log(f"{lamp_task}, {method}: {remarks(rules, count)[-1]}")
    return {"golds_without_token": count}


def _known(where: Store, rows: list[str]) -> dict[str, tuple[list[str], float]]:
    import polars as pl

    found = where.find_rows("predictions", rows)
    tables = {
        piece.folder: pl.read_parquet(piece.folder / "predictions.parquet")
        for piece, _ in found.values()
    }
    return {
        row: (
            tables[piece.folder].filter(pl.col("row") == number)["prediction"].to_list(),
            piece.notes["per_user"][number],
        )
        for row, (piece, number) in found.items()
    }


def _answer(
    options: RunConfig,
    lamp_task: str,
    where: Store,
    given: Inputs,
    method: MethodName,
    users: list[dict[str, Any]],
    stacked: dict[str, Any] | None,
) -> list[tuple[list[str], float]]:
    """Answers and seconds per user; users are answered for many at once, each with their LoRA."""
    from tasks.lora.answer import answer_users, likeliest
    from tasks.lora.bank import read_bank
    from tasks.lora.grouped import Part, grouped

    started = time.perf_counter()
    base = load(options, where, given.base, answering=True)
    ids = [user["user_id"] for user in users]
    instruction = given.prepared["value"]["instruction"]
    merged = merged_users(options, where, given, ids, base.device)
    own: dict[str, Part] = {}
    if METHODS[method].trained:
        if stacked is None:
            raise ValueError(f"method {method} needs the batch's stacked LoRAs")
        shard = read_bank(where.open(stacked["ref"]).folder / "stacked.safetensors")
        rows = [shard.ids.index(user_id) for user_id in ids]
        own = {
            name: Part(a[rows].to(base.device), b[rows].to(base.device), shard.scale)
            for name, (a, b) in shard.layers.items()
        }

    def parts(batch: Sequence[int]) -> tuple[dict[str, Part] | None, dict[str, Part] | None]:
        chosen = list(batch)
        trained = {n: Part(p.a[chosen], p.b[chosen], p.scale) for n, p in own.items()}
        return merged.parts(chosen) if merged else None, trained

    task = get_task(lamp_task)
    choose = options.scoring.answer == "likelihood" and bool(task.labels)
    samples = tokens_of(
        options, where, lamp_task, instruction, given.base, base,
        "choices" if choose else "queries", users,
    )  # fmt: skip
    names = sorted({*(merged.layers if merged else ()), *own})
    with grouped(base.model, names) as layers:
        if choose:
            each = len(task.labels)
            asked = [
                [mine[start : start + each] for start in range(0, len(mine), each)]
                for mine in samples
            ]
            best = likeliest(base, layers, asked, parts)
            answers = [[task.labels[number] for number in mine] for mine in best]
        else:
            questions = [list(mine) for mine in samples]
            answers = answer_users(base, layers, questions, parts, task.max_new_tokens)
    seconds = round((time.perf_counter() - started) / len(users), 4)
    return [(given_answers, seconds) for given_answers in answers]
