"""The report of a real run, looked at in a real browser: Playwright drives the Chromium installed.

The page must be whole without any network, fit a laptop's and a telephone's width, and say what the
run found.
"""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from flows.mta import mta
from tasks.methods import METHODS
from tasks.report.table import COSTS
from tests.small import SMALL

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
]
TASKS = ["LaMP-2M", "LaMP-4"]


@pytest.fixture
def page() -> Iterator[Any]:
    """A page 1280 wide, cut off from any network."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, headless=True, args=["--no-sandbox"]
        )
        context = browser.new_context(viewport={"width": 1280, "height": 800}, offline=True)
        yield context.new_page()
        browser.close()


def test_the_report_of_a_run(workplace: Path, mlflow_server: str, page: Any) -> None:
    given = SMALL | {
        "lamp_tasks": TASKS,
        "methods": [name for name in METHODS if METHODS[name].default],
        "items_curve": [2, 4],
        # The run itself is one point of the curve, and all users are one batch: half the work.
        "split": {"few_shot_items": 4},
        "stacking": {**SMALL["stacking"], "users_per_job": 64},
    }
    state = mta(**given, return_state=True)
    assert state.is_completed(), state.message
    report = workplace / ".mta" / "report.html"

    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report.as_uri())
    looked_at_first(page)
    # What is folded is part of the page: opened, all of it must hold, too.
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    page.wait_for_load_state("load")
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [report.as_uri()]
    timed = page.evaluate("performance.getEntriesByType('resource').map(one => one.name)")
    assert all(name.startswith("data:") for name in timed)

    pictures = page.evaluate(
        "Promise.all([...document.images].map(one => one.decode().then(() =>"
        " [one.naturalWidth, one.clientWidth, one.clientHeight, one.alt.length])))"
    )
    # Two tasks and their mean; two curves; two banks per task, each with a heat map and a map.
    assert len(pictures) == 3 + 2 + 4 + 4
    assert page.locator("figure:has(img):has(figcaption:not(:empty))").count() == len(pictures)
    for natural, width, height, described in pictures:
        assert natural > 0
        assert width > 300
        assert height > 100
        assert described > 20

    wide = "[...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth)"
    for width in (390, 1280, 1440):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # On a telephone a wide table scrolls by itself, on a laptop none has to.
        if width > 390:
            assert page.evaluate(f"{wide}.map(e => e.innerText.slice(0, 80))") == []

    cells = page.evaluate("[...document.querySelectorAll('td[data-metric]')].map(e => e.dataset)")
    rows, parent = logged_rows(mlflow_server, state, workplace)
    compared = 0
    for cell in cells:
        if cell["task"] != "mean" and "opponent" not in cell and "weight_" not in cell["metric"]:
            row = rows[cell["task"], cell["method"]]
            name = cell["metric"]
            # The score is the main metric, under the name that all LaMP tasks share.
            if name == "score":
                name = "accuracy" if cell["task"] == "LaMP-2M" else "rougeL"
            assert number(cell.get("value")) == number(row[name]), cell
            if name not in (*COSTS, "no_label"):
                assert number(cell.get("lo")) == number(row[f"{name}_lo"]), cell
                assert number(cell.get("hi")) == number(row[f"{name}_hi"]), cell
            compared += 1
    shown = {(cell["task"], cell["method"]) for cell in cells if cell["metric"] == "rougeL"}
    assert shown == {key for key in rows if key[0] == "LaMP-4"}
    # Per task at least: 10 rows of the main metric and of the share, 7 of five costs.
    assert compared > 2 * (10 + 10 + 7 * 5)
    # Each pair of the 7 methods once per task, and on the mean.
    pairs = [frozenset((c["method"], c["opponent"], c["task"])) for c in cells if "opponent" in c]
    assert len(pairs) == len(set(pairs)) == 3 * 7 * 6 // 2
    mean = {cell["method"]: cell["value"] for cell in cells if is_mean_score(cell)}
    expected = {method: row["score"] for (task, method), row in rows.items() if task == "mean of 2"}
    assert mean == expected

    # MLflow has the same page, and Prefect the way to it.
    client = MlflowClient(mlflow_server)
    copy = client.download_artifacts(parent, "report.html", str(workplace))
    assert Path(copy).read_text(encoding="utf-8") == report.read_text(encoding="utf-8")
    with get_client(sync_client=True) as prefect:
        # Only by its key: other tests' runs leave more artifacts than one page has.
        links = prefect.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["report"]))
        )
    assert any(f"{parent}/artifacts/report.html" in str(one.data) for one in links)
    # One click from the run's description to its methods, and only to these.
    (own,) = client.search_runs(
        [client.get_run(parent).info.experiment_id], f"attributes.run_id = '{parent}'"
    )
    ways = own.data.tags["mlflow.note.content"].rpartition("\n\n")[2]
    (link,) = re.findall(r"\[methods\]\(([^)]*)\)", ways)
    page.context.set_offline(False)
    page.route(re.compile(r"^(?!http://127\.0\.0\.1)"), lambda route: route.abort())
    page.goto(link)
    page.get_by_text(f"{len(TASKS) * len(given['methods'])} matching runs").wait_for()
    listed = page.get_by_role("link", name=re.compile("^LaMP-")).all_inner_texts()
    assert set(listed) == {f"{task} {method}" for task in TASKS for method in given["methods"]}
    assert page.get_by_role("link", name=own.info.run_name, exact=True).count() == 0
    # Users' texts are nobody else's to read.
    text = report.read_text(encoding="utf-8")
    for table in (workplace / ".mta" / "store" / "prepare").glob("*/*/few_shot.parquet"):
        for user in pl.read_parquet(table).to_dicts():
            assert not any(item["text"] in text for item in user["profile"])


def looked_at_first(page: Any) -> None:
    """Three sentences, a chart and a table are on a laptop's first screen, in light and in dark."""
    what = "[...document.querySelectorAll('.opening p, .pair img, .pair tr')]"
    bottoms = page.evaluate(f"{what}.map(one => one.getBoundingClientRect().bottom)")
    assert len(bottoms) == 3 + 1 + 1 + 10
    assert max(bottoms) < 800
    assert page.evaluate("document.querySelectorAll('details[open]').length") == 0
    brightness = []
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness.append(sum(map(int, re.findall(r"\d+", colour)[:3])) / (3 * 255))
    assert brightness[0] < 0.2
    assert brightness[1] > 0.8


def logged_rows(
    address: str, state: Any, folder: Path
) -> tuple[dict[tuple[str, str], dict[str, str]], str]:
    """The run's comparison.csv by LaMP task and method, and the run's id."""
    client = MlflowClient(address)
    experiment = client.get_experiment_by_name("mta")
    assert experiment is not None
    query = f"tags.prefect_flow_run = '{state.state_details.flow_run_id}'"
    (parent,) = client.search_runs([experiment.experiment_id], query)
    file = client.download_artifacts(parent.info.run_id, "comparison.csv", str(folder))
    with Path(file).open(encoding="utf-8", newline="") as lines:
        rows = {(row["lamp_task"], row["method"]): row for row in csv.DictReader(lines)}
    return rows, parent.info.run_id


def number(text: str | None) -> float | None:
    return None if text in (None, "", "None") else float(text)


def is_mean_score(cell: dict[str, str]) -> bool:
    return cell["task"] == "mean" and cell["metric"] == "score"
