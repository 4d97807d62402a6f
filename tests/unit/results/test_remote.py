"""The store at a URL: on S3 (moto) and in memory."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import fsspec
import pytest
from pydantic import ValidationError

from tasks.errors import DiskFull, InputError, StorageError
from tasks.files import file_sha256
from tasks.record import File
from tasks.results.remote import Remote
from tasks.results.store import Store
from tests.unit.results.conftest import Machine
from tests.unit.results.files import flip, make

NAMES = ["deep/file.bin", "empty", "table.txt"]


def remote(store: Store) -> Remote:
    assert store.remote
    return store.remote


def there(store: Store) -> list[str]:
    """What lies at the URL."""
    return [path for path in remote(store).list() if path != ".mta-store"]


def put(store: Store, path: str, content: bytes) -> None:
    remote(store).files.pipe_file(path, content)


def test_made_on_one_machine_found_on_another(machine: Machine, tmp_path: Path) -> None:
    made = make(machine("one"))
    assert there(machine()) == [f"{made.uri}/{name}" for name in NAMES]
    two = machine("two")
    assert not (tmp_path / "two").exists()
    place = two.path(made)
    assert place == tmp_path / "two" / "cache" / made.uri
    assert (place / "deep" / "file.bin").read_text() == "weights"
    assert (place / "empty").read_bytes() == b""
    # One file brings its folder.
    three = machine("three")
    assert three.path(File(uri=f"{made.uri}/table.txt", sha256=file_sha256(place / "table.txt")))
    assert three.intact(made)
    # The same reference as in a local store: where it lies is no part of it.
    assert make(Store(tmp_path / "local")) == made


def test_what_is_in_the_cache_costs_no_request(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = machine()
    made = make(where)

    def asked(*_given: Any) -> Any:
        raise AssertionError("asked the storage")

    monkeypatch.setattr(Remote, "_try", asked)
    assert where.intact(made)
    assert where.path(made)


def test_what_was_damaged_there_is_refused_and_made_again(machine: Machine) -> None:
    made = make(machine("one"))
    put(machine(), f"{made.uri}/table.txt", b"Rows")
    with pytest.raises(InputError, match=f"^store: {made.uri} is gone or damaged"):
        machine("two").path(made)
    assert make(machine("two")) == made
    assert machine("three").intact(made)


def test_what_is_gone_there_is_refused_and_made_again(machine: Machine) -> None:
    made = make(machine("one"))
    remote(machine()).remove(f"{made.uri}/table.txt")
    assert there(machine()) == [f"{made.uri}/{name}" for name in NAMES[:2]]
    assert not machine("two").intact(made)
    remote(machine()).remove(made.uri)
    assert there(machine()) == []
    assert not machine("two").intact(made)
    assert make(machine("two")) == made
    assert machine("three").intact(made)


def test_a_damaged_cache_is_fetched_again(machine: Machine) -> None:
    where = machine()
    made = make(where)
    flip(where.root / made.uri / "table.txt")
    (where.root / made.uri / "more").touch()
    assert (where.path(made) / "table.txt").read_text() == "rows"
    shutil.rmtree(where.root / made.uri)
    assert where.intact(made)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_upload_that_breaks_off_leaves_nothing_half(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """After so many files. It is neither here nor there, so that the next run makes it."""
    where, done = machine("one"), list[str]()
    real = remote(where).files.put_file

    def fails(source: str, target: str) -> None:
        if len(done) == after:
            raise PermissionError("no")
        done.append(target)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(remote(where).files, "put_file", fails)
        with pytest.raises(StorageError, match="writing failed"):
            make(where)
    assert where.folders() == []
    assert there(where) == done
    made = make(where)
    assert machine("two").intact(made)
    assert where.intact(made)


def test_jobs_at_once_fetch_it_once(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve threads of a machine that has nothing yet; each reads what was fetched."""
    made = make(machine("one"))
    fetched: list[str] = []
    real = Remote.download

    def download(self: Remote, uri: str, folder: Path) -> None:
        fetched.append(uri)
        time.sleep(0.1)
        real(self, uri, folder)

    monkeypatch.setattr(Remote, "download", download)
    read: list[str] = []

    def job() -> None:
        read.append((machine("two").path(made) / "deep" / "file.bin").read_text())

    threads = [threading.Thread(target=job) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert read == ["weights"] * 12
    assert fetched == [made.uri]


def test_what_is_removed_there_leaves_other_caches_at_their_next_run(machine: Machine) -> None:
    one, two = machine("one"), machine("two")
    made = [make(one, text=text) for text in "abc"]
    assert all(two.intact(file) for file in made)
    one.remove(one.root / made[0].uri)
    assert not one.intact(made[0])
    assert len(two.folders()) == 3
    two.sweep()
    assert two.folders() == sorted(two.root / file.uri for file in made[1:])
    assert not two.intact(made[0])
    # What lies at the URL alone is nothing to sweep.
    machine("three").sweep()
    assert len(there(machine())) == 6


def test_fetch_all_brings_everything(machine: Machine) -> None:
    made = [make(machine("one"), stage, stage) for stage in ("bank", "stacking")]
    two = machine("two")
    two.fetch_all()
    assert two.folders() == sorted(two.root / file.uri for file in made)


def test_a_folder_whose_name_begins_alike_is_another(machine: Machine) -> None:
    where = machine()
    for path in ("a/b", "a/c/d", "ab/e"):
        put(where, path, path.encode())
    assert remote(where).list("a") == ["a/b", "a/c/d"]
    assert remote(where).list() == ["a/b", "a/c/d", "ab/e"]
    assert remote(where).list("nothing") == []
    remote(where).remove("a")
    assert remote(where).list() == ["ab/e"]


def test_what_another_wrote_is_seen_at_once(machine: Machine) -> None:
    """No listing is remembered."""
    one, two = machine("one"), machine("two")
    for number in range(5):
        put(one, f"bank/{number}", b"x")
        assert len(remote(two).list("bank")) == number + 1
    remote(one).remove("bank/3")
    assert "bank/3" not in remote(two).list("bank")


def test_nothing_there_leads_out_of_the_cache(machine: Machine, tmp_path: Path) -> None:
    """Neither the name of a file nor the uri of a result; the rest is fetched as ever."""
    made = make(machine("one"))
    put(machine(), f"{made.uri}/../../../../../x", b"out")
    two = machine("two")
    two.fetch_all()
    assert two.intact(made)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name == "x"]
    assert files == []
    for uri in ("../x", "/x", "bank/../../x", "..", ""):
        with pytest.raises(ValidationError, match="no path below the store"):
            File(uri=uri, sha256="0" * 64)


