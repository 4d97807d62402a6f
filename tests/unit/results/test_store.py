"""The store: whole or not at all, verified when it is read; what killed processes left goes."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.errors import InputError, disk_full
from tasks.files import PARTIAL, sha256_of, write_atomic
from tasks.record import File
from tasks.results.store import MAKING, STALE_SECONDS, Store, store, store_place
from tests.unit.results.files import flip, make


def test_what_is_stored_is_found_by_its_content(where: Store) -> None:
    folder = make(where)
    content = sha256_of(where.root / folder.uri)
    assert folder == File(uri=f"bank/{content[:2]}/{content}", sha256=content)
    assert (where.path(folder) / "deep" / "file.bin").read_text() == "weights"
    assert where.folders() == where.folders("bank") == [where.root / folder.uri]
    assert where.folders("fusion") == []
    assert make(where) == folder
    other = make(where, text="Weights")
    assert (other.uri == folder.uri, make(where, "fusion").sha256) == (False, folder.sha256)
    # Nothing is left of the work, nor of the second making.
    assert list((where.root / MAKING).iterdir()) == []
    assert where.working() == []


def test_files_and_folders_in_what_is_stored(where: Store) -> None:
    with where.new("bank") as folder:
        (folder.path / "deep").mkdir()
        (folder.path / "deep" / "file.bin").write_text("weights")
        with pytest.raises(RuntimeError, match="not stored yet"):
            folder.file("deep/file.bin")
    assert folder.path == where.root / folder.uri
    whole, deep, file = folder.file(), folder.file("deep"), folder.file("deep/file.bin")
    assert (deep.uri, file.uri) == (f"{whole.uri}/deep", f"{whole.uri}/deep/file.bin")
    # `printf weights | sha256sum`
    assert file.sha256 == "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    assert where.path(file).read_text() == "weights"
    assert where.path(deep) == where.path(whole) / "deep"
    assert {one.folder for one in (whole, deep, file)} == {whole.uri}
    with pytest.raises(FileNotFoundError):
        folder.file("other.bin")


def test_a_folders_hash_is_of_names_and_bytes(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "x").write_text("1")
        (tmp_path / name / "y").write_text("2")
    first = sha256_of(tmp_path / "a")
    assert sha256_of(tmp_path / "b") == first
    (tmp_path / "b" / "y").rename(tmp_path / "b" / "z")
    (tmp_path / "c" / "y").write_text("2 ")
    (tmp_path / "d" / ".hidden").touch()
    assert len({sha256_of(tmp_path / name) for name in "abcd"}) == 4


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_exception_leaves_nothing(where: Store, error: BaseException) -> None:
    def work() -> None:
        with where.new("bank") as folder:
            (folder.path / "half").write_text("half")
            raise error

    with pytest.raises(type(error)):
        work()
    assert [path for path in where.root.rglob("*") if not path.is_dir()] == []
    assert list((where.root / MAKING).iterdir()) == []
    assert where.working() == []


def test_a_full_disk_leaves_nothing(where: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the folder is filled, or when it is put into its place."""

    def full(_path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tasks.results.store.fsync", full)
    with pytest.raises(OSError, match="No space left") as raised:
        make(where)
    assert disk_full(raised.value)
    assert where.folders() == []
    assert list((where.root / MAKING).iterdir()) == []


def test_two_makers_of_the_same_content(where: Store) -> None:
    both_in = threading.Barrier(2, timeout=300)
    made: list[File] = []

    def work() -> None:
        with where.new("bank") as folder:
            (folder.path / "file").write_text("weights")
            both_in.wait()
        made.append(folder.file())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert len(made) == 2
    assert made[0] == made[1]
    assert len(where.folders()) == 1
    assert where.intact(made[0])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one byte": lambda folder: flip(folder / "deep" / "file.bin"),
    "a file is gone": lambda folder: (folder / "table.txt").unlink(),
    "a file is cut": lambda folder: (folder / "table.txt").write_text("row"),
    "a file more": lambda folder: (folder / "more.txt").touch(),
    "a file has another name": lambda f: (f / "table.txt").rename(f / "tables.txt"),
    "all is gone": lambda folder: shutil.rmtree(folder),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_and_mended(where: Store, name: str) -> None:
    folder = make(where)
    DAMAGES[name](where.root / folder.uri)
    assert not where.intact(folder)
    with pytest.raises(InputError) as raised:
        where.path(folder)
    assert str(raised.value) == (
        f"store: {folder.uri} is gone or damaged since it was made; start the run again"
    )
    assert make(where) == folder
    assert where.intact(folder)
    assert (where.path(folder) / "deep" / "file.bin").read_text() == "weights"


def test_damage_of_one_file_is_not_of_the_others(where: Store) -> None:
    with where.new("bank") as folder:
        (folder.path / "a").write_text("a")
        (folder.path / "b").write_text("b")
    flip(where.root / folder.file("a").uri)
    assert where.intact(File(uri=f"{folder.file().uri}/b", sha256=folder.file("b").sha256))
    with pytest.raises(InputError, match="/a is gone or damaged"):
        where.path(File(uri=f"{folder.file().uri}/a", sha256=sha256_of(where.root / MAKING)))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EACCES])
