"""What MLflow gets of a run: an entry for it all, one per LaMP task and method, one per anchor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.config.task import flat
from tasks.errors import label
from tasks.record import File, key_of
from tasks.report.table import Row
from tasks.results.models import MetaLora
from tasks.results.run import Cell, Merging, Run

if TYPE_CHECKING:
    from mlflow.entities import Dataset

# A cluster's LoRA has thousands of steps, and no chart shows so many points.
LOSS_POINTS = 200
COUNTS = {"counts", "dropped", "audit"}
# Left out of a cell's manifest: what stands elsewhere, thousands of losses, and users' ids.
NOT_IN_MANIFEST: Any = {
    "config": True,
    "users": COUNTS | {"few_shot_ids", "task"},
    "mergings": {"__all__": {"merged": {"bank": {"members": {"__all__": {"training"}}}}}},
    "answers": {"__all__": {"__all__": {"users", "merged"}}},
    "compared": {"task"},
    "curve": True,
    "tuning": True,
}


@dataclass(frozen=True)
class Entry:
    """What one run in MLflow holds.

    start, end: milliseconds; no start is now. metrics: name, value, step, all at `end`. files: each
    with the folder that it is put into. texts: path -> text. data: what was read.
    """

    name: str
    start: int | None
    end: int
    tags: dict[str, str]
    params: Mapping[str, Any]
    metrics: Sequence[tuple[str, float, int]] = ()
    files: Sequence[tuple[File, str | None]] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    data: Sequence[Dataset] = ()


def whole(run: Run, means: Sequence[Row] = (), texts: Mapping[str, str] | None = None) -> Entry:
    """The run itself, begun or ended. means: the rows over all cells, which are its metrics."""
    files: list[tuple[File, str | None]] = []
    all_texts = {"config.json": json.dumps(run.config, indent=2), **(texts or {})}
    for cell in run.cells:
        counts = cell.users.model_dump_json(indent=2, include=COUNTS)
        manifest = cell.model_dump_json(indent=2, exclude=NOT_IN_MANIFEST)
        all_texts[f"{cell.name}/data_counts.json"] = counts
        all_texts[f"{cell.name}/manifest.json"] = manifest
        for one in cell.mergings:
            table = one.chosen.table if one.chosen else None
            kept = (one.merged.bank.map, table, one.merged.recipes.table)
            files += [(file, f"{cell.name}/{one.methods[0]}") for file in kept if file]
    return Entry(
        name=run.name,
        # When a run began is not known any more once it has ended.
        start=_end(run) if run.cells else None,
        end=_end(run),
        tags={
            "kind": "benchmark",
            "prefect_flow_run": run.id,
            "preset": run.config["preset"],
            "seed": ",".join(map(str, run.config["seeds"] or [run.config["seed"]])),
            "missing": str(len(run.missing)),
            **{f"tuned.{one.name}": one.tuning.text() for one in run.cells if one.tuning},
        },
        params=flat(run.config),
        metrics=[
            (f"{row['method']}.{name}", value, 0)
            for row in means
            for name, value in row.items()
            if isinstance(value, float)
        ],
        files=files,
        texts=all_texts,
        data=[data_set(cell) for cell in run.cells],
    )


def data_set(cell: Cell) -> Dataset:
    """The users of a cell: what they were read from, and a digest of all three sides.

    The source is as `mlflow.data.get_source` reads it.
    """
    from mlflow.entities import Dataset

    config, users = cell.config, cell.users
    kind, uri = "local", str(Path(config.data).expanduser().absolute())
    source: dict[str, Any] = {"uri": uri}
    if config.data == "synthetic":
        world = config.synthetic.model_dump() | {"seed": config.seed}
        kind, source = "code", {"tags": {name: str(value) for name, value in world.items()}}
    elif config.data == "lamp":
        from tasks.lamp.download import site_folder

        folder = site_folder(config.lamp_task, config.lamp)
        kind, source = "http", {"url": f"{config.lamp.url}/{folder}"}
    digest = key_of(users.base, users.anchor, users.few_shot)[:32]
    # MLflow's pages show `num_rows`.
    profile = json.dumps({"num_rows": users.counts.get("users", 0), **users.counts})
    return Dataset(config.lamp_task, digest, kind, json.dumps(source), profile=profile)


def parts(run: Run, tables: Sequence[Sequence[Row]]) -> Iterator[Entry]:
    """The anchors, methods and trials of a run. tables: each cell's rows."""
    for cell, table in zip(run.cells, tables, strict=True):
        # An anchor that two banks hold was trained once.
        anchors = {
            lora.adapter.folder: _anchor(run, cell, merging, lora)
            for merging in cell.mergings
            for lora in merging.merged.bank.members
        }
        yield from anchors.values()
        yield from (_method(run, cell, row) for row in table if cell.scored(row["method"]))
        yield from _trials(run, cell)


