"""What is logged while MLflow is down, refuses, or dies between taking and answering.

MLflow is a sqlite file here; tests/flows/test_spool.py kills a real server.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import RestException

from tasks.errors import InputError
from tasks.forget.user import forget
from tasks.store.artifacts import Store
from tasks.store.pieces import RECORD
from tasks.store.remote import RemoteStore
from tasks.store.storage import Storage
from tasks.tracking import spool as module
from tasks.tracking.__main__ import main
from tasks.tracking.replay import KEY_TAG, Replay, target
from tasks.tracking.spool import FOLDER, Spool, catch_up, waiting

KEY, CHILD, OTHER = "a" * 32, "b" * 32, "c" * 32


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables: to make them takes longer than a test."""
    file = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def uri(where: Store, tmp_path: Path, empty: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    shutil.copy(empty, tmp_path / "mlflow.db")
    found = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", found)
    monkeypatch.setattr(module, "LAST_TRIES", (0.0, 0.0))
    return found


class Failing(Replay):
    """An MLflow that does what it is told with the n-th entry it is given, from 0."""

    def __init__(self, uri: str, where: Store, how: Callable[[int], str]) -> None:
        super().__init__(uri, where)
        self.how, self.given = how, 0

    def take(self, entry: dict[str, Any], folder: Path, anew: bool) -> None:
        what = self.how(self.given)
        self.given += 1
        if what == "down":
            raise requests.ConnectionError("refused")
        if what == "refuses":
            raise RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "no\nsuch"})
        super().take(entry, folder, anew)
        if what == "lost":
            raise requests.ConnectionError("the answer was lost")


def opened(where: Store, replay: Replay, name: str = "one") -> Spool:
    return Spool(where.root.parent / FOLDER / name, replay, {"name": f"run-{name}"})


def piece(where: Store) -> Any:
    def make(out: Path) -> dict[str, Any]:
        (out / "adapter").mkdir()
        (out / "adapter" / "weights.json").write_text("[1]")
        (out / "table.json").write_text("{}")
        return {}

    return where.get("meta_lora", "kk", make).ref


def copied(folder: Path) -> Callable[[Path], dict[str, Any]]:
    def make(out: Path) -> dict[str, Any]:
        shutil.copytree(folder, out, ignore=shutil.ignore_patterns(RECORD), dirs_exist_ok=True)
        return {}

    return make


def fill(spool: Spool, where: Store) -> None:
    """A parent with everything, a child, and another that is kept as one file."""
    spool.add("run", KEY, name="parent", tags={"kind": "benchmark"}, parent=None, time=1000)
    spool.add_values(KEY, {f"p{n}": str(n) for n in range(120)})
    spool.add("run", CHILD, name="child", tags={"kind": "method"}, parent=KEY, time=2000)
    spool.add_values(CHILD, metrics=[("loss", 1.0 / step, step) for step in range(1, 1101)])
    spool.add_values(CHILD, metrics=[("odd", math.nan, 0), ("huge", math.inf, 0)])
    spool.add_text(KEY, "line\n", "folder/comparison.txt")
    spool.add_piece(CHILD, piece(where), "adapter", "adapter")
    spool.add_piece(CHILD, piece(where), "table.json")
    with spool.together():
        spool.add("run", OTHER, name="other", tags={"kind": "anchor"}, parent=KEY, time=2500)
        # More than one call takes, of both.
        params = {f"p{n}": str(n) for n in range(101)}
        spool.add_values(OTHER, params, [("loss", 0.5, step) for step in range(1000)])
        spool.add_text(OTHER, "line\n", "notes.txt")
        spool.add("end", OTHER, status="FINISHED", time=2600)
    spool.add("tags", KEY, tags={"missing": "0"})
    spool.add("end", CHILD, status="FINISHED", time=3000)
    spool.add("end", KEY, status="FAILED", time=4000)


ENTRIES = 15
# Of the other child's four entries there is one file.
FILES = 12


