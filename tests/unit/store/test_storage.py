"""What may pass is asked again, what cannot is one line at once."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tasks.errors import InputError
from tasks.running.faults import DiskFull, disk_full
from tasks.stage import store, store_place
from tasks.store.artifacts import Store
from tasks.store.pieces import digest
from tasks.store.remote import RemoteStore
from tasks.store.storage import Storage


def put(text: str) -> Callable[[Path], dict[str, Any]]:
    def make(out: Path) -> dict[str, Any]:
        (out / "file").write_text(text)
        return {}

    return make


def test_files_of_a_folder(url: str) -> None:
    """Of two folders of which one is the beginning of the other, and nothing that is not there."""
    where = Storage(url)
    assert where.files() == []
    assert where.read("a/b") is None
    where.remove("a/b")
    for path in ("a/b", "a/c/d", "ab/e"):
        where.write(path, path.encode())
    assert where.files() == ["a/b", "a/c/d", "ab/e"]
    assert where.files("a") == ["a/b", "a/c/d"]
    assert where.read_all(["a/b", "ab/e", "gone"]) == {"a/b": b"a/b", "ab/e": b"ab/e"}
    assert where.read_all([]) == {}
    where.write("a/b", b"")
    assert where.read("a/b") == b""
    where.remove("a/b")
    assert where.files("a") == ["a/c/d"]


def test_what_another_wrote_is_seen_at_once(url: str) -> None:
    """No listing is remembered: claims live by that."""
    one, two = Storage(url), Storage(url)
    for number in range(5):
        one.write(f"claims/{number}", b"x")
        assert len(two.files("claims")) == number + 1
    one.remove("claims/3")
    assert "claims/3" not in two.files("claims")


class Flaky:
    """Fails so many times, then answers."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.times, self.asked = error, times, 0

    def __call__(self, *_given: Any, **_options: Any) -> bytes:
        self.asked += 1
        if self.asked <= self.times:
            raise self.error
        return b"answer"


BUSY = OSError(errno.EBUSY, "Please reduce your request rate")


