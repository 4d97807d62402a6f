"""The store at a URL: on S3 (moto) and in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import InputError
from tasks.store.artifacts import Store
from tasks.store.pieces import RECORD, Ref, digest
from tasks.store.remote import RemoteStore, _inside
from tasks.store.storage import Storage
from tests.unit.store.conftest import Machine

KEY = digest("some work")


def write(text: str = "weights", **value: Any) -> Callable[[Path], dict[str, Any]]:
    def make(out: Path) -> dict[str, Any]:
        (out / "deep").mkdir()
        (out / "deep" / "file.bin").write_text(text)
        (out / "again.txt").write_text("rows")
        (out / "empty").touch()
        return {"answer": 42, **value}

    return make


def never(_out: Path) -> dict[str, Any]:
    raise AssertionError("made although it is there")


def stored(where: RemoteStore) -> list[str]:
    return [path for path in where.storage.files() if path != ".mta-store"]


def test_made_on_one_machine_found_on_another(machine: Machine, tmp_path: Path) -> None:
    made = machine("one").get("bank", KEY, write())
    assert not made.cached
    there = machine("two").get("bank", KEY, never)
    assert there.cached
    assert (there.ref, there.value, there.notes) == (made.ref, made.value, made.notes)
    assert there.folder == tmp_path / "two" / "cache" / "bank" / KEY[:2] / KEY
    assert (there.folder / "deep" / "file.bin").read_text() == "weights"
    assert (there.folder / "empty").read_bytes() == b""
    # The same reference as in a local store: where it lies is no part of it.
    assert Store(tmp_path / "local").get("bank", KEY, write()).ref == made.ref
    assert machine("three").open(made.ref).ref == made.ref
    # The record, and three files under their hashes. No claims are left.
    names = {path.rsplit("/", 1)[1] for path in stored(machine())}
    assert len(stored(machine())) == 4
    record = json.loads((made.folder / RECORD).read_text())
    assert names == {RECORD, *record["files"].values()}


def test_what_is_in_the_cache_costs_no_request(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = machine()
    ref = where.get("bank", KEY, write()).ref

    def asked(*_given: Any) -> Any:
        raise AssertionError("asked the storage")

    monkeypatch.setattr(Storage, "_try", asked)
    assert where.get("bank", KEY, never).ref == ref
    assert where.open(ref).ref == ref


def test_rows_are_found_wherever_they_were_made(machine: Machine, warnings: list[str]) -> None:
    a = machine("one").get("stacking", digest("a"), write(rows=["r1", "r2"]))
    b = machine("two").get("stacking", digest("b"), write(text="b", rows=["r3", "r4"]))
    machine("one").get("stacking2", digest("c"), write(rows=["r9"]))
    where = machine("three")
    found = where.find_rows("stacking", ["r2", "r3", "r9", "unknown"])
    assert {row: (piece.ref, number) for row, (piece, number) in found.items()} == {
        "r2": (a.ref, 1),
        "r3": (b.ref, 0),
    }
    assert (found["r3"][0].folder / "deep" / "file.bin").read_text() == "b"
    # A piece without a wanted row is known by its record alone.
    fourth = machine("four")
    assert set(fourth.find_rows("stacking", ["r4"])) == {"r4"}
    assert not fourth._place("stacking", digest("a")).exists()
    assert warnings == []
    assert where.find_rows("nothing yet", ["r1"]) == {}


def test_records_are_fetched_once(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        machine("one").get("stacking", digest(name), write(rows=[f"r-{name}"]))
    asked: list[str] = []
    real = Storage.read_all

    def counted(storage: Storage, paths: list[str]) -> dict[str, bytes]:
        asked.extend(paths)
        return real(storage, paths)

    monkeypatch.setattr(Storage, "read_all", counted)
    where = machine("two")
    for _ in range(3):
        assert where.find_rows("stacking", ["nobody"]) == {}
    assert sorted(asked) == sorted(
        f"stacking/{key[:2]}/{key}/{RECORD}" for key in (digest("a"), digest("b"))
    )


DAMAGES: dict[str, tuple[Callable[[RemoteStore, str, str], None], str]] = {
    "a file is gone": (lambda w, _r, file: w.storage.remove(file), "again.txt is missing"),
    "a file is another": (
        lambda w, _r, file: w.storage.write(file, b"Rows"),
        "again.txt does not match its hash",
    ),
    "cut record": (
        lambda w, record, _f: w.storage.write(record, (w.storage.read(record) or b"")[:-30]),
        "record.json cannot be understood",
    ),
    "record leads out": (
        lambda w, record, _f: w.storage.write(record, b'{"files": {"../../x": "00"}}'),
        "record.json cannot be understood",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_was_damaged_there_is_made_again(
    machine: Machine, warnings: list[str], tmp_path: Path, name: str
) -> None:
    first = machine("one").get("bank", KEY, write())
    sha = json.loads((first.folder / RECORD).read_text())["files"]["again.txt"]
    place = f"bank/{KEY[:2]}/{KEY}"
    damage, words = DAMAGES[name]
    damage(machine(), f"{place}/{RECORD}", f"{place}/{sha}")
    again = machine("two").get("bank", KEY, write())
    assert not again.cached
    assert again.ref == first.ref
    assert len(warnings) == 1
    assert f"bank/{KEY[:12]}: {words}" in warnings[0]
    assert machine("three").get("bank", KEY, never).ref == first.ref
    assert not (tmp_path / "two" / "x").exists()


@pytest.mark.parametrize("name", DAMAGES)
def test_what_another_machine_made_again_there_is_not_removed(
    machine: Machine, warnings: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Between the look at the damaged one and its removal."""
    first = machine("one").get("bank", KEY, write())
    sha = json.loads((first.folder / RECORD).read_text())["files"]["again.txt"]
    place = f"bank/{KEY[:2]}/{KEY}"
    DAMAGES[name][0](machine(), f"{place}/{RECORD}", f"{place}/{sha}")
    real, looks = RemoteStore._download, []

    def look(where: RemoteStore, *given: Any) -> str | None:
        looks.append(given)
        problem = real(where, *given)
        if len(looks) == 1:
            # A piece differs from one making to the next by its seconds.
            machine("two").get("bank", KEY, write(notes={"seconds": -1.0}))
            assert len(warnings) == 1
        return problem

    monkeypatch.setattr(RemoteStore, "_download", look)
    found = machine("three").get("bank", KEY, never)
    assert (found.ref, found.notes["seconds"]) == (first.ref, -1.0)
    assert len(warnings) == 1
    assert machine("four").get("bank", KEY, never).notes["seconds"] == -1.0