def logged(uri: str) -> dict[str, Any]:
    """All that MLflow has, without ids and without times that nobody fixed."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("mta")
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    found: dict[str, Any] = {}
    ids = {run.info.run_id: run.data.tags[KEY_TAG] for run in runs}
    for run in runs:
        own = run.info
        series = {
            name: [(m.step, str(m.value)) for m in client.get_metric_history(own.run_id, name)]
            for name in run.data.metrics
        }
        tags = {k: v for k, v in run.data.tags.items() if not k.startswith("mlflow.")}
        parent = ids.get(run.data.tags.get("mlflow.parentRunId", ""))
        key = own.run_name if own.run_name not in found else f"{own.run_name} again"
        found[key] = (own.status, own.start_time, own.end_time, tags, parent, run.data.params)
        found[f"{key} metrics"] = {name: sorted(points) for name, points in series.items()}
        found[f"{key} files"] = sorted(paths(client, own.run_id))
    return found


def paths(client: Any, run: str, folder: str | None = None) -> list[str]:
    found: list[str] = []
    for item in client.list_artifacts(run, folder):
        found += paths(client, run, item.path) if item.is_dir else [item.path]
    return found


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory, empty: Path) -> dict[str, Any]:
    """What an MLflow has that never was down."""
    folder = tmp_path_factory.mktemp("calm")
    where = Store(folder / "mta" / "store")
    shutil.copy(empty, folder / "calm.db")
    other = f"sqlite:///{folder / 'calm.db'}"
    spool = opened(where, Replay(other, where), "calm")
    fill(spool, where)
    assert spool.finish()
    spool.close()
    found = logged(other)
    child = found["child"]
    assert child[:3] == ("FINISHED", 2000, 3000)
    assert child[4] == KEY
    assert found["child files"] == ["adapter/weights.json", "table.json"]
    assert found["other"] == (
        "FINISHED", 2500, 2600, {"kind": "anchor", KEY_TAG: OTHER}, KEY,
        {f"p{n}": str(n) for n in range(101)},
    )  # fmt: skip
    assert found["other metrics"] == {"loss": [(step, "0.5") for step in range(1000)]}
    assert found["other files"] == ["notes.txt"]
    assert len(found["child metrics"]["loss"]) == 1100
    assert found["parent"][0] == "FAILED"
    assert found["parent"][5] == {f"p{n}": str(n) for n in range(120)}
    assert found["parent files"] == ["folder/comparison.txt"]
    return found


HOWS: dict[str, Callable[[int], str]] = {
    "down from the start for a while": lambda n: "down" if n < 3 else "",
    "down in the middle": lambda n: "down" if 4 <= n < 6 else "",
    "every answer is lost once": lambda n: "lost" if n % 2 == 0 else "",
    "every entry is tried thrice": lambda n: "down" if n % 3 != 2 else "",
}


@pytest.mark.parametrize("how", HOWS)
def test_all_of_it_once(
    where: Store, uri: str, tmp_path: Path, wanted: dict[str, Any], how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.0)
    spool = opened(where, Failing(uri, where, HOWS[how]))
    fill(spool, where)
    while not spool.send():
        pass
    spool.close()
    assert logged(uri) == wanted
    assert waiting(where.root.parent) == {}
    assert not spool.folder.exists()


@pytest.mark.parametrize("taken", range(0, ENTRIES, 2))
@pytest.mark.parametrize("lost", [False, True])
def test_a_run_that_was_killed_is_logged_by_the_next(
    where: Store, uri: str, tmp_path: Path, wanted: dict[str, Any], taken: int, lost: bool
) -> None:
    """Killed after `taken` entries; the last of them was taken but not removed (`lost`)."""

    def how(number: int) -> str:
        if number < taken:
            return ""
        return "lost" if lost and number == taken else "down"

    killed = opened(where, Failing(uri, where, how))
    fill(killed, where)
    # Of those kept together all wait until the last was taken.
    done = min(taken, 8) if taken < 12 else taken - 3
    assert len(killed.waiting()) == FILES - done
    killed._lock.close()  # as the end of a process does
    catch_up(where, Replay(uri, where))
    assert logged(uri) == wanted
    assert not killed.folder.exists()


def test_while_down_it_is_not_asked_for_every_entry(
    where: Store, uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At 0, 1, 3 and 7 s (pauses of 1, 2, 4 and 8); one line says it."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    replay = Failing(uri, where, lambda _n: "down")
    spool = opened(where, replay)
    asked = []
    for second in range(15):
        now[0] = float(second)
        before = replay.given
        spool.add("tags", KEY, tags={"n": str(second)})
        if replay.given > before:
            asked.append(second)
    assert asked == [0, 1, 3, 7]
    assert capsys.readouterr().out.count("MLflow does not take what is logged") == 1
    line = spool.behind() or ""
    assert "15 entries wait in" in line
    assert "`python -m tasks.tracking`" in line


def test_a_refusal_is_told_and_does_not_stop_the_rest(where: Store, uri: str) -> None:
    spool = opened(where, Failing(uri, where, lambda n: "refuses" if n == 1 else ""))
    fill(spool, where)
    assert spool.finish()
    assert spool.refused == [
        "MLflow refused an entry of kind values (RestException: INVALID_PARAMETER_VALUE: no such)"
    ]
    (parent,) = [r for r in MlflowClient(uri).search_runs(["1"]) if r.info.run_name == "parent"]
    assert parent.info.status == "FAILED"
    assert parent.data.params == {}


def test_a_piece_that_is_gone_is_a_refusal(where: Store, uri: str) -> None:
    spool = opened(where, Replay(uri, where))
    spool.add("run", KEY, name="parent", tags={}, parent=None, time=1)
    spool.add_piece(KEY, {"uri": "meta_lora/none", "sha256": "0", "kind": "meta_lora"}, "adapter")
    assert spool.finish()
    assert "meta_lora/none is gone or damaged" in spool.refused[0]


def test_a_store_that_does_not_answer_is_asked_again(
    where: Store, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have the piece: nothing is dropped, and it is not asked once more at the end."""
    ref = piece(where)
    storage = Storage("memory://away")
    away = RemoteStore(storage, tmp_path / "cache")
    asked: list[str] = []

    def no_answer(path: str) -> bytes:
        asked.append(path)
        raise ConnectionResetError("reset")

    monkeypatch.setattr(storage, "patience", 0.0)
    spool = opened(where, Replay(uri, away))
    spool.add("run", KEY, name="parent", tags={}, parent=None, time=1)
    with monkeypatch.context() as patch:
        patch.setattr(storage.fs, "cat_file", no_answer)
        spool.add_piece(KEY, ref, "adapter", "adapter")
        assert not spool.finish()
        assert len(asked) == 2
    assert spool.refused == []
    assert len(spool.waiting()) == 1
    assert "memory://away: reading failed: no answer for 0 s (reset)" in (spool.behind() or "")
    away.make("meta_lora", "kk", copied(where.open(ref).folder))
    assert spool.finish()
    assert logged(uri)["parent files"] == ["adapter/weights.json"]


