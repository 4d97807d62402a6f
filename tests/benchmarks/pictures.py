"""Make the docs' pictures anew from a run of the benchmark: `make pictures`.

    python -m tests.benchmarks.pictures [--run NAME]

takes the last run (or the one named) of the local stack, which must be up; it needs Chromium and
the extra `test`. The users' map is the run's own. The others are screenshots: the report, and the
run's pages in MLflow and Prefect.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from mlflow import MlflowClient
from prefect.utilities.urls import url_for

from infra import command
from tasks.errors import InputError
from tasks.report.files import REPORTS_FOLDER, read_run, shown_run
from tasks.results.store import store
from tasks.tracking.server import EXPERIMENT, mlflow_uris

IMAGES = Path(__file__).parents[2] / "docs" / "images"
COMPARED = ("base", "merge_only", "mta")
WIDE, HIGH = 1280, 800
# Milliseconds until a page has asked its server for everything, and moves no more.
LOADED = 8000
LOCAL = ("file://", "http://127.0.0.1:", "http://localhost:")


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(help=__doc__)
def main(run: Annotated[str, typer.Option(help="a run's name, id or file")] = "last") -> None:
    taken = read_run(run)
    cell = next((one for one in taken.cells if one.config.lamp_task == "LaMP-2M"), taken.cells[0])
    merging = cell.merging("mta")
    if merging is None or merging.merged.bank.map is None:
        raise InputError(f"{shown_run(taken)} has no users' map: it is without the method mta")
    picture = store().path(merging.merged.bank.map)
    uri = mlflow_uris(store().state)[0]
    if not uri.startswith("http"):
        raise InputError(f"MLflow at {uri}: no server, so no page; `make benchmark` starts one")
    pages = {
        "report": (store().state / REPORTS_FOLDER / f"{taken.report}.html").as_uri(),
        "mlflow_compare": compare_page(uri, taken.name, cell.config.lamp_task),
        "prefect_run": url_for("flow-run", taken.id) or "",
    }
    screenshots(pages)
    shutil.copyfile(picture, IMAGES / "users_map.png")
    print(f"{IMAGES}: the pages of {shown_run(taken)}, {cell.config.lamp_task}")


def compare_page(uri: str, name: str, lamp_task: str) -> str:
    """MLflow's page that has the run's methods of one LaMP task side by side."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    parents = client.search_runs(
        [experiment], f"tags.kind = 'benchmark' and attributes.run_name = '{name}'", max_results=1
    )
    if not parents:
        raise InputError(f"MLflow at {uri}: has no run {name}")
    query = f"tags.kind = 'method' and tags.mlflow.parentRunId = '{parents[0].info.run_id}'"
    found = {
        run.data.tags["method"]: run.info.run_id
        for run in client.search_runs([experiment], query)
        if run.data.tags["lamp_task"] == lamp_task
    }
    runs = quote(json.dumps([found[method] for method in COMPARED]))
    return f"{uri}/#/compare-runs?runs={runs}&experiments={quote(json.dumps([experiment]))}"


def screenshots(pages: dict[str, str]) -> None:
    """Write a picture of each page, by its name, as it is when nothing more is loaded."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise InputError("there is no chromium on this machine; install it for the screenshots")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, page in pages.items():
            tab: Any = browser.new_page(viewport={"width": WIDE, "height": HIGH})
            # Servers of this machine and files are asked, nobody else.
            tab.route(lambda url: not url.startswith(LOCAL), lambda route: route.abort())
            tab.goto(page)
            tab.wait_for_timeout(LOADED)
            # MLflow opens a chat beside what is asked for.
            for close in tab.get_by_label("Close").all():
                close.dispatch_event("click")
            tab.wait_for_timeout(LOADED)
            tab.screenshot(path=IMAGES / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    raise SystemExit(command.run(app))