def test_a_damaged_cache_is_fetched_again(machine: Machine, warnings: list[str]) -> None:
    first = machine().get("bank", KEY, write())
    (first.folder / "again.txt").write_text("Rows")
    assert machine().get("bank", KEY, never).ref == first.ref
    assert len(warnings) == 1
    assert (first.folder / "again.txt").read_text() == "rows"


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_upload_that_breaks_off_leaves_nothing_half(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """After so many files. Others see nothing; the next run here uploads it and makes nothing."""
    real, really, done = Storage.upload, Storage.write, []

    def fails(storage: Storage, file: Path, path: str) -> None:
        if len(done) == after:
            raise InputError("no answer")
        done.append(path)
        real(storage, file, path)

    def no_record(storage: Storage, path: str, content: bytes) -> None:
        if path.endswith(RECORD):
            raise InputError("no answer")
        really(storage, path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "upload", fails)
        patch.setattr(Storage, "write", no_record)
        with pytest.raises(InputError, match="no answer"):
            machine("one").get("bank", KEY, write())
    assert machine("two").find("bank", KEY) is None
    # Either by the sweep at the start of a run, or by whoever finds it.
    where = machine("one")
    if after:
        where.sweep()
    else:
        assert where.get("bank", KEY, never).cached
    assert machine("two").get("bank", KEY, never).cached
    assert where._marked() == []


def test_what_is_removed_there_leaves_other_caches_at_their_next_run(machine: Machine) -> None:
    one, two = machine("one"), machine("two")
    for name in "abc":
        one.get("stacking", digest(name), write(text=name, rows=[f"r-{name}"]))
    two.find("stacking", digest("a"))
    two.find_rows("stacking", ["nobody"])
    assert len(list(two.root.rglob("*.json"))) == 3
    for name in "ab":
        one.remove("stacking", digest(name))
    assert one.find("stacking", digest("a")) is None
    two.sweep()
    assert two.find("stacking", digest("a")) is None
    assert [path.stem for path in two.root.rglob("*.json")] == [digest("c")]
    assert two.find_rows("stacking", ["r-a", "r-b", "r-c"]).keys() == {"r-c"}


def test_what_a_run_here_uploads_meanwhile_stays_in_the_cache(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made after the sweep began, in the storage only after that was listed."""
    where, run = machine("one"), machine("one")
    here, there = where._here, where._there

    def makes_first() -> list[tuple[str, str]]:
        with monkeypatch.context() as patch:
            patch.setattr(run, "_upload", lambda _stage, _key: False)
            run.get("bank", KEY, write())
        return here()

    def uploads_then() -> set[tuple[str, str]]:
        listed = there()
        run._upload("bank", KEY)
        return listed

    monkeypatch.setattr(where, "_here", makes_first)
    monkeypatch.setattr(where, "_there", uploads_then)
    where.sweep()
    assert run._place("bank", KEY).exists()
    assert run._marked() == []
    assert machine("two").get("bank", KEY, never).cached


def test_fetch_all_brings_everything_and_removes_halves(machine: Machine) -> None:
    one = machine("one")
    one.get("bank", KEY, write())
    one.get("score", digest("b"), write(text="b"))
    one.storage.write(f"bank/ab/{'ab' * 32}/{'00' * 32}", b"half")
    two = machine("two")
    two.fetch_all()
    assert sorted(two._here()) == [("bank", KEY), ("score", digest("b"))]
    assert not [path for path in two.storage.files() if "/ab/" in path]


def test_two_uploads_of_one_piece_do_not_mix(machine: Machine) -> None:
    """As when a claim was thought dead: another machine's piece is there when ours is done."""
    one, two = machine("one"), machine("two")

    def make(out: Path) -> dict[str, Any]:
        two.make("bank", KEY, write(text="theirs"))
        return write(text="ours")(out)

    got = one.get("bank", KEY, make)
    assert (got.folder / "deep" / "file.bin").read_text() == "theirs"
    assert machine("three").open(got.ref).ref == got.ref
    assert one._marked() == []


def test_ours_stands_where_theirs_is_broken(machine: Machine, warnings: list[str]) -> None:
    one = machine("one")

    def make(out: Path) -> dict[str, Any]:
        one.storage.write(f"bank/{KEY[:2]}/{KEY}/{RECORD}", b"{")
        return write(text="ours")(out)

    got = one.get("bank", KEY, make)
    assert (got.folder / "deep" / "file.bin").read_text() == "ours"
    assert machine("two").open(got.ref).ref == got.ref
    assert len(warnings) == 1


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", ".", RECORD])
def test_a_name_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        _inside(tmp_path, name)


def test_what_is_being_made_is_told_by_where_it_lies(machine: Machine, tmp_path: Path) -> None:
    """A claim at the URL, an unfinished piece in the cache."""
    where = machine("one")
    claim = "other-host~1~1~x"
    where.storage.write(f".claims/bank/{claim}", b'{"names": ["x"], "beat": 0}')
    half = tmp_path / "one" / "cache" / "bank" / "ab" / ".making-other-host~1~1~x"
    half.mkdir(parents=True)
    assert where.working() == [f"{where.storage.url}/.claims/bank/{claim}", str(half)]


MAKER = """
import sys, time
from pathlib import Path
from tasks.store.pieces import digest
from tasks.store.remote import RemoteStore
from tasks.store.storage import Storage
url, cache, mark, seconds = sys.argv[1:]
where = RemoteStore(Storage(url), Path(cache))
def make(out):
    with open(mark, "a") as file:
        file.write("made\\n")
    time.sleep(float(seconds))
    (out / "file").write_text("weights")
    return {}
print(where.get("bank", digest("some work"), make).ref["sha256"])
"""


def test_two_processes_share_work_over_s3(s3: str, tmp_path: Path) -> None:
    """With a cache each; the first is killed in the middle of it, and the other makes it."""
    mark = tmp_path / "mark"

    def start(name: str, seconds: float) -> subprocess.Popen[str]:
        given = [s3, str(tmp_path / name), str(mark), str(seconds)]
        return subprocess.Popen(
            [sys.executable, "-c", MAKER, *given], stdout=subprocess.PIPE, text=True
        )

    first = start("one", 600)
    deadline = time.monotonic() + 60
    while not mark.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    second, third = start("two", 1), start("three", 1)
    try:
        time.sleep(4)
        assert mark.read_text() == "made\n"
        first.kill()
        said = {process.communicate(timeout=60)[0] for process in (second, third)}
    finally:
        for process in (first, second, third):
            process.kill()
            process.wait()
    assert mark.read_text() == "made\n" * 2
    assert len(said) == 1
    found = RemoteStore(Storage(s3), tmp_path / "four").find("bank", KEY)
    assert found is not None
    assert found.ref["sha256"] == said.pop().strip()


def test_a_reference_to_what_is_gone(machine: Machine) -> None:
    with pytest.raises(InputError, match="gone or damaged"):
        machine().open(Ref(uri=f"bank/{KEY}", sha256="0" * 64, kind="bank"))


def test_nothing_is_written_beside_the_cache(machine: Machine, tmp_path: Path) -> None:
    where = machine("one")
    where.sweep()
    where.get("bank", KEY, write())
    assert os.listdir(tmp_path / "one") == ["cache"]
