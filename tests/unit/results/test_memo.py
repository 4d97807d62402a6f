"""Small values that are worked out once."""

from __future__ import annotations

import pytest

from tasks.results.store import MEMO, Store, remembered


def never() -> None:
    raise AssertionError("made although it is there")


def test_made_once_for_each_value_it_is_about(where: Store) -> None:
    assert remembered("folder", ["a", 1], lambda: {"x": "é"}) == {"x": "é"}
    assert remembered("folder", ["a", 1], never) == {"x": "é"}
    assert remembered("folder", ["a", 2], lambda: 2) == 2
    assert remembered("coverage", ["a", 1], lambda: None) is None
    assert remembered("coverage", ["a", 1], never) is None


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_a_broken_one_is_made_again(where: Store, content: bytes) -> None:
    remembered("folder", "a", lambda: 1)
    (file,) = (where.root / MEMO).iterdir()
    file.write_bytes(content)
    assert remembered("folder", "a", lambda: 2) == 2
    assert remembered("folder", "a", never) == 2


def test_what_cannot_be_made_is_not_remembered(where: Store) -> None:
    def fails() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        remembered("folder", "a", fails)
    assert remembered("folder", "a", lambda: 1) == 1
