"""The run in MLflow: one parent per flow run, one child per LaMP task and method, one per anchor.

Stages do not log: a cached stage would then log nothing. They return values and references, and
what is here replays those, so a run that took everything from the store is as complete as the one
that made it. Explicit run ids throughout: MLflow's active run belongs to a thread.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.artifacts import Store
from tasks.config import RunConfig
from tasks.errors import InputError, label, masked
from tasks.methods import config_of

EXPERIMENT = "mta"
PARENT_TAG = "mlflow.parentRunId"
# MLflow takes at most this many metric values in one call.
METRICS_PER_CALL = 1000
# What a method may read of the configuration.
METHOD_SECTIONS = (
    "base", "prompt", "anchors", "meta_lora", "fusion", "stacking", "oppu", "rag", "scoring",
)  # fmt: skip


class Tracker:
    """The MLflow side of one flow run."""

    def __init__(self, config: RunConfig, run_name: str, tags: dict[str, str]) -> None:
        """Start the parent run. Raises InputError when the tracking server does not answer."""
        from mlflow import MlflowClient

        self.config, self.tags = config, tags
        self.client = MlflowClient(tracking_uri())
        settings = config.model_dump(mode="json")
        try:
            self.experiment = self._experiment()
            self.parent = self._start(run_name, {"kind": "benchmark", **self._tags(), **tags})
            self._params(self.parent, flat(settings))
            self.client.log_dict(self.parent, settings, "config.json")
        except Exception as error:
            why = " ".join(str(error).split())[:200]
            raise InputError(
                f"MLflow at {tracking_uri()}: cannot start a run ({why}); "
                "start it with `make up`, or set MLFLOW_TRACKING_URI"
            ) from error

    def end_abandoned(self, is_over: Callable[[str], bool]) -> None:
        """End runs that still say RUNNING although their flow run was killed.

        `is_over` tells of a Prefect flow run id whether that run has ended, however it did. Only
        runs of the same Prefect server are looked at: this one knows nothing of others.
        """
        server = self.tags["prefect_server"]
        query = (
            "attributes.status = 'RUNNING' and tags.kind = 'benchmark' "
            f"and tags.prefect_server = '{server}'"
        )
        for run in self.client.search_runs([self.experiment], query):
            flow_run = run.data.tags.get("prefect_flow_run", "")
            if run.info.run_id != self.parent and flow_run and is_over(flow_run):
                self.client.set_tag(run.info.run_id, "failure", "its flow run was killed")
                self.client.set_terminated(run.info.run_id, "KILLED")

    @property
    def url(self) -> str | None:
        """Where a browser finds the parent run, if the tracking store is a server."""
        if not tracking_uri().startswith("http"):
            return None
        root = masked(os.environ.get("MTA_MLFLOW_UI", tracking_uri())).rstrip("/")
        return f"{root}/#/experiments/{self.experiment}/runs/{self.parent}"

    def log_lamp_task(
        self, summary: dict[str, Any], rows: list[dict[str, Any]], where: Store
    ) -> None:
        """All of one LaMP task: artifacts of the parent, a child per method, a child per anchor."""
        prepared = summary["prepared"]["value"]
        folder = scope(summary)
        counts = {key: prepared[key] for key in ("counts", "dropped", "split", "authors", "audit")}
        self.client.log_dict(self.parent, counts, f"{folder}/data_counts.json")
        self.client.log_dict(self.parent, manifest(summary), f"{folder}/manifest.json")
        logged = set()
        for method, own in summary["banks"].items():
            for result, file in (
                (own["map"], "map.png"),
                (own["anchors"], "anchors.parquet"),
                (own["fusion"], "recipes.parquet"),
            ):
                if result:
                    path = where.open(result["ref"]).folder / file
                    self.client.log_artifact(self.parent, str(path), f"{folder}/{method}")
            for anchor in own["anchors"]["value"]["anchors"]:
                result = own["meta_loras"].get(anchor["user_id"])
                # An anchor that two banks hold was trained once.
                if result and result["ref"]["uri"] not in logged:
                    logged.add(result["ref"]["uri"])
                    self._anchor_run(summary, anchor, result, where)
        for row in rows:
            if row["method"] in summary["scores"]:
                self._method_run(summary, row, where)

    def log_report(self, text: str, name: str) -> str | None:
        """Log the report; where a browser finds it, if the tracking store is a server."""
        self.client.log_text(self.parent, text, name)
        return f"{self.url}/artifacts/{name}" if self.url else None

    def finish(self, rows: list[dict[str, Any]], text: str, missing: list[str]) -> None:
        """Log the comparison and end the parent run: FAILED when something is missing."""
        self.client.log_text(self.parent, text, "comparison.txt")
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines = [",".join(columns)] + [
            ",".join(str(row.get(c, "")) for c in columns) for row in rows
        ]
        self.client.log_text(self.parent, "\n".join(lines) + "\n", "comparison.csv")
        self.client.set_tag(self.parent, "missing", str(len(missing)))
        if missing:
            self.client.log_text(self.parent, "\n".join(missing) + "\n", "missing.txt")
        for row in rows:
            seed = f".seed{row['seed']}" if "seed" in row else ""
            prefix = f"{row['lamp_task'].replace(' ', '_')}{seed}.{row['method']}"
            for key, value in row.items():
                if isinstance(value, float):
                    self.client.log_metric(self.parent, f"{prefix}.{key}", value)
        self.client.set_terminated(self.parent, "FAILED" if missing else "FINISHED")

    def fail(self, line: str) -> None:
        """End the parent run as failed, with the reason as a tag, if MLflow still answers."""
        with contextlib.suppress(Exception):
            self.client.set_tag(self.parent, "failure", masked(line)[:500])
            self.client.set_terminated(self.parent, "FAILED")

    def _method_run(self, summary: dict[str, Any], row: dict[str, Any], where: Store) -> None:
        name, method = row["lamp_task"], row["method"]
        scored = summary["scores"][method]
        config = config_of(self.config, method)
        own = summary["banks"].get(summary["bank_of"].get(method, ""))
        run = self._start(
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
        self._params(run, params)
        skip = ("lamp_task", "seed", "method")
        metrics = {
            key: float(value) for key, value in row.items() if key not in skip and value is not None
        }
        self._metrics(run, [(key, value, 0) for key, value in metrics.items()])
        folder = where.open(scored["ref"]).folder
        for file in ("predictions.parquet", "golds.json"):
            self.client.log_artifact(run, str(folder / file))
        self.client.set_terminated(run)

    def _anchor_run(
        self, summary: dict[str, Any], anchor: dict[str, Any], result: dict[str, Any], where: Store
    ) -> None:
        value, lamp_task = result["value"], summary["lamp_task"]
        run = self._start(
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
        training = flat(self.config.meta_lora.model_dump(mode="json"))
        self._params(run, params | {f"meta_lora.{key}": item for key, item in training.items()})
        series = [("loss", loss, step) for step, loss in enumerate(value["losses"], start=1)]
        totals = {key: value[key] for key in ("items", "steps", "tokens", "truncated")}
        totals["seconds"] = result["notes"]["seconds"]
        self._metrics(run, series + [(key, float(item), 0) for key, item in totals.items()])
        self.client.log_artifacts(run, str(where.open(result["ref"]).folder / "adapter"), "adapter")
        self.client.set_terminated(run)

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(EXPERIMENT)
        if found:
            return found.experiment_id
        artifacts = None
        if tracking_uri().startswith("sqlite:"):
            # Without a server MLflow would put artifacts below the working folder.
            artifacts = (_state() / "local" / "artifacts").as_uri()
        try:
            # The tag opens the experiment on its runs and charts, not on traces of chats.
            return self.client.create_experiment(
                EXPERIMENT,
                artifact_location=artifacts,
                tags={"mlflow.experimentKind": "custom_model_development"},
            )
        except Exception:
            # Another run created it between the two calls.
            found = self.client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
            return found.experiment_id

    def _start(self, name: str, tags: dict[str, str], parent: str | None = None) -> str:
        if parent:
            tags = tags | {PARENT_TAG: parent}
        return self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id

    def _tags(self, *seeds: int) -> dict[str, str]:
        named = seeds or tuple(self.config.all_seeds)
        return {"seed": ",".join(map(str, named)), "preset": self.config.preset}

    def _params(self, run: str, params: dict[str, Any]) -> None:
        from mlflow.entities import Param

        items = [Param(key, masked(str(value))[:500]) for key, value in params.items()]
        for start in range(0, len(items), 100):
            self.client.log_batch(run, params=items[start : start + 100])

    def _metrics(self, run: str, values: list[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, step) for key, value, step in values]
        for start in range(0, len(metrics), METRICS_PER_CALL):
            self.client.log_batch(run, metrics=metrics[start : start + METRICS_PER_CALL])


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
