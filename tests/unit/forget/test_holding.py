"""What is searched in which file."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from tasks.forget.closure import Marks, holds
from tasks.lora.bank import stack, write_bank
from tests.unit.lora.helpers import random_lora

TEXT = "a film of two friends who travel"


def parquet(file: Path) -> Path:
    profile = [{"id": "1", "text": f"Which tag? {TEXT}", "answer": "4"}]
    pl.DataFrame({"user_id": ["u1"], "profile": [profile], "anchors": [["a1"]]}).write_parquet(file)
    return file


@pytest.mark.parametrize(
    ("ids", "texts", "wanted"),
    [
        ({"u1"}, set(), True),
        ({"a1"}, set(), True),
        ({"u"}, set(), False),  # an id is a whole value
        ({"1"}, set(), False),  # nor is an item
        ({"4"}, set(), False),  # a rating is no user
        (set(), {TEXT}, True),  # a text may stand within a longer one
        (set(), {"two"}, False),  # unless it is so short that it stands there by chance
        (set(), {"4"}, True),
    ],
)
def test_tables(tmp_path: Path, ids: set[str], texts: set[str], wanted: bool) -> None:
    file = parquet(tmp_path / "x.parquet")
    assert holds(file, Marks(frozenset(ids), frozenset(texts))) is wanted
    as_json = tmp_path / "x.json"
    as_json.write_text(json.dumps(pl.read_parquet(file).to_dicts()))
    assert holds(as_json, Marks(frozenset(ids), frozenset(texts))) is wanted


def test_names_in_headers_numbers_and_pages(tmp_path: Path) -> None:
    lora = random_lora({"x": (3, 5)}, 2, 1.0, 0)
    bank = tmp_path / "bank.safetensors"
    write_bank(bank, stack(["a1", "../x"], [lora, lora]))
    users = tmp_path / "users.json"
    users.write_text('[{"user_id": 17, "profile": []}]')
    page = tmp_path / "page.html"
    page.write_text("<td>a&amp;b</td><td>u-1</td>")
    for file, name, wanted in (
        (bank, "../x", True), (bank, "x", False), (users, "17", True), (users, "7", False),
        (page, "a&b", True), (page, "u-1", True), (page, "u", False), (page, "1", False),
    ):  # fmt: skip
        assert holds(file, Marks(frozenset({name}))) is wanted, (file, name)


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """The caller counts it as left; it must not pass for clean."""
    for name in ("x.json", "x.safetensors", "x.parquet"):
        (tmp_path / name).write_bytes(b"\xff" * 9)
        with pytest.raises(Exception):  # noqa: B017, PT011  (each library has its own)
            holds(tmp_path / name, Marks(frozenset({"u"})))
