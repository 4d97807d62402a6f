"""The store: whole or not at all, verified when found, nothing of a user in a path."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import artifacts, processes
from tasks import pieces as pieces_module
from tasks.artifacts import Store
from tasks.errors import InputError
from tasks.files import file_sha256
from tasks.pieces import NOTES, RECORD, Piece, Ref, digest, verified

KEY = digest("some work")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def pieces(tmp_path: Path, warnings: list[str]) -> Store:
    return Store(tmp_path / "store", warn=warnings.append)


def write(text: str = "weights", **value: Any) -> Callable[[Path], dict[str, Any]]:
    def make(out: Path) -> dict[str, Any]:
        (out / "deep").mkdir()
        (out / "deep" / "file.bin").write_text(text)
        (out / "table.txt").write_text("rows")
        return {"answer": 42, **value}

    return make


def never(_out: Path) -> dict[str, Any]:
    raise AssertionError("made although it is there")


def test_digest_is_sha256_of_canonical_json() -> None:
    """`printf '{"a":[1,"é"],"b":null}' | sha256sum`, keys in any order."""
    got = digest({"b": None, "a": [1, "é"]})
    assert got == digest({"a": [1, "é"], "b": None})
    assert got == "1e02bc81a26af2f027329541e97eef36f3290bedc6dfe043dbe66b057ecb13ba"


@given(JSON, JSON)
def test_digest_follows_the_value(one: Any, other: Any) -> None:
    """Equal exactly where the JSON text is; it does not see how the value was built."""
    texts = [json.dumps(value, sort_keys=True) for value in (one, other)]
    assert (digest(one) == digest(other)) == (texts[0] == texts[1])
    assert digest(one) == digest(json.loads(json.dumps(one)))


def test_made_then_found(pieces: Store) -> None:
    made = pieces.get("bank", KEY, write())
    assert not made.cached
    found = pieces.get("bank", KEY, never)
    assert found.cached
    assert (found.ref, found.value, found.notes, found.folder) == (
        made.ref,
        made.value,
        made.notes,
        made.folder,
    )
    assert found.value == {"answer": 42}
    assert found.ref["uri"] == f"bank/{KEY}"
    assert found.ref["kind"] == "bank"
    assert found.folder == pieces.root / "bank" / KEY[:2] / KEY
    assert (found.folder / "deep" / "file.bin").read_text() == "weights"
    assert pieces.open(made.ref) == found
    assert json.loads(json.dumps(made.ref)) == made.ref


def test_keys_and_stages_are_apart(pieces: Store) -> None:
    pieces.get("bank", KEY, write())
    assert pieces.find("bank", digest("other work")) is None
    assert pieces.find("fusion", KEY) is None


def test_the_reference_hashes_files_and_value_not_notes(tmp_path: Path) -> None:
    def ref(name: str, make: Callable[[Path], dict[str, Any]]) -> Ref:
        return Store(tmp_path / name).get("bank", KEY, make).ref

    first = ref("a", write(notes={"seconds": 1.0}))
    assert ref("b", write(notes={"seconds": 9.0, "host": "x"})) == first
    assert ref("c", write(text="Weights"))["sha256"] != first["sha256"]
    assert ref("d", write(more=1))["sha256"] != first["sha256"]

    def renamed(out: Path) -> dict[str, Any]:
        value = write()(out)
        (out / "table.txt").rename(out / "tables.txt")
        return value

    assert ref("e", renamed)["sha256"] != first["sha256"]


def test_notes_are_kept_apart_and_seconds_filled_in(pieces: Store) -> None:
    piece = pieces.get("bank", KEY, write(**{NOTES: {"per_user": [1, 2]}}))
    assert piece.value == {"answer": 42}
    assert piece.notes["per_user"] == [1, 2]
    assert 0 <= piece.notes["seconds"] < 60
    assert pieces.get("bank", digest(2), write(notes={"seconds": 7})).notes == {"seconds": 7}


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_exception_leaves_nothing(pieces: Store, error: BaseException) -> None:
    def fails(out: Path) -> dict[str, Any]:
        (out / "half").write_text("half")
        raise error

    with pytest.raises(type(error)):
        pieces.get("bank", KEY, fails)
    assert pieces.find("bank", KEY) is None
    assert [path for path in pieces.root.rglob("*") if not path.is_dir()] == []
    assert list((pieces.root / "bank" / KEY[:2]).iterdir()) == []
    assert pieces.working() == []


def test_a_value_that_is_not_json_leaves_nothing(pieces: Store) -> None:
    with pytest.raises(TypeError):
        pieces.get("bank", KEY, lambda _out: {"path": Path()})
    assert list((pieces.root / "bank" / KEY[:2]).iterdir()) == []


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)


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


def test_two_makers_of_the_same_piece(pieces: Store) -> None:
    """Without a claim, as when one was thought dead: both get the piece, and one folder stands."""
    both_in = threading.Barrier(2, timeout=10)
    results: list[Any] = []

    def make(out: Path) -> dict[str, Any]:
        value = write()(out)
        both_in.wait()
        return value

    threads = [
        threading.Thread(target=lambda: results.append(pieces.make("bank", KEY, make)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(results) == 2
    assert results[0].ref == results[1].ref
    assert [path.name for path in (pieces.root / "bank" / KEY[:2]).iterdir()] == [KEY]
    assert pieces.get("bank", KEY, never).ref == results[0].ref


def test_the_other_makers_damaged_piece_is_replaced(pieces: Store, warnings: list[str]) -> None:
    def make(out: Path) -> dict[str, Any]:
        other = Store(pieces.root).make("bank", KEY, write())
        flip(other.folder / "table.txt")
        return write()(out)

    piece = pieces.get("bank", KEY, make)
    assert (piece.folder / "table.txt").read_text() == "rows"
    assert len(warnings) == 1
    assert pieces.get("bank", KEY, never).cached


def test_find_rows(pieces: Store, warnings: list[str]) -> None:
    """Rows of three users in two pieces, one of them damaged."""
    a = pieces.get("stacking", digest("a"), write(rows=["r1", "r2"]))
    b = pieces.get("stacking", digest("b"), write(rows=["r3", "r4"]))
    pieces.get("stacking", digest("c"), write())
    pieces.get("other", digest("d"), write(rows=["r9"]))
    found = pieces.find_rows("stacking", ["r2", "r3", "r9", "unknown"])
    assert {row: (piece.ref, number) for row, (piece, number) in found.items()} == {
        "r2": (a.ref, 1),
        "r3": (b.ref, 0),
    }
    flip(b.folder / "table.txt")
    assert set(pieces.find_rows("stacking", ["r1", "r3"])) == {"r1"}
    assert len(warnings) == 1
    assert pieces.find_rows("nothing yet", ["r1"]) == {}
    (a.folder / RECORD).write_text("{")
    assert pieces.find_rows("stacking", ["r1"]) == {}


@pytest.mark.parametrize("text", ["[]", "null", "7"])
def test_find_rows_passes_over_any_broken_record(pieces: Store, text: str) -> None:
    piece = pieces.get("stacking", digest("a"), write(rows=["r1"]))
    (piece.folder / RECORD).write_text(text)
    assert pieces.find_rows("stacking", ["r1"]) == {}


def test_find_rows_reads_a_record_once(pieces: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each job asks all records of its stage."""
    for name in "ab":
        pieces.get("stacking", digest(name), write(rows=[f"r-{name}"]))
    assert pieces.find_rows("stacking", ["unknown"]) == {}
    read: list[str] = []
    real = json.loads

    def loads(text: str) -> Any:
        read.append(text)
        return real(text)

    monkeypatch.setattr(pieces_module.json, "loads", loads)
    assert pieces.find_rows("stacking", ["unknown"]) == {}
    assert read == []
    pieces.get("stacking", digest("c"), write(rows=["r-c"]))
    read.clear()
    assert pieces.find_rows("stacking", ["unknown"]) == {}
    assert len(read) == 1


