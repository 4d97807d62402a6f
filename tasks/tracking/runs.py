"""The run in MLflow: one parent per flow run, one child per LaMP task and method, one per anchor.

Stages do not log: a cached stage would then log nothing. They return values and references, and
what is here replays those, so a run that took everything from the store is as complete as the one
that made it. Runs go by keys of their own: all is kept in a spool until MLflow took it, and its ids
are known only then.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tasks.config import RunConfig
from tasks.errors import label, masked
from tasks.methods import MethodName
from tasks.tracking.replay import Replay
from tasks.tracking.spool import FOLDER, Spool, catch_up

# What a method may read of the configuration.
METHOD_SECTIONS = (
    "base", "prompt", "anchors", "meta_lora", "fusion", "stacking", "oppu", "rag", "scoring",
)  # fmt: skip
# A cluster's LoRA has thousands of steps. Of the 33 s that MLflow took for a run that finds
# everything, the losses of LaMP-1's ten took 6, and no chart shows so many. The piece in the store
# has them all.
LOSS_POINTS = 200


class Tracker:
    """The MLflow side of one flow run, whether or not MLflow answers (`spool`)."""

    def __init__(self, config: RunConfig, run_name: str, tags: dict[str, str]) -> None:
        """Start the parent run. Raises InputError for an address that no MLflow can have."""
        from tasks.stage import store

        self.config, self.tags = config, tags
        where = store()
        self.replay = Replay(tracking_uri(), where)
        # Hexadecimal, as `Replay` wants keys.
        self.parent = uuid.uuid4().hex
        # A courtesy to earlier runs: whether it succeeds is nothing to this one.
        with contextlib.suppress(Exception):
            catch_up(where, self.replay)
        folder = where.root.parent / FOLDER / self.parent
        self.spool = Spool(folder, self.replay, {"name": run_name})
        settings = config.model_dump(mode="json")
        self._start(self.parent, run_name, {"kind": "benchmark", **self._tags(), **tags}, None)
        self.spool.add_values(self.parent, _texts(flat(settings)))
        self._json(settings, "config.json")

    def end_abandoned(self, is_over: Callable[[str], bool]) -> None:
        """End runs that still say RUNNING although their flow run was killed.

        `is_over` tells of a Prefect flow run id whether that run has ended, however it did. Only
        runs of the same Prefect server are looked at: this one knows nothing of others.
        """
        if self.spool.behind():
            return
        client, own = self.replay.client, self.replay.run_id(self.parent)
        server = self.tags["prefect_server"]
        query = (
            "attributes.status = 'RUNNING' and tags.kind = 'benchmark' "
            f"and tags.prefect_server = '{server}'"
        )
        for run in client.search_runs([self.replay.experiment], query):
            flow_run = run.data.tags.get("prefect_flow_run", "")
            if run.info.run_id != own and flow_run and is_over(flow_run):
                client.set_tag(run.info.run_id, "failure", "its flow run was killed")
                client.set_terminated(run.info.run_id, "KILLED")

    @property
    def url(self) -> str | None:
        """Where a browser finds the parent run, if the tracking store is a server that answered."""
        run = self.replay.known(self.parent)
        if run is None or not self.replay.uri.startswith("http"):
            return None
        root = masked(os.environ.get("MTA_MLFLOW_UI", self.replay.uri)).rstrip("/")
        return f"{root}/#/experiments/{self.replay.experiment}/runs/{run}"

    def log_lamp_task(self, summary: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """All of one LaMP task: artifacts of the parent, a child per method, a child per anchor."""
        prepared = summary["prepared"]["value"]
        folder = scope(summary)
        counts = {key: prepared[key] for key in ("counts", "dropped", "split", "authors", "audit")}
        self._json(counts, f"{folder}/data_counts.json")
        self._json(manifest(summary), f"{folder}/manifest.json")
        logged = set()
        for method, own in summary["banks"].items():
            for result, file in (
                (own["map"], "map.png"),
                (own["anchors"], "anchors.parquet"),
                (own["fusion"], "recipes.parquet"),
            ):
                if result:
                    self.spool.add_piece(self.parent, result["ref"], file, f"{folder}/{method}")
            for anchor in own["anchors"]["value"]["anchors"]:
                result = own["meta_loras"].get(anchor["user_id"])
                # An anchor that two banks hold was trained once.
                if result and result["ref"]["uri"] not in logged:
                    logged.add(result["ref"]["uri"])
                    with self.spool.together():
                        self._anchor_run(summary, self._settings(summary, method), anchor, result)
        for row in rows:
            if row["method"] in summary["scores"]:
                with self.spool.together():
                    self._method_run(summary, row)

    def log_report(self, text: str, name: str) -> str | None:
        """Log the report; where a browser finds it, if the tracking store is a server."""
        self.spool.add_text(self.parent, text, name)
        return f"{self.url}/artifacts/{name}" if self.url and not self.spool.behind() else None

    def finish(self, rows: list[dict[str, Any]], text: str, missing: list[str]) -> None:
        """Log the comparison and end the parent run: FAILED when something is missing."""
        self.spool.add_text(self.parent, text, "comparison.txt")
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines = [",".join(columns)] + [
            ",".join(str(row.get(c, "")) for c in columns) for row in rows
        ]
        self.spool.add_text(self.parent, "\n".join(lines) + "\n", "comparison.csv")
        self._tag("missing", str(len(missing)))
        if missing:
            self.spool.add_text(self.parent, "\n".join(missing) + "\n", "missing.txt")
        metrics: list[tuple[str, float, int]] = []
        for row in rows:
            seed = f".seed{row['seed']}" if "seed" in row else ""
            prefix = f"{row['lamp_task'].replace(' ', '_')}{seed}.{row['method']}"
            metrics += [
                (f"{prefix}.{key}", value, 0)
                for key, value in row.items()
                if isinstance(value, float)
            ]
        self.spool.add_values(self.parent, metrics=metrics)
        self._end(self.parent, "FAILED" if missing else "FINISHED")
        self.spool.finish()

    def close(self) -> None:
        """Nothing more is logged by this process."""
        self.spool.close()

    def fail(self, line: str) -> None:
        """End the parent run as failed, with the reason as a tag."""
        with contextlib.suppress(Exception):  # the disk may be what failed
            self._tag("failure", masked(line)[:500])
            self._end(self.parent, "FAILED")
            self.spool.finish()

    def _method_run(self, summary: dict[str, Any], row: dict[str, Any]) -> None:
        name, method = row["lamp_task"], row["method"]
        scored = summary["scores"][method]
        config = self._settings(summary, method)
        own = summary["banks"].get(summary["bank_of"].get(method, ""))
        run = self._key("method", scope(summary), method)
        self._start(
            run,
            f"{scope(summary)} {method}",
            {
                "kind": "method",
                "lamp_task": name,
                "method": method,
                "cached": str(scored["cached"]).lower(),
                "result": scored["ref"]["uri"],
                "result_sha256": scored["ref"]["sha256"],
                **self._tags(summary["seed"]),
            },
            self.parent,
        )
        params = {"lamp_task": name, "method": method, "preset": self.config.preset}
        params |= {"seed": summary["seed"], "data": self.config.data}
        params |= {"anchors_trained": len(own["meta_loras"]) if own else 0}
        for section in METHOD_SECTIONS:
            values = getattr(config, section).model_dump(mode="json")
            params |= {f"{section}.{key}": value for key, value in flat(values).items()}
        skip = ("lamp_task", "seed", "method")
        metrics = {
            key: float(value) for key, value in row.items() if key not in skip and value is not None
        }
        points = [(key, value, 0) for key, value in metrics.items()]
        self.spool.add_values(run, _texts(params), points)
        for file in ("predictions.parquet", "golds.json"):
            self.spool.add_piece(run, scored["ref"], file)
        self._end(run)

    def _settings(self, summary: dict[str, Any], method: MethodName) -> RunConfig:
        """What the method's stages got in this LaMP task, under this seed."""
        return self.config.for_task(summary["lamp_task"], summary["seed"]).for_method(method)

    def _anchor_run(
        self,
        summary: dict[str, Any],
        config: RunConfig,
        anchor: dict[str, Any],
        result: dict[str, Any],
    ) -> None:
        value, lamp_task = result["value"], summary["lamp_task"]
        run = self._key("anchor", scope(summary), result["ref"]["uri"])
        self._start(
            run,
            f"{scope(summary)} anchor {label(anchor['user_id'])}",
            {
                "kind": "anchor",
                "lamp_task": lamp_task,
                "anchor": label(anchor["user_id"]),
                "cached": str(result["cached"]).lower(),
                "result": result["ref"]["uri"],
                "result_sha256": result["ref"]["sha256"],
                **self._tags(summary["seed"]),
            },
            self.parent,
        )
        # Not the anchor's id: a tag can be taken back, a parameter cannot.
        params = {"lamp_task": lamp_task, "cluster": anchor["cluster"]}
        training = flat(config.meta_lora.model_dump(mode="json"))
        params |= {f"meta_lora.{key}": item for key, item in training.items()}
        series = [("loss", loss, step) for step, loss in thinned(value["losses"])]
        totals = {key: value[key] for key in ("items", "steps", "tokens", "truncated")}
        totals["seconds"] = result["notes"]["seconds"]
        series += [(key, float(item), 0) for key, item in totals.items()]
        self.spool.add_values(run, _texts(params), series)
        self.spool.add_piece(run, result["ref"], "adapter", "adapter")
        self._end(run)

    def _key(self, *parts: str) -> str:
        """The key of a child: another in another run."""
        return hashlib.sha256(json.dumps([self.parent, *parts]).encode()).hexdigest()[:32]

    def _start(self, key: str, name: str, tags: dict[str, str], parent: str | None) -> None:
        now = int(time.time() * 1000)
        self.spool.add("run", key, name=name, tags=tags, parent=parent, time=now)

    def _end(self, key: str, status: str = "FINISHED") -> None:
        self.spool.add("end", key, status=status, time=int(time.time() * 1000))

    def _tag(self, name: str, value: str) -> None:
        self.spool.add("tags", self.parent, tags={name: value})

    def _json(self, value: dict[str, Any], path: str) -> None:
        self.spool.add_text(self.parent, json.dumps(value, indent=2) + "\n", path)

    def _tags(self, *seeds: int) -> dict[str, str]:
        named = seeds or tuple(self.config.all_seeds)
        return {"seed": ",".join(map(str, named)), "preset": self.config.preset}


