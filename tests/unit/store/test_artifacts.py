"""The store: whole or not at all, verified when found, nothing of a user in a path."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.store import pieces as pieces_module
from tasks.store.artifacts import Store
from tasks.store.pieces import NOTES, RECORD, Ref, digest
from tests.unit.store.pieces_case import KEY, flip, never, write

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


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
