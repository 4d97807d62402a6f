"""Stages as Prefect runs them: found, made again, refused, tried again, shared, killed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.context import FlowRunContext
from prefect.results import ResultRecord
from prefect.serializers import PickleSerializer
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from tasks.config.options import ComputeOptions
from tasks.config.run import resolve
from tasks.errors import DiskFull, InputError
from tasks.record import OUTSIDE_KEY, File, Result
from tasks.results.stage import RUNNER, StageFailed, stage, within
from tasks.results.store import MAKING, RESULTS, store
from tasks.running.runner import running

# What the stages below did, a line for each: in a file, as processes do it too.
MARKS = "MTA_TEST_MARKS"
# How long `slow` takes.
SECONDS = "MTA_TEST_SECONDS"


class Made(Result):
    file: File
    number: int
    place: Annotated[str, OUTSIDE_KEY] = ""


def mark(line: str) -> None:
    with Path(os.environ[MARKS]).open("a") as file:
        file.write(f"{line}\n")


def marks() -> list[str]:
    path = Path(os.environ[MARKS])
    return path.read_text().splitlines() if path.exists() else []


def write(number: int) -> File:
    with store().new("demo") as folder:
        (folder.path / "file").write_text(str(number))
    return folder.file("file")


@stage(version=1, libraries=("pydantic",))
def demo(number: int, compute: ComputeOptions) -> Made:
    """What it does."""
    mark(f"demo {number}")
    return Made(file=write(number), number=number, place=compute.device)


@stage(version=1)
def after(made: Made) -> Made:
    mark(f"after {made.number}")
    text = store().path(made.file).read_text()
    return Made(file=write(int(text) + 100), number=made.number)


@stage(version=1, uses_model=True)
def on_runner(number: int) -> Made:
    mark(f"{os.getpid()} {number}")
    return Made(file=write(number), number=number)


@stage(version=1, uses_model=True)
def killed(number: int) -> Made:
    mark(f"killed {number}")
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@stage(version=1, uses_model=True)
def raises(kind: str) -> Made:
    raise ERRORS[kind]


@stage(version=1)
def slow(number: int) -> Made:
    mark(f"slow {number}")
    time.sleep(float(os.environ.get(SECONDS, "1")))
    return Made(file=write(number), number=number)


@stage(version=1)
def fails(number: int, errors: tuple[str, ...]) -> Made:
    """Raises the named errors, one per try."""
    mark("try")
    tries = len(marks())
    if tries <= len(errors):
        raise ERRORS[errors[tries - 1]]
    return Made(file=write(number), number=number)


ERRORS: dict[str, Exception] = {
    "refused": httpx.ConnectError("All connection attempts failed"),
    "reset": ConnectionResetError(104, "Connection reset by peer"),
    "slow": httpx.ReadTimeout("slow"),
    "input": InputError("file x: record 3 has no tag; add one"),
    "bug": ValueError("a\n  bug of http://me:secret@host/x"),
    "full": OSError(errno.ENOSPC, "No space left on device", "/x"),
}
CPU, CUDA = ComputeOptions(device="cpu"), ComputeOptions(device="cuda")


@pytest.fixture
def place(tmp_path: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MTA_STORE", str(tmp_path / ".mta" / "store"))
    monkeypatch.setenv(MARKS, str(tmp_path / "marks"))
    return tmp_path


def run(work: Callable[[], Any], *, wait: bool = True) -> tuple[Any, list[tuple[str, str]]]:
    """What `work` gives inside a flow run, and the name and final state of its task runs.

    wait: for these states. Those of killed processes never come.
    """
    found: list[Any] = []

    @flow(name="demo-flow", persist_result=False)
    def once() -> None:
        context = FlowRunContext.get()
        assert context
        assert context.flow_run
        found.append(context.flow_run.id)
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    copy_context().run(once)
    run_id, gave = found
    if isinstance(gave, Exception):
        raise gave
    return gave, task_runs(run_id) if wait else []


def task_runs(run_id: Any) -> list[tuple[str, str]]:
    """Of a flow run; task runs reach the server a little after they ended."""
    only = FlowRunFilter(id=FlowRunFilterId(any_=[run_id]))
    with get_client(sync_client=True) as client:
        for _ in range(3000):
            runs = client.read_task_runs(flow_run_filter=only)
            if runs and all(one.state and one.state.is_final() for one in runs):
                break
            time.sleep(0.1)
        runs.sort(key=lambda one: one.expected_start_time)
        return [(one.name, one.state.name) for one in runs if one.state]


def results() -> list[str]:
    return sorted(path.name for path in (store().root / RESULTS).glob("*"))


def test_made_then_found(place: Path) -> None:
    def work() -> Made:
        with within("LaMP-2M"):
            return demo(5, CPU)

    first, made = run(work)
    second, found = run(work)
    assert marks() == ["demo 5"]
    assert (made, found) == ([("demo, LaMP-2M", "Completed")], [("demo, LaMP-2M", "Cached")])
    assert (first.cached, second.cached) == (False, True)
    assert second == first.model_copy(update={"cached": True})
    assert first.seconds > 0
    assert store().path(second.file).read_text() == "5"
    assert results() == [demo.key(5, CPU)]
    assert run(lambda: demo(6, CPU))[0].number == 6
    assert marks() == ["demo 5", "demo 6"]


def test_what_decides_nothing_finds_it(place: Path) -> None:
    first, _ = run(lambda: demo(5, CPU))
    second, states = run(lambda: demo(5, CUDA))
    assert states == [("demo", "Cached")]
    assert second.place == first.place == "cpu"


def test_what_it_was_made_of_is_noted(place: Path) -> None:
    (made, later), _ = run(lambda: (first := demo(5, CPU), after(first)))
    assert (made.made_of, later.made_of) == ((), (made.file.folder,))
    assert store().path(later.file).read_text() == "105"


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_damaged_file_is_made_again(place: Path, damage: str) -> None:
    """The stage that made it, and it alone: what was made of it is as it was."""

    def work() -> tuple[Made, Made]:
        made = demo(5, CPU)
        return made, after(made)

    first, _ = run(work)
    folder = store().root / first[0].file.folder
    if damage == "gone":
        store().remove(folder)
    else:
        (folder / "file").write_text("wrong")
        os.utime(folder / "file", (1, 1))
    again, states = run(work)
    assert states == [("demo", "Completed"), ("after", "Cached")]
    assert marks() == ["demo 5", "after 5", "demo 5"]
    assert [one.file for one in again] == [one.file for one in first]
    assert [one.cached for one in again] == [False, True]
    assert store().path(again[0].file).read_text() == "5"
    assert [state for _, state in run(work)[1]] == ["Cached", "Cached"]


def record(change: Callable[[dict[str, Any]], None]) -> Callable[[str], str]:
    """A change of the result that a record holds, as JSON within its JSON."""

    def changed(text: str) -> str:
        whole = json.loads(text)
        inner = json.loads(whole["result"])
        change(inner["data"])
        return json.dumps(whole | {"result": json.dumps(inner)})

    return changed


BROKEN: dict[str, Callable[[str], str]] = {
    "cut": lambda text: text[:-30],
    "empty": lambda _text: "",
    "other json": lambda _text: "[]",
    "a field less": record(lambda data: data.pop("number")),
    "a field of another version": record(lambda data: data.update({"earlier": 1})),
    "a file outside the store": record(lambda data: data["file"].update({"uri": "../../x"})),
}


def pickled(text: str) -> str:
    """The record as a pickle, as it would say itself."""
    whole = json.loads(text)
    whole["metadata"]["serializer"] = {"type": "pickle"}
    return json.dumps(whole | {"result": PickleSerializer().dumps(Bomb()).decode()})


def called(text: str) -> str:
    """The record as a call: pydantic validates a function's arguments, and calls it."""
    whole = json.loads(text)
    named = {"__class__": "tests.flows.test_stage.mark", "data": {"line": "exploded"}}
    return json.dumps(whole | {"result": json.dumps(named)})