def test_a_row_in_two_pieces_is_found_once(pieces: Store) -> None:
    for name in "ab":
        pieces.get("stacking", digest(name), write(rows=["r1", f"r-{name}"]))
    found = pieces.find_rows("stacking", ["r1", "r-a", "r-b"])
    assert set(found) == {"r1", "r-a", "r-b"}
    for row, (piece, number) in found.items():
        assert piece.value["rows"][number] == row


NASTY = ["../../x", "/etc/passwd", "..", "a/b", "a\\b", ".", "", "CON", "x" * 5000, "\n", "用户"]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(NASTY) | st.text(st.characters(codec="utf-8")))
def test_a_users_id_never_becomes_a_path(
    tmp_path_factory: pytest.TempPathFactory, user_id: str
) -> None:
    """Keys are digests: 64 hexadecimal digits, whatever they are made of."""
    root = tmp_path_factory.mktemp("ids")
    pieces = Store(root / "store")
    key = digest({"user": user_id})
    assert len(key) == 64
    assert set(key) <= set("0123456789abcdef")
    piece = pieces.get("meta_lora", key, lambda _out: {"rows": [user_id], "users": [user_id]})
    assert [path.name for path in root.iterdir()] == ["store"]
    assert [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()] == [
        f"store/meta_lora/{key[:2]}/{key}/{RECORD}"
    ]
    assert pieces.find_rows("meta_lora", [user_id])[user_id] == (pieces.find("meta_lora", key), 0)
    assert piece.value["users"] == [user_id]