def thinned(losses: Sequence[float], most: int = LOSS_POINTS) -> list[tuple[int, float]]:
    """(step, loss) of at most `most` points: each the mean of equally many steps, at the last.

    The last point may stand for fewer. A list that is short enough stays as it is.
    """
    size = -(-len(losses) // most)
    parts = [losses[start : start + size] for start in range(0, len(losses), max(size, 1))]
    return [
        (min((number + 1) * size, len(losses)), sum(part) / len(part))
        for number, part in enumerate(parts)
    ]


def _texts(params: dict[str, Any]) -> dict[str, str]:
    """As MLflow takes parameters: texts that are not too long."""
    return {name: masked(str(value))[:500] for name, value in params.items()}


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or a sqlite file beside the store, which no server has open."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given:
        return given
    folder = _state() / "local"
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


def manifest(summary: dict[str, Any]) -> dict[str, Any]:
    """Which result came from where: every stage's reference, and whether it was found or made."""
    stages: dict[str, Any] = {}
    for name in ("prepared", "base", "compared"):
        stages[name] = _came_from(summary[name])
    if "adapter" in summary["base"]:
        stages["task_adapt"] = _came_from(summary["base"]["adapter"])
    stages["banks"] = {
        method: {
            **{
                name: _came_from(own[name])
                for name in ("embedded", "anchors", "bank", "evidence", "fusion", "map")
                if own[name]
            },
            "meta_loras": {k: _came_from(item) for k, item in own["meta_loras"].items()},
        }
        for method, own in summary["banks"].items()
    }
    stages["bank_of"] = summary["bank_of"]
    for name in ("stacking", "answered"):
        stages[name] = {
            method: [_came_from(part) for part in parts] for method, parts in summary[name].items()
        }
    stages["scores"] = {method: _came_from(item) for method, item in summary["scores"].items()}
    return {"lamp_task": summary["lamp_task"], "stages": stages, "missing": summary["missing"]}


def scope(summary: dict[str, Any]) -> str:
    """What a summary is of, as a name: the LaMP task, and the seed where a run has several."""
    name: str = summary["lamp_task"]
    return f"{name} seed {summary['seed']}" if summary["several_seeds"] else name


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as `section.field` -> value."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def _came_from(result: dict[str, Any]) -> dict[str, Any]:
    return {**result["ref"], "cached": result["cached"], "seconds": result["notes"]["seconds"]}


def _state() -> Path:
    from tasks.stage import store

    return store().root.parent
