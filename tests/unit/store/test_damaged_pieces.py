"""The store: what is damaged, gone or changed meanwhile is noticed, and mended or refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import InputError
from tasks.store import artifacts
from tasks.store import pieces as pieces_module
from tasks.store.artifacts import Store
from tasks.store.files import file_sha256
from tasks.store.pieces import RECORD, Piece, Ref, digest, verified
from tests.unit.store.pieces_case import KEY, flip, never, write


def edit_value(folder: Path) -> None:
    record = json.loads((folder / RECORD).read_text())
    record["value"]["answer"] = 43
    (folder / RECORD).write_text(json.dumps(record))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "one byte": (lambda f: flip(f / "deep" / "file.bin"), "deep/file.bin does not match its hash"),
    "a file": (lambda f: (f / "table.txt").unlink(), "table.txt is missing"),
    "cut record": (
        lambda f: (f / RECORD).write_text((f / RECORD).read_text()[:-30]),
        "record.json cannot be understood",
    ),
    "empty record": (lambda f: (f / RECORD).write_text(""), "record.json cannot be understood"),
    "no record": (lambda f: (f / RECORD).unlink(), "record.json is missing"),
    "not text": (
        lambda f: (f / RECORD).write_bytes(b"\xff\xfe"),
        "record.json cannot be understood",
    ),
    "other json": (lambda f: (f / RECORD).write_text("[]"), "record.json cannot be understood"),
    "the value": (edit_value, "record.json does not match its hash"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_said_and_mended(pieces: Store, warnings: list[str], name: str) -> None:
    damage, words = DAMAGES[name]
    first = pieces.get("bank", KEY, write())
    damage(first.folder)
    again = pieces.get("bank", KEY, write())
    assert not again.cached
    assert again.ref == first.ref
    assert warnings == [f"store: bank/{KEY[:12]}: {words}; this piece is made again"]
    assert pieces.get("bank", KEY, never).cached
    assert len(warnings) == 1


@pytest.mark.parametrize("name", DAMAGES)
def test_a_piece_made_again_by_another_is_not_removed(
    pieces: Store, warnings: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Between the look at the damaged one and its removal: what stands in its place stays."""
    first = pieces.get("bank", KEY, write())
    DAMAGES[name][0](first.folder)
    records: list[os.stat_result] = []

    def look(folder: Path) -> Any:
        seen = verified(folder)
        if not records:
            shutil.rmtree(folder)
            Store(pieces.root).make("bank", KEY, write())
            records.append((folder / RECORD).stat())
        return seen

    monkeypatch.setattr(artifacts, "verified", look)
    found = pieces.get("bank", KEY, never)
    assert found.ref == first.ref
    assert (found.folder / RECORD).stat().st_ino == records[0].st_ino
    assert warnings == []
    assert list(pieces.root.glob("*/*/.making-*")) == []


@pytest.mark.parametrize("name", DAMAGES)
def test_open_refuses_what_is_damaged(pieces: Store, name: str) -> None:
    ref = pieces.get("bank", KEY, write()).ref
    DAMAGES[name][0](pieces.root / "bank" / KEY[:2] / KEY)
    with pytest.raises(InputError, match=f"bank/{KEY} is gone or damaged"):
        pieces.open(ref)


def test_open_refuses_what_is_gone_or_another(pieces: Store) -> None:
    ref = pieces.get("bank", KEY, write()).ref
    with pytest.raises(InputError, match="gone or damaged"):
        pieces.open(Ref(uri=f"bank/{digest(3)}", sha256=ref["sha256"], kind="bank"))
    pieces.make("bank", digest(4), write(text="other"))
    with pytest.raises(InputError, match="gone or damaged"):
        pieces.open(Ref(uri=f"bank/{digest(4)}", sha256=ref["sha256"], kind="bank"))


def _damaged(used: Piece) -> None:
    flip(used.folder / "table.txt")


def _removed(used: Piece) -> None:
    shutil.rmtree(used.folder)


def _noticed_by_another_and_made_again(used: Piece) -> None:
    flip(used.folder / "table.txt")
    other = Store(used.folder.parents[2])
    assert other.get("prepare", digest("users"), write()).ref == used.ref


@pytest.mark.parametrize("change", [_damaged, _removed, _noticed_by_another_and_made_again])
def test_nothing_is_made_of_what_changed_while_it_was_read(
    pieces: Store, change: Callable[[Piece], None]
) -> None:
    """Verified when it was opened, and another by the time its files were read."""
    ref = pieces.get("prepare", digest("users"), write()).ref

    def make(out: Path) -> dict[str, Any]:
        used = pieces.open(ref)
        change(used)
        return write()(out)

    with pytest.raises(
        InputError, match=r"prepare/\w{12} was damaged or removed while it was read"
    ):
        pieces.get("bank", KEY, make)
    assert pieces.find("bank", KEY) is None
    assert pieces.working() == []
    Store(pieces.root).get("prepare", digest("users"), write())
    # A job of its own: what an earlier one found is nothing to it.
    assert not Store(pieces.root).get("bank", KEY, write()).cached


def test_what_was_removed_on_purpose_is_not_missed(pieces: Store) -> None:
    pieces.get("prepare", digest("users"), write())
    assert pieces.find("prepare", digest("users"))
    pieces.remove("prepare", digest("users"))
    assert not pieces.get("bank", KEY, write()).cached


def test_the_other_makers_damaged_piece_is_replaced(pieces: Store, warnings: list[str]) -> None:
    def make(out: Path) -> dict[str, Any]:
        other = Store(pieces.root).make("bank", KEY, write())
        flip(other.folder / "table.txt")
        return write()(out)

    piece = pieces.get("bank", KEY, make)
    assert (piece.folder / "table.txt").read_text() == "rows"
    assert len(warnings) == 1
    assert pieces.get("bank", KEY, never).cached


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EACCES])
def test_what_cannot_be_read_just_now_is_not_damaged(
    pieces: Store, monkeypatch: pytest.MonkeyPatch, warnings: list[str], number: int
) -> None:
    """Too many open files, a hiccup of the file system: the error is raised, the piece stays."""
    first = pieces.get("bank", KEY, write())
    real = Path.read_text

    def fails(path: Path, *arguments: Any, **options: Any) -> str:
        if path.name == RECORD:
            raise OSError(number, os.strerror(number))
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", fails)
        for call in (
            lambda: pieces.find("bank", KEY),
            lambda: pieces.get("bank", KEY, never),
            lambda: pieces.open(first.ref),
        ):
            with pytest.raises(OSError, match=os.strerror(number)):
                call()
    assert warnings == []
    assert pieces.get("bank", KEY, never).ref == first.ref


def test_a_large_file_is_hashed_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What decides is its size and times; and a damaged large file is noticed like any other."""
    asked = []

    def counted(path: Path) -> str:
        asked.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr(pieces_module, "file_sha256", counted)
    monkeypatch.setattr(pieces_module, "LARGE", 10)
    store = Store(tmp_path)

    def make(out: Path) -> dict[str, Any]:
        (out / "large").write_bytes(bytes(10))
        (out / "small").write_bytes(bytes(9))
        return {}

    ref = store.make("stage", "a" * 64, make).ref
    asked.clear()
    for _ in range(3):
        store.open(ref)
    assert sorted(asked) == ["large", "small", "small", "small"]
    place = store.open(ref).folder / "large"
    place.write_bytes(bytes(9) + b"x")
    os.utime(place, ns=(1, 1))
    with pytest.raises(InputError, match="gone or damaged"):
        store.open(ref)