class Bomb:
    def __reduce__(self) -> Any:
        return mark, ("exploded",)


BROKEN |= {"a pickle": pickled, "a call": called}


@pytest.mark.parametrize("name", ["a pickle", "a call"])
def test_prefect_alone_would_run_it(place: Path, name: str) -> None:
    run(lambda: demo(5, CPU))
    (file,) = (store().root / RESULTS).iterdir()
    ResultRecord.deserialize(BROKEN[name](file.read_text()).encode())
    assert marks() == ["demo 5", "exploded"]


def test_a_broken_record_is_made_again(place: Path) -> None:
    """Eight records in one run, each broken in a way of its own."""

    def work() -> list[Made]:
        return [demo(number, CPU) for number in range(len(BROKEN))]

    run(work)
    for number, (name, breaks) in enumerate(BROKEN.items()):
        file = store().root / RESULTS / demo.key(number, CPU)
        whole = file.read_text()
        file.write_text(breaks(whole))
        assert file.read_text() != whole, name
    again, _ = run(work)
    assert {name: one.cached for name, one in zip(BROKEN, again, strict=True)} == dict.fromkeys(
        BROKEN, False
    )
    assert [one.number for one in again] == list(range(len(BROKEN)))
    assert marks() == [f"demo {number}" for number in range(len(BROKEN))] * 2
    found, _ = run(work)
    assert all(one.cached for one in found)