def test_one_process_at_a_time(where: Store, uri: str) -> None:
    down = Failing(uri, where, lambda _n: "down")
    spool = opened(where, down)
    spool.add("tags", KEY, tags={"n": "1"})
    with pytest.raises(BlockingIOError):
        Spool(spool.folder, down)
    catch_up(where, Replay(uri, where))
    assert len(spool.waiting()) == 1
    module.clear(where.root.parent)
    assert spool.folder.exists()


def test_the_command(
    where: Store, uri: str, tmp_path: Path, wanted: dict[str, Any],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One line per run; what is for another MLflow waits on."""
    assert main([]) == 0
    assert capsys.readouterr().out == "mta: nothing waits to be logged\n"
    spool = opened(where, Failing(uri, where, lambda _n: "down"))
    fill(spool, where)
    spool._lock.close()
    other = opened(where, Failing("http://127.0.0.1:9", where, lambda _n: "down"), "two")
    other.add("tags", KEY, tags={"n": "1"})
    other._lock.close()
    capsys.readouterr()
    assert main([]) == 1
    said = capsys.readouterr()
    assert said.out == f"mta: run run-one: {FILES} logged, 0 wait\n"
    assert "1 entries still wait" in said.err
    assert logged(uri) == wanted
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main([]) == 1
    assert capsys.readouterr().out.startswith("mta: run run-two: 0 logged, 1 wait (")


@pytest.mark.parametrize("by_command", [False, True])
def test_what_another_mlflow_began_waits_for_it(
    where: Store, uri: str, tmp_path: Path, empty: Path, wanted: dict[str, Any],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, by_command: bool,
) -> None:  # fmt: skip
    """Another one answers at the address: what was not taken stays, and other runs' go to it."""
    monkeypatch.setattr(module, "target", lambda _uri: "http://host")
    another = f"sqlite:///{tmp_path / 'another.db'}"
    shutil.copy(empty, tmp_path / "another.db")
    begun = opened(where, Failing(uri, where, lambda n: "" if n < 3 else "down"))
    fill(begun, where)
    begun._lock.close()
    left = len(begun.waiting())
    later = opened(where, Failing(uri, where, lambda _n: "down"), "two")
    later.add("run", "d" * 32, name="later", tags={}, parent=None, time=1)
    later._lock.close()
    capsys.readouterr()

    def log_to(mlflow: str) -> str:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow)
        if by_command:
            main([])
        else:
            catch_up(where, Replay(mlflow, where))
        return capsys.readouterr().out

    said = log_to(another)
    start = "mta: " if by_command else "MLflow: "
    assert said.splitlines() == [
        f"{start}run run-one: 0 logged, {left} wait (MLflow at {another}: the run that this "
        f"belongs to is gone; log to the MLflow that has it, or remove {begun.folder})",
        f"{start}run run-two: 1 logged, 0 wait",
    ]
    assert waiting(where.root.parent) == {"one": left}
    assert [name for name in logged(another) if " " not in name] == ["later"]
    assert log_to(uri) == f"{start}run run-one: {left} logged, 0 wait\n"
    assert logged(uri) == wanted


