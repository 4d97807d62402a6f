"""What MLflow gets of a run, and that it gets it once, however often and whenever it is killed.

MLflow is a SQLite file here; tests/flows/test_mlflow_away.py kills a real server.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import mlflow.data
import pytest
from mlflow import MlflowClient

from tasks.errors import InputError
from tasks.record import files_of
from tasks.results.stage import StageFailed
from tasks.results.store import store
from tasks.tools.main import main
from tasks.tracking import runs
from tasks.tracking.entries import data_set, parts, whole
from tasks.tracking.runs import end_abandoned, log_ended, log_run, log_whole, tracked
from tasks.tracking.server import Mlflow, tracking_uri
from tests.unit.tracking.logged import files, logged, named, runs_of
from tests.unit.tracking.run_case import METHODS, NAME, ROWS, begun, ended_run, stub_report

# No server listens at this port.
AWAY = "http://me:hunter2@127.0.0.1:9"
DATE = int(1000 * datetime(2026, 3, 4, 5, 6).timestamp())


def text(uri: str, run: Any, path: str) -> str:
    return Path(MlflowClient(uri).download_artifacts(run.info.run_id, path)).read_text("utf-8")


def test_the_whole_run(uri: str) -> None:
    run = ended_run()
    log_run(run, Mlflow(uri))
    found = named(uri)
    anchors = {f"LaMP-2M anchor anchor-{number}" for number in range(3)}
    assert found.keys() == {NAME} | anchors | {f"LaMP-2M {name}" for name in METHODS}
    parent = found[NAME]
    assert parent.info.status == "FINISHED"
    assert parent.data.params["fusion.top_m"] == str(run.config["fusion"]["top_m"])
    assert parent.data.metrics == {
        f"{name}.score": 0.75 for name in ROWS
    }  # of the means, and no counts
    tags = parent.data.tags
    assert {name: tags[name] for name in ("kind", "seed", "preset", "missing")} == {
        "kind": "benchmark", "seed": "0", "preset": "embedded", "missing": "0",
    }  # fmt: skip
    assert tags["prefect_flow_run"] == run.id
    assert tags["mlflow.note.content"] == "3 methods on LaMP-2M.\n\nmta is ahead."
    assert files(uri, parent).keys() == {
        "config.json", "comparison.txt", "comparison.csv", "report.html",
        "LaMP-2M/data_counts.json", "LaMP-2M/manifest.json",
        "LaMP-2M/merge_only/map.png", "LaMP-2M/merge_only/anchors.parquet",
        "LaMP-2M/merge_only/recipes.parquet",
    }  # fmt: skip
    assert json.loads(text(uri, parent, "config.json")) == run.config
    assert text(uri, parent, "comparison.txt") == "the table\n"
    assert text(uri, parent, "report.html") == "<p>the report \u00e9</p>\n"
    table = list(csv.DictReader(io.StringIO(text(uri, parent, "comparison.csv"))))
    assert [row["method"] for row in table] == [*ROWS, *ROWS]
    assert (table[0]["accuracy"], table[0]["accuracy_hi"]) == ("0.5", "")
    assert (table[4]["accuracy"], table[4]["score"]) == ("", "0.75")
    counts = json.loads(text(uri, parent, "LaMP-2M/data_counts.json"))
    assert counts.keys() == {"counts", "dropped", "audit"}


def test_the_manifest_says_where_each_result_came_from(uri: str) -> None:
    """Every file of a cell by place and hash, and whether it was found; no losses, no users."""
    (cell,) = ended_run().cells
    text = whole(ended_run()).texts["LaMP-2M/manifest.json"]
    got = json.loads(text)
    listed = {(file.uri, file.sha256) for file in files_of(cell)}
    assert set(_files_in(got)) == listed
    answers = got["answers"]["mta"]
    assert [(one["cached"], one["seconds"]) for one in answers] == [(False, 30.0), (True, 30.0)]
    assert got["mergings"][0]["merged"]["bank"]["cached"]
    assert "losses" not in text
    assert "few-1" not in text


def _files_in(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        if value.keys() == {"uri", "sha256"}:
            yield value["uri"], value["sha256"]
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _files_in(one)


def test_a_method_and_an_anchor(uri: str) -> None:
    run = ended_run()
    log_run(run, Mlflow(uri))
    found = named(uri)
    parent = found[NAME].info.run_id
    score = run.cells[0].compared.scored[2].predictions
    method = found["LaMP-2M mta"]
    shared = {"lamp_task": "LaMP-2M", "seed": "0", "preset": "embedded"}
    own = {"kind": "method", "method": "mta", "cached": "false", "mlflow.parentRunId": parent}
    own |= {"result": score.folder}
    assert shared.items() | own.items() <= method.data.tags.items()
    assert method.data.metrics == {"accuracy": 0.5, "accuracy_lo": 0.25, "users": 3.0}
    params = method.data.params
    for name, value in (("anchors_trained", "3"), ("data", "synthetic"), ("method", "mta")):
        assert params[name] == value
    # As the method sees it: `merge_only` and `mta` have settings of their own.
    settings = run.cells[0].config.method("mta")
    assert params["stacking.rank"] == str(settings.stacking.rank)
    assert found["LaMP-2M base"].data.params["anchors_trained"] == "0"
    assert files(uri, method).keys() == {"predictions.parquet", "golds.json"}
    assert text(uri, method, "golds.json") == "compare mta/golds.json\n"
    # Two batches of half a minute.
    assert (method.info.start_time, method.info.end_time) == (DATE - 60_000, DATE)

    anchor = found["LaMP-2M anchor anchor-1"]
    lora = run.cells[0].mergings[0].merged.bank.members[1]
    own = {"kind": "anchor", "anchor": "anchor-1", "cached": "true", "mlflow.parentRunId": parent}
    own |= {"result": lora.adapter.folder}
    assert shared.items() | own.items() <= anchor.data.tags.items()
    assert "anchor-1" not in anchor.data.params.values()
    assert anchor.data.params["cluster"] == "2"
    assert anchor.data.metrics == {
        "loss": 0.25, "items": 9.0, "steps": 4.0, "tokens": 99.0, "truncated": 0.0, "seconds": 1.5,
    }  # fmt: skip
    series = MlflowClient(uri).get_metric_history(anchor.info.run_id, "loss")
    assert sorted((one.step, one.value) for one in series) == [
        (step, 1 / step) for step in range(1, 5)
    ]
    assert files(uri, anchor) == {
        "adapter/adapter_config.json": 2, "adapter/adapter_model.safetensors": 20_000,
    }  # fmt: skip
    assert (anchor.info.start_time, anchor.info.end_time) == (DATE - 1500, DATE)


@pytest.mark.parametrize(
    ("given", "source"),
    [
        ({}, '"themes": "24"'),
        ({"data": "/data/users.json"}, '{"uri": "/data/users.json"}'),
        ({"data": "lamp"}, '{"url": "https://ciir.cs.umass.edu/downloads/LaMP/LaMP_2/new"}'),
    ],
)
def test_the_users_are_a_data_set(uri: str, given: dict[str, str], source: str) -> None:
    """Their digest is of what the run made of them, and MLflow finds again where they came from."""
    run = ended_run()
    (cell,) = run.cells
    config = cell.config.model_copy(update=given)
    changed = cell.model_copy(update={"config": config})
    log_run(run.model_copy(update={"cells": (changed,)}), Mlflow(uri))
    (logged_one,) = named(uri)[NAME].inputs.dataset_inputs
    told = logged_one.dataset
    assert (told.name, len(told.digest)) == ("LaMP-2M", 32)
    assert source in told.source
    assert mlflow.data.get_source(logged_one).to_dict() == json.loads(told.source)
    assert json.loads(told.profile)["queries"] == 6
    other = data_set(cell.model_copy(update={"users": cell.users.model_copy(
        update={"few_shot": cell.users.base})}))  # fmt: skip
    assert other.digest != told.digest


def test_more_than_one_call_takes(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method has more than MLflow's hundred parameters, and a search finds two runs at a time."""
    monkeypatch.setattr("tasks.tracking.server.RUNS", 2)
    run = ended_run(steps=350)
    log_run(run, Mlflow(uri))
    log_run(run, Mlflow(uri))
    found = named(uri)
    assert len(found) == 7
    assert len(found["LaMP-2M mta"].data.params) == len(found["LaMP-2M base"].data.params) > 100
    anchor = found["LaMP-2M anchor anchor-0"]
    # At most 200 points: each of two steps.
    series = MlflowClient(uri).get_metric_history(anchor.info.run_id, "loss")
    assert sorted(one.step for one in series) == list(range(2, 351, 2))