def failure(work: Callable[[], Any]) -> str:
    """The line that a stage of a flow fails with."""
    with pytest.raises(StageFailed) as caught:
        run(work)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_input_is_one_line_and_not_kept(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert failure(lambda: fails(1, ("input",))) == "file x: record 3 has no tag; add one"
    assert marks() == ["try"]
    assert not any(one.exc_info for one in caplog.records)
    assert "Traceback" not in caplog.text
    # Prefect writes errors down as results; they may name a user.
    assert results() == []
    assert run(lambda: fails(1, ("input",)))[0].number == 1


def test_a_fault_of_ours_is_one_line_and_a_traceback_in_the_log(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither shows the password of a URL."""
    line = failure(lambda: fails(1, ("bug",)))
    assert line == "fails: ValueError: a bug of http://***@host/x"
    assert marks() == ["try"]
    told = [one.getMessage() for one in caplog.records if "Traceback" in one.getMessage()]
    assert len(told) == 1
    assert "in fails" in told[0]
    assert "http://***@host/x" in told[0]
    assert results() == []


@pytest.mark.parametrize(
    ("errors", "tries"),
    [
        (("refused", "reset"), 3),
        (("slow",) * 9, 5),
        (("bug",), 1),
        (("full",), 1),
        (("reset", "input"), 2),
        (("refused",) * 4 + ("input",), 5),
    ],
)
def test_what_passes_is_tried_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, errors: tuple[str, ...], tries: int
) -> None:
    """Four times more after the first, and not for what lasts."""
    monkeypatch.setattr("tasks.results.stage.DELAYS", [0.01] * 4)
    if len(errors) < tries:
        assert run(lambda: fails(1, errors))[0].number == 1
    else:
        with pytest.raises(DiskFull if errors == ("full",) else StageFailed):
            run(lambda: fails(1, errors))
    assert marks() == ["try"] * tries


# --- runs at once ---------------------------------------------------------------------------------


def test_two_runs_at_once_make_it_once(place: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run, lambda: slow(7)) for _ in range(2)]
        found = [future.result(300) for future in futures]
    assert marks() == ["slow 7"]
    assert sorted(states[0][1] for _, states in found) == ["Cached", "Completed"]
    assert found[0][0].file == found[1][0].file


OTHER_RUN = """
from tests.flows import test_stage
test_stage.run(lambda: test_stage.slow(7))
"""


@pytest.fixture
def other_run(place: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run in another process, which is making what `slow` makes."""
    env = os.environ | {
        "PREFECT_API_URL": str(PREFECT_API_URL.value()),
        "PREFECT_HOME": str(place / "prefect"),
        SECONDS: "600",
    }
    process = subprocess.Popen([sys.executable, "-c", OTHER_RUN], env=env)
    try:
        deadline = time.monotonic() + 600
        while marks() != ["slow 7"]:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


def test_what_a_killed_run_was_making_is_made_by_who_waits(
    place: Path, other_run: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECONDS, "0")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(run, lambda: slow(7))
        time.sleep(1.5)
        assert marks() == ["slow 7"]
        assert not waiting.done()
        other_run.send_signal(signal.SIGKILL)
        made, states = waiting.result(300)
    assert marks() == ["slow 7"] * 2
    assert states == [("slow", "Completed")]
    assert store().path(made.file).read_text() == "7"
    store().sweep()
    assert store().working() == []
    assert list((store().root / MAKING).iterdir()) == []


# --- where it runs --------------------------------------------------------------------------------


@contextmanager
def sent_to(runner: TaskRunner[Any]) -> Iterator[None]:
    with runner:
        token = RUNNER.set(runner)
        try:
            yield
        finally:
            RUNNER.reset(token)


class NoRunner(ThreadPoolTaskRunner):
    """Takes no job."""

    def submit(self, *_args: Any, **_options: Any) -> Any:
        raise AssertionError("sent to a runner")


def test_several_jobs_at_once_on_threads(place: Path) -> None:
    """They are begun together, and waited for in any order."""

    def work() -> list[Made]:
        jobs = [on_runner.submit(number) for number in range(3)]
        return [job.result() for job in reversed(jobs)]

    with sent_to(ThreadPoolTaskRunner(max_workers=3)):
        made, states = run(work)
    assert [one.number for one in made] == [2, 1, 0]
    assert states == [("on-runner", "Completed")] * 3


def test_processes(place: Path) -> None:
    """Jobs that run a model are sent there, others and what is found are not; a failure keeps its
    kind, and its line.

    The process begins while no server answers: Prefect would ask for the server's version, and exit
    without an answer.
    """

    def unanswered() -> Made:
        with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
            return on_runner.submit(1).result()

    config = resolve({"compute": {"workers": "processes", "max_workers": 1, "device": "cpu"}})
    with running(config):
        jobs = run(lambda: [unanswered(), on_runner(2), demo(5, CPU)])[0]
        assert [one.number for one in jobs] == [1, 2, 5]
        pids = {line.split()[0] for line in marks() if line != "demo 5"}
        assert len(pids) == 1
        assert pids != {str(os.getpid())}
        for kind, error, line in (
            ("input", StageFailed, "file x: record 3 has no tag; add one"),
            ("bug", StageFailed, r"raises: ValueError: a bug of http://\*\*\*@host/x"),
            ("full", DiskFull, "disk full: .*No space left on device.*; make room and run it"),
        ):
            with pytest.raises(error, match=f"^{line}"):
                run(lambda kind=kind: raises(kind))
    with sent_to(NoRunner()):
        found, states = run(lambda: [on_runner(1), on_runner(2)])
    assert [one.cached for one in found] == [True, True]
    assert states == [("on-runner", "Cached")] * 2
    assert len(results()) == 3


def test_a_killed_worker_process_is_one_line(place: Path) -> None:
    """And so is the job behind it; what was finished before is kept."""
    lines: list[str] = []

    def work() -> None:
        on_runner(1)
        jobs = [killed.submit(number) for number in range(2)]
        jobs.append(on_runner.submit(3))
        for job in jobs:
            with pytest.raises(StageFailed) as caught:
                job.result()
            lines.append(str(caught.value))

    with sent_to(ProcessPoolTaskRunner(max_workers=1)):
        run(work, wait=False)
    assert len(lines) == 3
    assert lines[0].startswith("killed: its process was lost (")
    for line in lines:
        assert line.endswith("; start the run again, what is finished is kept")
        assert "\n" not in line
    _, states = run(lambda: [on_runner(1), on_runner(3)])
    assert [name for _, name in states] == ["Cached", "Completed"]


def test_a_store_at_a_url_is_one_for_several_machines(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTA_STORE", f"memory://{place.name}/store")
    monkeypatch.setenv("MTA_STORE_CACHE", str(place / "one"))
    first, _ = run(lambda: demo(5, CPU))
    monkeypatch.setenv("MTA_STORE_CACHE", str(place / "two"))
    second, states = run(lambda: demo(5, CPU))
    assert states == [("demo", "Cached")]
    assert store().path(second.file).read_text() == "5"
    remote = store().remote
    assert remote
    with pytest.raises(StageFailed):
        run(lambda: fails(1, ("input",) * 9))
    assert remote.list(RESULTS) == [f"{RESULTS}/{demo.key(5, CPU)}"]
    # Gone there, and from a machine's cache.
    store().remove(store().root / first.file.folder)
    again, states = run(lambda: demo(5, CPU))
    assert [name for _, name in states] == ["Completed"]
    assert store().path(again.file).read_text() == "5"