@pytest.mark.parametrize("error", [BUSY, TimeoutError("slow"), ConnectionResetError("reset")])
def test_what_may_pass_is_asked_again(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    where = Storage("memory://flaky")
    answers = Flaky(error, 3)
    monkeypatch.setattr(where.fs, "cat_file", answers)
    assert where.read("x") == b"answer"
    assert answers.asked == 4


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTA_STORE_PATIENCE", "1.5")
    where = Storage("memory://down")
    answers = Flaky(BUSY, 10**6)
    monkeypatch.setattr(where.fs, "cat_file", answers)
    before = time.monotonic()
    with pytest.raises(InputError) as raised:
        where.read("x")
    assert 1 <= time.monotonic() - before < 10
    assert answers.asked >= 2
    assert str(raised.value) == (
        "memory://down: reading failed: no answer for 1.5 s ([Errno 16] Please reduce your request "
        "rate); start again when it is back"
    )


CANNOT = {
    "permission": (PermissionError("Access Denied"), "Access Denied; check MTA_STORE, permissions"),
    "disk": (OSError(errno.ENOSPC, "No space left on device"), "disk full: .*No space left"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk full: .*quota exceeded; make"),
    "limit": (OSError(errno.EFBIG, "File too large"), "disk full or limited .*too large; make"),
    "read only": (OSError(errno.EROFS, "Read-only file system"), "disk is read-only: "),
    "bucket": (FileNotFoundError("The bucket does not exist"), "no such bucket or folder"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_pass_is_one_line_at_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    error, words = CANNOT[name]
    where = Storage("memory://refused")
    refuses = Flaky(error, 10**6)
    monkeypatch.setattr(where.fs, "pipe_file", refuses)
    full = name in ("disk", "quota", "limit", "read only")
    with pytest.raises(DiskFull if full else InputError, match=words) as raised:
        where.write("x", b"")
    assert refuses.asked == 1
    assert "\n" not in str(raised.value)


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    where = Storage("memory://fault")
    monkeypatch.setattr(where.fs, "pipe_file", Flaky(TypeError("ours"), 1))
    with pytest.raises(TypeError, match="ours"):
        where.write("x", b"")


def test_what_a_library_wraps_is_the_storages(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of fsspec's behind another is one line; one that is hidden says nothing of it."""
    where = Storage("memory://wrapped")
    outer = RuntimeError("cannot be read")
    outer.__context__ = fsspec.exceptions.FSTimeoutError("slow")
    monkeypatch.setattr(where.fs, "pipe_file", Flaky(outer, 10**6))
    with pytest.raises(InputError, match=r"^memory://wrapped: writing failed: cannot be read"):
        where.write("x", b"")
    outer.__suppress_context__ = True
    with pytest.raises(RuntimeError, match="cannot be read"):
        where.write("x", b"")


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf"])
def test_patience_is_a_number(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MTA_STORE_PATIENCE", text)
    with pytest.raises(InputError, match="MTA_STORE_PATIENCE must be a number of seconds"):
        Storage("memory://x")


def test_no_such_bucket(s3: str, tmp_path: Path) -> None:
    where = RemoteStore(Storage("s3://no-such-bucket-here/prefix"), tmp_path)
    before = time.monotonic()
    with pytest.raises(InputError, match=r"^s3://no-such-bucket-here/prefix: .*no such bucket"):
        where.sweep()
    assert time.monotonic() - before < 20


def test_wrong_credentials(
    s3: str, s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """moto checks them when it is told to."""
    import urllib.request

    def check(calls: str) -> None:
        kind = {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"{s3_server}/moto-api/reset-auth", calls.encode(), kind)
        urllib.request.urlopen(request)

    where = RemoteStore(Storage(s3), tmp_path)
    check("0")
    try:
        with pytest.raises(InputError, match=r"credentials \(for S3: AWS_") as raised:
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
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(InputError, match=r"^s3://.*credentials"):
        RemoteStore(Storage(s3), tmp_path / "cache").sweep()


def test_a_server_that_is_down_is_waited_for(
    s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Then said, and what was made meanwhile is uploaded when it is back."""
    monkeypatch.setenv("MTA_STORE_PATIENCE", "2")
    where = RemoteStore(Storage(s3), tmp_path / "cache")

    def goes_down(out: Path) -> dict[str, Any]:
        with monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            where.storage = Storage(s3)
            with pytest.raises(InputError, match="no answer for 2 s"):
                where.storage.files()
        return put("weights")(out)

    with pytest.raises(InputError, match="no answer for 2 s"):
        where.get("bank", digest("x"), goes_down)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    again = RemoteStore(Storage(s3), tmp_path / "cache")
    assert again.storage.files("bank") == []
    again.sweep()
    assert len(again.storage.files("bank")) == 2
    assert again.working() == []


def test_an_unknown_kind_of_storage() -> None:
    with pytest.raises(InputError, match=r"^MTA_STORE nonsense://x: "):
        Storage("nonsense://x")


def test_a_full_disk_below_the_store_leaves_nothing(tmp_path: Path) -> None:
    def full(_out: Path) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, "No space left on device")

    def says(_out: Path) -> dict[str, Any]:  # as safetensors does
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    for make in (full, says):
        with pytest.raises((OSError, RuntimeError)) as raised:
            Store(tmp_path).get("bank", digest("x"), make)
        assert disk_full(raised.value)
    assert Store(tmp_path).working() == []


def test_mta_store_names_a_folder_or_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MTA_STORE", "memory://here")
    remote = store()
    assert isinstance(remote, RemoteStore)
    assert remote.root == tmp_path / ".mta" / "cache"
    monkeypatch.setenv("MTA_STORE_CACHE", str(tmp_path / "fast"))
    assert store().root == tmp_path / "fast"
    monkeypatch.setenv("MTA_STORE", "a/folder")
    assert type(store()) is Store


@pytest.mark.parametrize("protocol", ["file", "local"])
def test_a_file_url_is_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    """The plain store, in which a piece is renamed into place; not fsspec, which writes there."""
    monkeypatch.setenv("MTA_STORE", f"{protocol}://{tmp_path}/a b")
    assert type(store()) is Store
    assert store().root == tmp_path / "a b"
    assert store_place() == str(tmp_path / "a b")
    piece = store().get("bank", digest("x"), put("weights"))
    assert Store(tmp_path / "a b").open(piece.ref).cached


@pytest.mark.parametrize("place", ["file://a/b", "file://host/b", "local://", "file://~/b"])
def test_a_file_url_names_a_whole_path(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv("MTA_STORE", place)
    with pytest.raises(InputError, match=f"^MTA_STORE {place}: write a whole path"):
        store()