class Killed(BaseException):
    """The process ends."""


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Kill before the n-th call that writes to MLflow."""
    names = ("create_run", "log_batch", "log_artifact", "log_text", "set_tag",
             "set_terminated")  # fmt: skip
    left: list[int | None] = [None]
    monkeypatch.setattr(runs, "THREADS", 1)

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if left[0] is not None:
                left[0] -= 1
                if left[0] <= 0:
                    raise Killed
            return real(*args, **kwargs)

        return call

    for name in names:
        monkeypatch.setattr(MlflowClient, name, wrapped(getattr(MlflowClient, name)))

    def at(number: int | None) -> None:
        left[0] = number

    return at


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, mlflow_tables: Path) -> dict[str, Any]:
    """What an MLflow holds of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("calm")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    (folder / "mlflow.db").write_bytes(mlflow_tables.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTA_STORE", str(folder / "mta" / "store"))
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        stub_report(patch)
        run = ended_run()
        with tracked(begun(run)):
            assert log_ended(run) == ""
        return logged(uri)


# Of 46 calls: what the parent holds; from 18 on 3 anchors (start, values, adapter, end); from 30
# on 3 methods, with a call for files more; the parent's end.
@pytest.mark.parametrize("number", [2, 4, 9, 20, 35, 46])
def test_killed_and_logged_again(uri: str, kill: Any, calm: dict[str, Any], number: int) -> None:
    """Once each, with the same content, wherever the first was killed; and once more, nothing:
    tests/flows/test_mlflow_away.py."""
    run = ended_run()
    kill(number)
    with pytest.raises(Killed):
        log_run(run, Mlflow(uri))
    kill(None)
    log_run(run, Mlflow(uri))
    assert logged(uri) == calm


def test_a_run_is_there_from_its_beginning(uri: str) -> None:
    run = ended_run()
    with tracked(begun(run)) as page:
        (parent,) = runs_of(uri)
        assert parent.info.status == "RUNNING"
        assert parent.data.params["preset"] == "embedded"
        assert files(uri, parent).keys() == {"config.json"}
        assert page is None  # a file has no pages
    assert named(uri)[NAME].info.status == "RUNNING"  # nobody said how it ended


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (ValueError(f"two\nlines of {AWAY}"), "ValueError: two lines of http://***@127.0.0.1:9"),
        (StageFailed("no anchor could be trained"), "no anchor could be trained"),
        (KeyboardInterrupt(), "KeyboardInterrupt: "),
    ],
)
def test_a_run_that_fails(uri: str, error: BaseException, wanted: str) -> None:
    with pytest.raises(type(error)), tracked(begun(ended_run())):
        raise error
    run = named(uri)[NAME]
    assert (run.info.status, run.data.tags["failure"]) == ("FAILED", wanted)