def test_what_cannot_be_read_just_now_is_not_damaged(
    where: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Too many open files, a hiccup of the file system: the error is raised, the folder stays."""
    folder = make(where)

    def fails(_path: Path) -> str:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("tasks.results.store.sha256_of", fails)
        for call in (where.path, where.intact):
            with pytest.raises(OSError, match=os.strerror(number)):
                call(folder)
    assert where.intact(folder)


def test_a_file_is_hashed_once_until_it_changes(
    where: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What decides is its size and times; and a damaged file is noticed like any other."""
    with where.new("bank") as folder:
        (folder.path / "large").write_bytes(bytes(10))
    file = folder.file("large")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", None)
        for _ in range(3):
            assert where.intact(file)
    place = where.path(file)
    place.write_bytes(bytes(9) + b"x")
    os.utime(place, ns=(1, 1))
    assert not where.intact(file)


def test_a_removed_folder_is_gone(where: Store) -> None:
    folder, other = make(where), make(where, text="other")
    where.remove(where.root / folder.uri)
    assert not where.intact(folder)
    assert where.folders() == [where.root / other.uri]


# --- what killed processes left -------------------------------------------------------------------

MAKER = """
import os, signal, sys, time
from tasks.results.store import store
with store().new("bank") as folder:
    (folder.path / "half").write_text("x")
    print(folder.path, flush=True)
    if sys.argv[1] == "wait":
        sys.stdin.readline()
    else:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def maker(how: str) -> subprocess.Popen[str]:
    """A process that makes something in the store: it is killed there, or waits to be told."""
    command = [sys.executable, "-c", MAKER, how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)


def test_sweep_takes_what_killed_processes_left_and_nothing_else(where: Store) -> None:
    """Seen before it: the work of a process that lives, here or in another process, is under
    way; of a killed one nothing is."""
    done = make(where)
    living, killed = maker("wait"), maker("die")
    assert living.stdout
    assert killed.wait(300) == -signal.SIGKILL
    theirs = Path(living.stdout.readline().strip())
    try:
        with where.new("bank") as own:
            (own.path / "half").write_text("x")
            folders = {path for path in (where.root / MAKING).iterdir() if path.is_dir()}
            assert len(folders) == 3
            assert {lock.with_suffix("") for lock in where.working()} == {own.path, theirs}
            two_days_ago = time.time() - 2 * 86_400
            for path in (own.path, theirs, where.root / done.uri):
                os.utime(path, (two_days_ago,) * 2)
            where.sweep()
            assert {path for path in folders if path.exists()} == {own.path, theirs}
            assert len(list((where.root / MAKING).glob("*.lock"))) == 2
        where.path(own.file())
        out, _ = living.communicate("go on\n", timeout=300)
    finally:
        living.kill()
        living.wait()
    assert living.returncode == 0, out
    assert list((where.root / MAKING).iterdir()) == []
    assert where.intact(done)
    assert len(where.folders()) == 2  # both wrote the same


def test_sweep_takes_old_half_written_files_of_its_own(where: Store) -> None:
    """Beside the store too; nothing of another program, however near it lies."""
    made = [
        where.root / "memo" / f"{PARTIAL}old",
        where.state / "checkpoints" / "stacking" / f"{PARTIAL}old",
        where.state / "runs" / f"{PARTIAL}old",
        where.state / "reports" / f"{PARTIAL}old",
    ]
    kept = [
        where.root / "memo" / f"{PARTIAL}fresh",
        where.root / "memo" / "whole.json",
        where.state / "another-program" / f"{PARTIAL}old",
    ]
    for path in (*made, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if path.name != f"{PARTIAL}fresh":
            os.utime(path, (time.time() - STALE_SECONDS - 60,) * 2)
    where.sweep()
    assert [path for path in made if path.exists()] == []
    assert [path for path in kept if path.exists()] == kept


# --- files that are written whole -----------------------------------------------------------------


def test_a_file_is_written_whole_or_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    write_atomic(file, b"first")

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_atomic(file, b"second")
    assert file.read_bytes() == b"first"
    write_atomic(file, b"second")
    assert file.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [file]


# --- where it is ----------------------------------------------------------------------------------


def test_where_the_store_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MTA_STORE", raising=False)
    assert store().root == tmp_path / ".mta" / "store"
    assert store().state == tmp_path / ".mta"
    monkeypatch.setenv("MTA_STORE", "other/place")
    assert store().root == tmp_path / "other" / "place"
    assert store_place() == str(tmp_path / "other" / "place")
    assert store().remote is None


def test_a_url_has_a_cache_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MTA_STORE_CACHE", raising=False)
    monkeypatch.setenv("MTA_STORE", "memory://here")
    remote = store()
    assert remote.remote
    assert (remote.remote.url, store_place()) == ("memory://here", "memory://here")
    # Runs and reports lie beside it: docs/storage.md.
    assert (remote.root, remote.state) == (tmp_path / ".mta" / "cache", tmp_path / ".mta")
    monkeypatch.setenv("MTA_STORE_CACHE", str(tmp_path / "fast"))
    assert store().root == tmp_path / "fast"


@pytest.mark.parametrize("protocol", ["file", "local"])
def test_a_file_url_is_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    """The plain store, in which a folder is renamed into place; not fsspec, which writes there."""
    monkeypatch.setenv("MTA_STORE", f"{protocol}://{tmp_path}/a b")
    assert store().remote is None
    assert store().root == tmp_path / "a b"
    assert store_place() == str(tmp_path / "a b")
    assert Store(tmp_path / "a b").intact(make(store()))


@pytest.mark.parametrize("place", ["file://a/b", "file://host/b", "local://", "file://~/b"])
def test_a_file_url_names_a_whole_path(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv("MTA_STORE", place)
    with pytest.raises(InputError, match=f"^MTA_STORE {place}: write a whole path"):
        store()
