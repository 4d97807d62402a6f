"""What the decorator of a stage makes of a piece, of bad input and of any other error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Crashed, Failed, State
from prefect.utilities.annotations import quote

from tasks.errors import InputError
from tasks.stage import (
    GPU_LIMIT,
    StageFailed,
    gpu_slot,
    looked_up,
    reason,
    result_of,
    stage,
    store,
)
from tasks.store.artifacts import Store
from tasks.store.pieces import Piece, digest
from tests.unit.stages.users import result


def counted(where: Store, calls: list[int], key: str = "k") -> Task[..., Any]:
    @stage(name="demo", tags=["gpu"])
    def demo(number: int) -> Piece:
        """What it does."""

        def make(out: Path) -> dict[str, Any]:
            calls.append(number)
            (out / "file").write_text(str(number))
            return {"number": number}

        return where.get("demo", digest([key, number]), make)

    return demo


def test_made_then_cached(where: Store) -> None:
    calls: list[int] = []
    demo = counted(where, calls)
    first, second = demo.fn(5), demo.fn(number=5)
    assert calls == [5]
    assert (first.type.value, first.name) == ("COMPLETED", "Completed")
    assert first.message.startswith("made in 0.")
    assert (second.type.value, second.name) == ("COMPLETED", "Cached")
    assert second.message == f"found: demo/{digest(['k', 5])}"
    made, found = result(first), result(second)
    assert (made["cached"], found["cached"]) == (False, True)
    assert {**made, "cached": True} == found
    assert made["value"] == {"number": 5}
    assert json.loads(json.dumps(made)) == made


def test_bad_input_is_a_failed_state_with_the_line(where: Store) -> None:
    @stage(name="demo")
    def demo() -> Piece:
        raise InputError("file x: record 3 has no tag; add one")

    state = demo.fn()
    assert (state.type.value, state.name) == ("FAILED", "Failed")
    assert state.message == "file x: record 3 has no tag; add one"


def test_bad_input_inside_make_leaves_nothing(where: Store) -> None:
    @stage(name="demo")
    def demo() -> Piece:
        def make(out: Path) -> dict[str, Any]:
            (out / "half").write_text("x")
            raise InputError("no")

        return where.get("demo", digest(1), make)

    assert demo.fn().is_failed()
    assert where.find("demo", digest(1)) is None


def test_any_other_error_keeps_its_traceback(where: Store) -> None:
    @stage(name="demo")
    def demo() -> Piece:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        demo.fn()


def test_the_task_keeps_name_doc_and_options(where: Store) -> None:
    demo = counted(where, [])
    assert (demo.name, demo.description, demo.tags) == ("demo", "What it does.", {"gpu"})
    assert demo.cache_policy is NO_CACHE
    assert demo.persist_result is False


class Called:
    """Stands in for a task that is run by Prefect: gives the state it is told."""

    name = "reading"

    def __init__(self, state: State[Any]) -> None:
        self.state = state

    def submit(self, *arguments: Any) -> Called:
        assert arguments == (quote(1), quote("a"))
        return self

    def wait(self) -> None: ...


def test_result_of_a_state() -> None:
    assert result_of(Called(Completed(name="Cached", data={"x": 1})), 1, "a") == {"x": 1}  # type: ignore[arg-type]
    for state in (Failed(message="file x:\n no tag"), Crashed(message="file x: no tag")):
        with pytest.raises(StageFailed, match=r"^reading: file x: no tag$"):
            result_of(Called(state), 1, "a")  # type: ignore[arg-type]


def test_a_reason_is_one_short_line() -> None:
    assert reason(Failed(message="a\n  b"), "x") == "x: a b"
    assert reason(Failed(message="Task run encountered an exception KeyError: 1"), "x") == (
        "x: KeyError: 1"
    )
    assert len(reason(Failed(message="y" * 9999), "x")) == 503
    assert reason(Completed(name="Odd", message=None), "x") == "x: Odd"


def test_damage_is_said_in_the_log(where: Store, capsys: pytest.CaptureFixture[str]) -> None:
    demo = counted(where, calls := [])
    ref = result(demo.fn(1))["ref"]
    (where.open(ref).folder / "file").write_text("2")
    assert demo.fn(1).name == "Completed"
    assert calls == [1, 1]
    assert "file does not match its hash; this piece is made again" in capsys.readouterr().out


def test_where_the_store_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MTA_STORE", raising=False)
    assert store().root == tmp_path / ".mta" / "store"
    monkeypatch.setenv("MTA_STORE", "other/place")
    assert store().root == tmp_path / "other" / "place"


def test_work_is_not_lost_when_its_slot_cannot_be_given_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in for a server that is killed while a stage trains."""

    @contextmanager
    def gone(name: str, **_options: Any) -> Iterator[None]:
        yield
        raise ConnectionError("All connection attempts failed")

    monkeypatch.setattr("tasks.stage.concurrency", gone)
    done = []
    with gpu_slot():
        done.append("work")
    assert done == ["work"]
    assert f"the {GPU_LIMIT} slot could not be given back" in capsys.readouterr().out
    with pytest.raises(ValueError, match="its own"), gpu_slot():
        raise ValueError("its own")


def test_a_job_is_looked_up_without_making_anything(where: Store) -> None:
    """And what was seen is what the job gives that is then submitted: it does not look again."""
    looks: list[int] = []
    made: list[int] = []

    @stage(name="demo-model", uses_model=True)
    def demo(number: int) -> Piece:
        looks.append(number)

        def make(out: Path) -> dict[str, Any]:
            made.append(number)
            return {"number": number}

        return store().get("demo", digest(number), make)

    with looked_up(demo, {"number": 5}) as found:
        assert not found
        assert made == []
        # Outside of the look things are made as ever.
        assert demo.fn(5).name == "Completed"
    assert made == [5]
    looks.clear()
    # As Prefect hands on what `result_of` quotes.
    with looked_up(demo, {"number": quote(5)}) as found:
        assert found
        state = demo.fn(5)
    assert state.name == "Cached"
    assert result(state)["value"] == {"number": 5}
    assert looks == [5]
    # Another job in another context looks for itself.
    assert result(demo.fn(6))["value"] == {"number": 6}


def test_what_is_wrong_with_a_job_is_for_the_job_to_say(where: Store) -> None:
    @stage(name="demo-wrong", uses_model=True)
    def demo() -> Piece:
        raise InputError("file x: no such thing")

    with looked_up(demo, {}) as found:
        assert not found
        assert demo.fn().message == "file x: no such thing"


def test_a_damaged_piece_is_not_found_by_a_look(where: Store) -> None:
    @stage(name="demo-damaged", uses_model=True)
    def demo() -> Piece:
        def make(out: Path) -> dict[str, Any]:
            (out / "file").write_text("right")
            return {}

        return store().get("demo", digest("k"), make)

    folder = where.root / "demo" / digest("k")[:2] / digest("k")
    assert demo.fn().name == "Completed"
    (folder / "file").write_text("wrong")
    with looked_up(demo, {}) as found:
        assert not found
        assert demo.fn().name == "Completed"
    assert (folder / "file").read_text() == "right"