def test_hash_of_an_outside_folder(pieces: Store, tmp_path: Path) -> None:
    """Follows the bytes and the names, not the place; remembered while sizes and times stay."""
    patterns = ["*.json", "*.bin"]
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "model.bin").write_text("aaaa")
        (folder / "config.json").write_text("{}")
    first = pieces.hash_folder(one, patterns)
    assert pieces.hash_folder(two, patterns) == first
    assert pieces.hash_folder(one, patterns) == first
    # The order of patterns, or a pattern that matches nothing or a file twice, is no matter.
    assert pieces.hash_folder(one, ["*.bin", "*.txt", "model.*", "*.json"]) == first
    (two / "model.bin").write_text("aaab")
    os.utime(two / "model.bin", ns=(1, 1))
    assert pieces.hash_folder(two, patterns) != first
    (one / "model.bin").rename(one / "other.bin")
    assert pieces.hash_folder(one, patterns) != first


def test_hash_of_a_folder_sees_what_is_asked_for(pieces: Store, tmp_path: Path) -> None:
    """Other files, and files deeper down (a hub cache, say), are neither read nor counted."""
    (tmp_path / "config.json").write_text("{}")
    first = pieces.hash_folder(tmp_path, ["*.json"])
    (tmp_path / "training.log").write_text("x")
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "config.json").write_text("{ }")
    assert pieces.hash_folder(tmp_path, ["*.json"]) == first
    (tmp_path / "tokenizer.json").write_text("{}")
    assert pieces.hash_folder(tmp_path, ["*.json"]) != first


def half_made(pieces: Store, host: str, process: str) -> Path:
    """`process`: pid~start."""
    folder = pieces.root / "bank" / KEY[:2] / f".making-{host}~{process}~abc_123"
    folder.mkdir(parents=True)
    (folder / "half").write_text("x")
    return folder


def test_sweep_takes_what_dead_processes_left(pieces: Store) -> None:
    """A process that has ended, one whose pid another has by now (this one's, from before a restart
    of the machine), one that lives (this one, however old), one of another machine."""
    piece = pieces.get("bank", KEY, write())
    ended = subprocess.Popen(["true"])
    ended.wait()
    host, now = processes.host(), time.time()
    start = psutil.Process().create_time()
    dead = half_made(pieces, host, f"{ended.pid}~{now:.0f}")
    before = half_made(pieces, host, f"{os.getpid()}~{start - 3600:.0f}")
    living = half_made(pieces, host, f"{os.getpid()}~{start:.0f}")
    elsewhere = half_made(pieces, "other-host", f"{ended.pid}~{now:.0f}")
    two_days_ago = time.time() - 2 * 86_400
    for folder in (living, piece.folder):
        os.utime(folder, (two_days_ago, two_days_ago))
    pieces.sweep()
    assert not dead.exists()
    assert not before.exists()
    assert living.exists()
    assert elsewhere.exists()
    assert pieces.get("bank", KEY, never).cached


def test_sweep_leaves_another_containers_alone(pieces: Store) -> None:
    """Its host has this one's name and boot, its processes' numbers say nothing here."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    container = re.sub(r"\d+$", "7", processes.host())
    assert container != processes.host()
    theirs = half_made(pieces, container, f"{ended.pid}~{time.time():.0f}")
    pieces.sweep()
    assert theirs.exists()


def test_sweep_takes_what_was_left_before_the_machine_was_started(
    pieces: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another boot of the machine, by name and id; of another machine of that name it is not."""
    monkeypatch.setattr(processes, "host", lambda: "vm-m0123abcd-aaaaaaaa-pid-1")
    before = half_made(pieces, "vm-m0123abcd-bbbbbbbb-pid-2", "1~1")
    another = half_made(pieces, "vm-m4567abcd-bbbbbbbb-pid-2", "1~1")
    unknown = half_made(pieces, "vm-bbbbbbbb-pid-2", "1~1")
    pieces.sweep()
    assert not before.exists()
    assert another.exists()
    assert unknown.exists()


def test_sweep_knows_the_folders_that_are_made(pieces: Store) -> None:
    """The folder `make` works in is this process's; left behind by a dead one it goes."""
    seen: list[Path] = []

    def make(out: Path) -> dict[str, Any]:
        pieces.sweep()
        seen.append(out)
        return write()(out)

    pieces.get("bank", KEY, make)
    script = (
        "import os, sys; from pathlib import Path; from tasks.artifacts import Store; "
        "Store(Path(sys.argv[1])).make('bank', sys.argv[2], lambda out: os._exit(9))"
    )
    other = digest("other")
    subprocess.run([sys.executable, "-c", script, str(pieces.root), other], check=False)
    assert len(list(pieces.root.glob("*/*/.making-*"))) == 1
    pieces.sweep()
    assert list(pieces.root.glob("*/*/.making-*")) == []
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
