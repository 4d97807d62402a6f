"""Cache keys: what of a value decides them."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks.config.options import ComputeOptions, TrainingOptions
from tasks.record import (
    OUTSIDE_KEY,
    File,
    Record,
    Result,
    digest,
    files_of,
    key_of,
    library_versions,
)

TEXT = st.text(st.characters(codec="utf-8"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


class Inner(Record):
    counts: int
    noted: Annotated[str, OUTSIDE_KEY] = ""


class Outer(Result):
    inner: Inner
    table: File
    listed: tuple[Inner, ...] = ()
    named: dict[str, Inner] = {}  # noqa: RUF012


class Place(Record):
    outside_key: ClassVar[bool] = True
    device: str


FILE = File(uri="bank/ab/abc/file.bin", sha256="1" * 64)
OUTER = Outer(inner=Inner(counts=1), table=FILE, listed=(Inner(counts=2),))


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


@given(JSON)
def test_a_key_of_plain_values_is_their_digest(value: Any) -> None:
    assert key_of(value) == digest([value])
    assert key_of(value, value) == digest([value, value])


def test_a_key_says_nothing_of_what_is_marked() -> None:
    """By hand: the fields that count, a file as its content."""
    noted = Outer(
        inner=Inner(counts=1, noted="x"), table=FILE.model_copy(update={"uri": "elsewhere"}),
        listed=(Inner(counts=2, noted="y"),), seconds=9.0, made_of=("a/b/c",), cached=True,
    )  # fmt: skip
    assert key_of(noted) == key_of(OUTER)
    assert key_of(OUTER) == digest(
        [
            {
                "inner": {"counts": 1},
                "table": {"sha256": "1" * 64},
                "listed": [{"counts": 2}],
                "named": {},
            }
        ]
    )


@pytest.mark.parametrize(
    "other",
    [
        OUTER.model_copy(update={"inner": Inner(counts=3)}),
        OUTER.model_copy(update={"table": FILE.model_copy(update={"sha256": "2" * 64})}),
        OUTER.model_copy(update={"listed": (Inner(counts=2), Inner(counts=2))}),
        OUTER.model_copy(update={"named": {"a": Inner(counts=2)}}),
    ],
)
def test_a_key_follows_what_counts_at_any_depth(other: Outer) -> None:
    assert key_of(other) != key_of(OUTER)
    assert key_of({"deep": [other]}) != key_of({"deep": [OUTER]})


def test_a_class_outside_the_key_is_as_nothing() -> None:
    assert key_of(Place(device="cpu")) == key_of(Place(device="cuda")) == key_of(None)
    assert key_of(ComputeOptions(device="cpu")) == key_of(ComputeOptions(threads=3)) == key_of(None)


def test_a_key_does_not_see_the_order_of_a_dict_but_of_a_list() -> None:
    assert key_of({"a": 1, "b": OUTER}) == key_of({"b": OUTER, "a": 1})
    assert key_of([1, 2]) == key_of((1, 2)) != key_of([2, 1])


def test_a_whole_number_is_the_float_that_the_option_is() -> None:
    """`-p 'stacking={"alpha": 8}'` asks for what `8.0` does."""
    assert key_of(TrainingOptions(alpha=8)) == key_of(TrainingOptions(alpha=8.0))


def test_the_values_of_a_key_stay_apart() -> None:
    keys = [key_of("ab"), key_of("a", "b"), key_of(["a", "b"]), key_of("a", ["b"]), key_of("")]
    assert len(set(keys)) == len(keys)


def test_files_are_found_at_any_depth() -> None:
    files = [File(uri=f"s/aa/{n}", sha256=str(n)) for n in range(4)]
    inner = Outer(inner=Inner(counts=1), table=files[0])
    given = ({"a": [inner, (files[1],)]}, "s/aa/text", 3, None, [{"b": files[2]}], files[3])
    assert list(files_of(*given)) == files


def test_the_folder_of_a_file_is_what_was_stored_whole() -> None:
    assert FILE.folder == "bank/ab/abc"
    assert File(uri="bank/ab/abc", sha256="1").folder == "bank/ab/abc"


def test_records_are_frozen_and_closed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        OUTER.inner = Inner(counts=4)
    with pytest.raises(ValidationError, match="another"):
        Inner(counts=1, another=2)  # type: ignore[call-arg]
    assert Outer.model_validate_json(OUTER.model_dump_json()) == OUTER


def test_library_versions_are_those_installed() -> None:
    import pydantic

    assert library_versions(("pydantic",)) == {"pydantic": pydantic.VERSION}