def _anchor(run: Run, cell: Cell, merging: Merging, lora: MetaLora) -> Entry:
    # Not the anchor's id: a tag can be taken back, a parameter cannot.
    params: dict[str, Any] = {"lamp_task": cell.config.lamp_task}
    if merging.chosen:
        clusters = {one.name: one.cluster for one in merging.chosen.anchors}
        options = cell.config.method(merging.methods[0]).meta_lora.model_dump(mode="json")
        params |= {"cluster": clusters[lora.anchor]} | flat({"meta_lora": options})
    totals = lora.training.model_dump(exclude={"losses", "failed"})
    losses = [("loss", loss, step) for step, loss in thinned(lora.training.losses)]
    name, cached = label(lora.anchor), merging.merged.bank.cached
    part = _part(run, cell, "anchor", name, lora.adapter.folder, lora.training.seconds, cached)
    return replace(
        part,
        name=f"{cell.name} anchor {name}",
        params=params,
        metrics=losses + [(key, float(value), 0) for key, value in totals.items()],
        files=[(lora.adapter, None)],
    )


def _method(run: Run, cell: Cell, row: Row) -> Entry:
    name, scored = row["method"], cell.scored(row["method"])
    assert scored is not None
    merging, answers = cell.merging(name), cell.answers[name]
    seconds, cached = sum(one.seconds for one in answers), all(one.cached for one in answers)
    trained = merging.merged.bank.members if merging and merging.chosen else ()
    params = {"preset": run.config["preset"], "data": cell.config.data}
    params |= {"anchors_trained": len(trained)}
    numbers = {key: row[key] for key in row if key not in ("lamp_task", "seed", "method")}
    return replace(
        _part(run, cell, "method", name, scored.predictions.folder, seconds, cached),
        params=params | flat(cell.config.method(name).model_dump(mode="json")),
        metrics=[(key, float(one), 0) for key, one in numbers.items() if one is not None],
        files=[(scored.predictions, None), (scored.golds, None)],
    )


def _trials(run: Run, cell: Cell) -> Iterator[Entry]:
    """Settings that were tried on development users; a step is the number of users."""
    for number, trial in enumerate(cell.tuning.trials if cell.tuning else ()):
        name, chosen = f"trial {number}", cell.tuning and number == cell.tuning.chosen
        part = _part(run, cell, "trial", name, name, trial.seconds)
        scores = zip(trial.users, trial.scores, strict=True)
        yield replace(
            part,
            tags=part.tags | {"chosen": str(chosen).lower()},
            params=flat(trial.settings),
            metrics=[("score", score, users) for users, score in scores],
        )


def _part(
    run: Run, cell: Cell, kind: str, name: str, result: str, seconds: float, cached: bool = False
) -> Entry:
    """What all parts have alike. result: names the content, by its folder in the store if any."""
    tags = {
        "kind": kind,
        kind: name,
        "lamp_task": cell.config.lamp_task,
        "seed": str(cell.config.seed),
        "preset": run.config["preset"],
        "cached": str(cached).lower(),
        "result": result,
    }
    end = _end(run)
    return Entry(f"{cell.name} {name}", end - int(1000 * seconds), end, tags, params={})


def thinned(losses: Sequence[float], most: int = LOSS_POINTS) -> list[tuple[int, float]]:
    """(step, loss) of at most `most` points: each the mean of equally many steps, at the last.

    The last point may stand for fewer.
    """
    size = max(-(-len(losses) // most), 1)
    groups = [losses[start : start + size] for start in range(0, len(losses), size)]
    return [(min(size * n, len(losses)), sum(part) / len(part)) for n, part in enumerate(groups, 1)]


def _end(run: Run) -> int:
    """When the run ended, in milliseconds: the same however often it is logged."""
    return int(1000 * datetime.fromisoformat(run.date).timestamp())
