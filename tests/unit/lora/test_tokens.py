"""Tokens in a mapped file: what was written comes back, user by user, and nothing else is read."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.lora.batches import Encoded
from tasks.lora.tokens import Samples, joined, read_tokens, write_tokens

ids = st.lists(st.integers(0, 2**31 - 1), max_size=6)
encoded = st.builds(Encoded, st.lists(st.integers(0, 200_000), min_size=1, max_size=6), ids,
                    st.booleans())  # fmt: skip
users = st.lists(st.lists(encoded, max_size=4), max_size=5)


@settings(deadline=None, max_examples=60)
@given(users)
def test_what_is_written_is_read(given_users: list[list[Encoded]]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.safetensors"
        write_tokens(path, given_users)
        found = read_tokens(path)
        assert [list(own) for own in found] == given_users
        assert [own.truncated for own in found] == [
            sum(one.truncated for one in own) for own in given_users
        ]
        flat = [one for own in given_users for one in own]
        together = joined(found)
        assert list(together) == flat
        assert together[::-1] == flat[::-1]
        backwards = range(len(flat) - 1, -1, -2)
        assert list(together.chosen(backwards)) == [flat[i] for i in backwards]


@pytest.fixture
def two_users(tmp_path: Path) -> list[Samples]:
    first = [Encoded([1, 2], [3]), Encoded([4], [5, 6], True)]
    second = [Encoded([7, 8, 9], [])]
    write_tokens(tmp_path / "tokens.safetensors", [first, second])
    return read_tokens(tmp_path / "tokens.safetensors")


def test_indices_are_those_of_a_list(two_users: list[Samples]) -> None:
    first, second = two_users
    assert (len(first), len(second)) == (2, 1)
    assert first[-1] == first[1] == Encoded([4], [5, 6], True)
    assert first[0:1] == [Encoded([1, 2], [3])]
    assert second[0] == Encoded([7, 8, 9], [])
    for index in (2, -3):
        with pytest.raises(IndexError):
            first[index]
    assert joined([second, first])[1] == first[0]


def test_the_file_is_mapped_and_outlives_its_name(tmp_path: Path, two_users: list[Samples]) -> None:
    path = tmp_path / "tokens.safetensors"
    assert str(path) in Path("/proc/self/maps").read_text()
    path.unlink()
    assert two_users[0][0] == Encoded([1, 2], [3])