def test_a_run_that_lacks_something(uri: str) -> None:
    log_run(ended_run(missing=("LaMP-3: no users", "anchor x: failed")), Mlflow(uri))
    run = named(uri)[NAME]
    assert (run.info.status, run.data.tags["missing"]) == ("FAILED", "2")
    assert text(uri, run, "missing.txt") == "LaMP-3: no users\nanchor x: failed\n"


def test_a_report_that_was_not_made(uri: str) -> None:
    run = ended_run()
    (store().state / "reports" / f"{NAME}.html").unlink()
    log_run(run, Mlflow(uri))
    assert "report.html" not in files(uri, named(uri)[NAME])


def test_mlflow_away_costs_a_line(
    uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ended_run(name="spry llama")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", AWAY)
    with tracked(begun(run)) as page:
        assert page is None
        late = log_ended(run)
    assert late.startswith("; MLflow did not take all of it (")
    assert late.endswith("): `mta log 'spry llama'` logs the run")
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "hunter2" not in late + said
    # An error of the run is not hidden by the second one.
    with pytest.raises(StageFailed), tracked(begun(run)):
        raise StageFailed("no")


def test_a_file_that_is_gone_is_named(uri: str) -> None:
    run = ended_run()
    golds = run.cells[0].compared.scored[0].golds
    (store().root / golds.uri).unlink()
    with tracked(begun(run)):
        assert f"{golds.uri} is gone or damaged" in log_ended(run)


def test_runs_that_were_killed_are_ended(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    over = {"00000000-0000-4000-8000-000000000001": True, "not-a-uuid": False}
    monkeypatch.setattr(runs, "flow_run_is_over", over.__getitem__)
    mlflow = Mlflow(uri)
    run = ended_run()
    ids = [log_whole(mlflow, whole(begun(run.model_copy(update={"id": id})))) for id in over]
    own = log_whole(mlflow, whole(begun(run)))
    end_abandoned(mlflow, own)
    found = {one.info.run_id: one for one in runs_of(uri)}
    assert [found[one].info.status for one in (*ids, own)] == ["KILLED", "RUNNING", "RUNNING"]
    assert found[ids[0]].data.tags["failure"] == "its flow run was killed"
    # It had ended, and MLflow was away then: to log it says so.
    log_run(run.model_copy(update={"id": next(iter(over))}), mlflow)
    again = {one.info.run_id: one for one in runs_of(uri)}[ids[0]]
    assert (again.info.status, "failure" in again.data.tags) == ("FINISHED", False)


def test_a_large_adapter_is_uploaded_once(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "LARGE", 20_000)
    run = ended_run()
    log_run(run, Mlflow(uri))
    log_run(run.model_copy(update={"id": "another", "name": "second"}), Mlflow(uri))
    kinds: dict[str, list[Any]] = {}
    for one in runs_of(uri):
        kinds.setdefault(one.data.tags["kind"], []).append(one)
    held = {one.info.run_id: files(uri, one) for one in kinds["anchor"]}
    naming = [one for one in kinds["anchor"] if "artifacts_in" in one.data.tags]
    assert len(naming) == 3
    for one in naming:
        assert held[one.info.run_id] == {}
        assert len(held[one.data.tags["artifacts_in"]]) == 2
        assert one.data.metrics["loss"] == 0.25
    assert all(len(files(uri, one)) == 2 for one in kinds["method"])


def test_what_was_deleted_in_mlflow_stays_deleted(uri: str) -> None:
    run = ended_run()
    log_run(run, Mlflow(uri))
    gone = named(uri)["LaMP-2M anchor anchor-0"].info.run_id
    MlflowClient(uri).delete_run(gone)
    log_run(run, Mlflow(uri))
    assert named(uri)["LaMP-2M anchor anchor-0"].info.lifecycle_stage == "deleted"


STRANGE = ["../../x", "/etc/passwd", "nul\0and\nline", "evil\u202etxt", "anne", "\u0430nne",
           "<script>alert(1)</script>", "long" * 500, "{user}%s,\"'"]  # fmt: skip


def test_strange_ids(uri: str, tmp_path: Path) -> None:
    """Names and tags are printable and differ; nothing lies outside."""
    run = ended_run(anchors=len(STRANGE))
    (cell,) = run.cells
    (one,) = cell.mergings
    members = [
        lora.model_copy(update={"anchor": name})
        for lora, name in zip(one.merged.bank.members, STRANGE, strict=True)
    ]
    listed = [
        anchor.model_copy(update={"name": name})
        for anchor, name in zip(one.chosen.anchors, STRANGE, strict=True)
    ]
    bank = one.merged.bank.model_copy(update={"members": tuple(members)})
    merged = one.merged.model_copy(update={"bank": bank})
    chosen = one.chosen.model_copy(update={"anchors": tuple(listed)})
    merging = one.model_copy(update={"merged": merged, "chosen": chosen})
    cell = cell.model_copy(update={"mergings": (merging,)})
    log_run(run.model_copy(update={"cells": (cell,)}), Mlflow(uri))
    anchors = [one for one in runs_of(uri) if one.data.tags["kind"] == "anchor"]
    assert len({one.data.tags["anchor"] for one in anchors}) == len(STRANGE)
    for one in anchors:  # type: ignore[assignment]
        told = [one.info.run_name, *one.data.tags.values(), *one.data.params.values()]  # type: ignore[attr-defined]
        assert all(text.isprintable() for text in told)
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "mta"}


def test_an_anchor_of_two_banks_is_one_run(uri: str) -> None:
    run = ended_run()
    (cell,) = run.cells
    twice = cell.model_copy(update={"mergings": (*cell.mergings, *cell.mergings)})
    rows = [runs.rows([cell])]
    entries = list(parts(run.model_copy(update={"cells": (twice,)}), rows))
    assert [one.name for one in entries] == [one.name for one in parts(run, rows)]


def test_the_command(
    uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ended_run()

    def read_run(wanted: str) -> Any:
        if wanted not in ("last", NAME):
            raise InputError(f"--run {wanted}: no such run")
        return run

    monkeypatch.setattr("tasks.report.files.read_run", read_run)
    assert main(["log"]) == 0
    assert main(["log", NAME]) == 0
    assert capsys.readouterr().out == f"mta: {NAME} is in MLflow: {uri}\n" * 2
    assert len(named(uri)) == 7
    assert main(["log", "other"]) == 2
    assert capsys.readouterr().err == "mta: --run other: no such run\n"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", AWAY)
    assert main(["log"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("mta: MLflow does not answer (")
    assert said.count("\n") == 1
    assert "hunter2" not in said


def test_pages_have_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@host:5000")
    mlflow = Mlflow(tracking_uri())
    mlflow.experiment = "1"
    page = "http://***@host:5000/#/experiments/1/runs/2?workflowType=machine_learning"
    assert mlflow.page("2") == page
    assert tracking_uri().endswith("@host:5000")  # what connects still has it
    monkeypatch.setenv("MTA_MLFLOW_UI", "https://seen.example/")
    assert mlflow.page("2", "/artifacts/report.html") == (
        "https://seen.example/#/experiments/1/runs/2/artifacts/report.html"
    )