def test_what_is_refused_is_not_counted_as_logged(
    where: Store, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A start that is refused takes with it all of its run: nobody else has it."""
    spool = opened(where, Failing(uri, where, lambda _n: "down"))
    fill(spool, where)
    spool._lock.close()
    capsys.readouterr()
    catch_up(where, Failing(uri, where, lambda n: "refuses" if n == 2 else ""))
    # Of the child: its start, its values twice, two pieces and its end.
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"MLflow: run run-one: {FILES - 6} logged, 0 wait, 6 refused"
    )
    assert waiting(where.root.parent) == {}


def test_forgetting_waits_for_it(where: Store, uri: str) -> None:
    where.root.mkdir(parents=True)
    spool = opened(where, Failing(uri, where, lambda _n: "down"))
    spool.add_text(KEY, "few-1", "comparison.txt")
    spool._lock.close()
    with pytest.raises(InputError, match=r"1 entries wait .* `python -m tasks\.tracking`"):
        forget(where, "few-1")


def test_no_secret_and_no_pickle_in_it(where: Store) -> None:
    url = "http://me:hunter2@127.0.0.1:9"
    spool = opened(where, Replay(url, where))
    spool.add("run", KEY, name="parent", tags={}, parent=None, time=1)
    spool.add_text(KEY, "line\n", "report.html")
    assert "hunter2" not in (spool.behind() or "")
    for path in spool.folder.iterdir():
        assert b"hunter2" not in path.read_bytes()
        assert path.suffix in (".json", ".html", "")
        if path.suffix == ".json":
            json.loads(path.read_text())
    assert spool.about == {"name": "run-one", "target": "http://127.0.0.1"}


def test_target() -> None:
    """A server's port and password may change, its host and path say which it is."""
    assert target("http://me:x@host:5000/") == target("http://host:5001") == "http://host"
    assert target("https://me:x@host/team-a/") == target("https://host:1/team-a")
    assert target("https://host/team-a") != target("https://host/team-b")
    assert target("https://host") != target("http://host")
    assert target("sqlite:////a/b.db") == "sqlite:////a/b.db"
