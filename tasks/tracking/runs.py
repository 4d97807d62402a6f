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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.config import RunConfig
from tasks.errors import label, masked
from tasks.methods import MethodName
from tasks.report.files import REPORT_FILE
from tasks.store.databases import MLFLOW, make_whole
from tasks.tracking.replay import NOTE_TAG, RUNS_VIEW, Replay, methods_page
from tasks.tracking.spool import FOLDER, Spool, catch_up
from tasks.tracking.values import flat, manifest, scope, texts, thinned

# What a method may read of the configuration.
METHOD_SECTIONS = (
    "base", "prompt", "anchors", "meta_lora", "fusion", "stacking", "oppu", "rag", "scoring",
)  # fmt: skip


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
        self.spool.add_values(self.parent, texts(flat(settings)))
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
        return self._page("", RUNS_VIEW)

    @property
    def methods_url(self) -> str | None:
        """Where a browser finds the runs of all methods of this one, as `url`."""
        run = self.replay.known(self.parent)
        if run is None or not self._root:
            return None
        return self._root + methods_page(self.replay.experiment, run)

    @property
    def _root(self) -> str | None:
        if not self.replay.uri.startswith("http"):
            return None
        return masked(os.environ.get("MTA_MLFLOW_UI", self.replay.uri)).rstrip("/") + "/"

    def _page(self, below: str, query: str = "") -> str | None:
        """A page of the parent run in a browser."""
        run = self.replay.known(self.parent)
        if run is None or not self._root:
            return None
        return f"{self._root}#/experiments/{self.replay.experiment}/runs/{run}{below}{query}"

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
        return None if self.spool.behind() else self._page(f"/artifacts/{name}")

    def describe(self, lines: list[str]) -> None:
        """The parent run's description: these lines, and the way to the report and the methods."""
        links = {"report": self._page(f"/artifacts/{REPORT_FILE}"), "methods": self.methods_url}
        ways = [f"[{name}]({link})" for name, link in links.items() if link]
        text = "\n\n".join([*lines, *([", ".join(ways)] if ways else [])])
        self._tag(NOTE_TAG, text)

    def finish(
        self,
        rows: list[dict[str, Any]],
        mean: list[dict[str, Any]],
        text: str,
        missing: list[str],
    ) -> None:
        """Log the comparison and end the parent run: FAILED when something is missing.

        rows: all of the table. mean: those over LaMP tasks, which alone are the parent's metrics.
        """
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
        for row in mean:
            metrics += [
                (f"{row['method']}.{key}", value, 0)
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
        self.spool.add_values(run, texts(params), points)
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
        self.spool.add_values(run, texts(params), series)
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


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or a sqlite file beside the store, which no server has open.

    Raises InputError where that file cannot be used or made (`databases.make_whole`).
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given:
        return given
    folder = _state() / "local"
    folder.mkdir(parents=True, exist_ok=True)
    make_whole(MLFLOW, folder / "mlflow.db")
    return f"sqlite:///{folder / 'mlflow.db'}"


def _state() -> Path:
    from tasks.stage import store

    return store().root.parent