def test_nothing_is_written_beside_the_cache(machine: Machine, tmp_path: Path) -> None:
    where = machine("one")
    where.sweep()
    make(where)
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["cache"]


READER = """
import sys
from tasks.record import File
from tasks.results.store import store
print((store().path(File(uri=sys.argv[1], sha256=sys.argv[2])) / "table.txt").read_text())
"""


def test_processes_of_one_machine_fetch_at_once(
    s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As jobs on one node of Ray do."""
    made = make(Store(tmp_path / "one", Remote(s3)))
    monkeypatch.setenv("MTA_STORE", s3)
    monkeypatch.setenv("MTA_STORE_CACHE", str(tmp_path / "two"))
    command = [sys.executable, "-c", READER, made.uri, made.sha256]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        assert [process.communicate(timeout=300)[0] for process in processes] == ["rows\n"] * 3
    finally:
        for process in processes:
            process.kill()
            process.wait()


# --- what may pass is asked again, what cannot is one line at once --------------------------------


class Flaky:
    """Fails so many times, then answers."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.times, self.asked = error, times, 0

    def __call__(self, *_given: Any, **_options: Any) -> list[str]:
        self.asked += 1
        if self.asked <= self.times:
            raise self.error
        return []


BUSY = OSError(errno.EBUSY, "Please reduce your request rate")


@pytest.mark.parametrize("error", [BUSY, TimeoutError("slow"), ConnectionResetError("reset")])
def test_what_may_pass_is_asked_again(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    where = Remote("memory://flaky")
    answers = Flaky(error, 3)
    monkeypatch.setattr(where.files, "find", answers)
    assert where.list() == []
    assert answers.asked == 4


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTA_STORE_PATIENCE", "1.5")
    where = Remote("memory://down")
    answers = Flaky(BUSY, 10**6)
    monkeypatch.setattr(where.files, "find", answers)
    before = time.monotonic()
    with pytest.raises(StorageError) as raised:
        where.list()
    assert time.monotonic() - before >= 1
    # Its pauses grow.
    assert 2 <= answers.asked < 10
    assert str(raised.value) == (
        "memory://down: listing failed ([Errno 16] Please reduce your request rate); check "
        "MTA_STORE, permissions and credentials"
    )


CANNOT = {
    "permission": (PermissionError("Access Denied"), r"\(Access Denied\); check MTA_STORE, perm"),
    "disk": (OSError(errno.ENOSPC, "No space left on device"), "disk full: .*No space left"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk full: .*quota exceeded; make"),
    "limit": (OSError(errno.EFBIG, "File too large"), "disk full or limited .*too large; make"),
    "read only": (OSError(errno.EROFS, "Read-only file system"), "disk is read-only: "),
    "bucket": (FileNotFoundError("The bucket does not exist"), "bucket does not exist.; check"),
    "ours": (TypeError("ours"), r"\(ours\)"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_pass_is_one_line_at_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    error, words = CANNOT[name]
    where = Remote("memory://refused")
    refuses = Flaky(error, 10**6)
    monkeypatch.setattr(where.files, "pipe_file", refuses)
    full = name in ("disk", "quota", "limit", "read only")
    with pytest.raises(DiskFull if full else StorageError, match=words) as raised:
        where.check()
    assert refuses.asked == 1
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("memory://refused: writing failed")
    assert raised.value.__cause__ is error  # a fault of ours keeps its traceback


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf"])
def test_patience_is_a_number(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MTA_STORE_PATIENCE", text)
    with pytest.raises(InputError, match="MTA_STORE_PATIENCE must be a number of seconds"):
        Remote("memory://x")


def test_an_unknown_kind_of_storage() -> None:
    with pytest.raises(InputError, match=r"^MTA_STORE nonsense://x: "):
        Remote("nonsense://x")


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_given: Any, **_options: Any) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(InputError, match=r"^MTA_STORE s3://b/p: .*\(pip install '\.\[s3\]'\)"):
        Remote("s3://b/p")


def test_no_such_bucket(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTA_STORE_PATIENCE", "1e6")  # who waits for it never ends
    where = Store(tmp_path, Remote("s3://no-such-bucket-here/prefix"))
    with pytest.raises(InputError, match=r"^s3://no-such-bucket-here/prefix: .*bucket"):
        where.sweep()


def test_wrong_credentials(s3: str, s3_server: str, tmp_path: Path) -> None:
    """moto checks them when it is told to."""

    def check(calls: str) -> None:
        kind = {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"{s3_server}/moto-api/reset-auth", calls.encode(), kind)
        urllib.request.urlopen(request)

    where = Store(tmp_path, Remote(s3))
    check("0")
    try:
        with pytest.raises(StorageError, match="check MTA_STORE, permissions and cred") as raised:
            where.sweep()
    finally:
        check("inf")
    assert "\n" not in str(raised.value)
    where.sweep()


def test_no_credentials(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MTA_STORE_PATIENCE", "2")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(InputError, match=r"^s3://.*credentials"):
        Store(tmp_path / "cache", Remote(s3)).sweep()


def test_a_server_that_is_down_is_waited_for(
    s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Then said; when it is back, all goes on."""
    monkeypatch.setenv("MTA_STORE_PATIENCE", "2")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        before = time.monotonic()
        with pytest.raises(StorageError, match="writing failed"):
            make(Store(tmp_path / "cache", Remote(s3)))
        assert time.monotonic() - before >= 1
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    again = Store(tmp_path / "cache", Remote(s3))
    assert there(again) == []
    assert Store(tmp_path / "other", Remote(s3)).intact(make(again))
    assert again.working() == []
