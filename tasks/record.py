"""The base classes of results, and how a cache key is made from a stage's arguments.

A stage's key is the hash of its name, its version, the libraries that decide its numbers and its
arguments (`key_of`). What must not count is marked in its type: a field `Annotated[T,
OUTSIDE_KEY]`, or a class with `outside_key = True`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, field_validator

# The mark of a field that decides no number of any result.
OUTSIDE_KEY = "outside the key"


class Record(BaseModel):
    """A frozen value with named, typed fields; unknown fields fail.

    outside_key: whether nothing in it decides a number of a result.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    outside_key: ClassVar[bool] = False


class Options(Record):
    """A section of the configuration: no silent type conversion.

    The string below a field describes it, in Prefect's form and in docs/options.md.
    """

    model_config = ConfigDict(strict=True, use_attribute_docstrings=True)

    @classmethod
    def of(cls, other: Options) -> Self:
        """The fields of a larger section that this one has."""
        return cls(**{name: getattr(other, name) for name in cls.model_fields})


class File(Record):
    """A file in the store, or a folder with all that is in it.

    uri: its path below the store. sha256: of its bytes; of a folder's names and hashes.
    """

    uri: Annotated[str, OUTSIDE_KEY]
    sha256: str

    @field_validator("uri")
    @classmethod
    def _below_the_store(cls, uri: str) -> str:
        if not uri or uri.startswith("/") or ".." in uri.split("/"):
            raise ValueError(f"{uri!r} is no path below the store")
        return uri

    @property
    def folder(self) -> str:
        """The uri of the folder that was stored as a whole: stage/digest."""
        return "/".join(self.uri.split("/")[:3])


class Result(Record):
    """What a stage gives: values that decide later numbers, and files by reference.

    seconds: to make it. made_of: the uris of the stored folders that it was made from. cached:
    whether this run found it.
    """

    seconds: Annotated[float, OUTSIDE_KEY] = 0.0
    made_of: Annotated[tuple[str, ...], OUTSIDE_KEY] = ()
    cached: Annotated[bool, OUTSIDE_KEY] = False


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def key_of(*values: Any) -> str:
    """The hash of what decides numbers in the values. A file counts by content, not by place."""
    return digest([_deciding(value) for value in values])


def derive_seed(seed: int, *about: str) -> int:
    """A seed for one piece of work, from the configuration's seed and the work's name."""
    return int(hashlib.sha256("\x1f".join([str(seed), *about]).encode()).hexdigest()[:8], 16)


@cache
def library_versions(names: tuple[str, ...]) -> dict[str, str]:
    """The installed version of each library."""
    return {name: importlib.metadata.version(name) for name in names}


def files_of(*values: Any) -> Iterator[File]:
    """Every file that the values point to."""
    for value in values:
        if isinstance(value, File):
            yield value
        elif isinstance(value, Record):
            yield from files_of(*(getattr(value, name) for name in type(value).model_fields))
        elif isinstance(value, Mapping):
            yield from files_of(*value.values())
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
            yield from files_of(*value)


def _deciding(value: Any) -> Any:
    if isinstance(value, Record):
        if value.outside_key:
            return None
        return {name: _deciding(getattr(value, name)) for name in _inside(type(value))}
    if is_dataclass(value):
        return {field.name: _deciding(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _deciding(one) for name, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_deciding(one) for one in value]
    return value


@cache
def _inside(kind: type[Record]) -> list[str]:
    """The fields of a class that count in a key."""
    return [name for name, field in kind.model_fields.items() if OUTSIDE_KEY not in field.metadata]
