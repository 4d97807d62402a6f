"""Check the JSON that a user gives: each fault becomes one line with its place and the remedy."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from tasks.errors import InputError

# The largest file that is read as a whole. LaMP's largest outputs are a few megabytes.
WHOLE = 64 << 20


def text(value: Any, where: str, name: str) -> str:
    """Return a JSON string or number as a string, null as ""; else raise InputError."""
    if value is None:
        return ""
    if not isinstance(value, str):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{where}: {name} is {kind(value)}; it must be a string or a number")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{where}: {name} is a number too large to be read; repair it")
        return str(int(value) if value == int(value) else value)  # 4.0 is the label 4
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(
            f"{where}: {name} holds half a character (a lone \\ud800-\\udfff escape); repair it"
        ) from None
    return value


def fields_of(value: Any, where: str, names: tuple[str, ...], task: str) -> dict[str, str]:
    """Return the fields of a JSON object that a task needs, as strings (`text`)."""
    if not isinstance(value, dict):
        raise InputError(f"{where} is {kind(value)}; it must be a JSON object")
    for name in names:
        if name not in value:
            present = ", ".join(short(str(key)) for key in list(value)[:8]) or "none"
            raise InputError(f"{where} has no {name!r} (its fields: {present}); {task} needs it")
    return {name: text(value[name], where, name) for name in names}


def identifier(value: Any, where: str, name: str) -> str:
    """Return an id as a string; raise InputError for an empty one."""
    string = text(value, where, name)
    if not string.strip():
        raise InputError(f"{where}: {name} is empty; give it a string or a whole number")
    return string


def read_json(file: Path) -> Any:
    """Return the content of a JSON file; raise InputError for one that is no JSON or too large."""
    with reading(file):
        if file.stat().st_size > WHOLE:
            raise InputError(
                f"{file}: is larger than {WHOLE >> 20} MiB, so it is not what it should be by its "
                "name; get it again"
            )
        content = file.read_bytes()
    try:
        decoded = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}: not UTF-8 at byte {error.start}; is it compressed? give the plain JSON file"
        ) from None
    if not decoded.strip():
        raise InputError(f"{file}: is empty; get it again")
    try:
        return decoder().decode(decoded)
    except json.JSONDecodeError as error:
        start = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
        place = start + len(decoded[: error.pos].encode())
        if decoded.lstrip().startswith("<"):
            not_json(str(file), file, place, error.msg, web=True)
        not_json(str(file), file, place, error.msg)
    except (RecursionError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({error}); get it again") from None


def decoder() -> json.JSONDecoder:
    """Return a JSON decoder that refuses NaN and Infinity."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    return json.JSONDecoder(parse_constant=refuse)


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn an OSError within into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); check it") from None


def not_a_list(file: Path) -> NoReturn:
    """Raise InputError for a file that does not begin with a list."""
    if file.stat().st_size > WHOLE:
        raise InputError(f"{file}: does not begin with a JSON list; is it another file?")
    content = read_json(file)
    raise InputError(f"{file}: holds {kind(content)}; expected a JSON list of users")


def not_json(
    where: str, file: Path, place: int, what: str, *, cut: bool = True, web: bool = False
) -> NoReturn:
    """Raise InputError for a file that stops being JSON.

    where: the file, and the record if there is one. place: the byte. cut: the end may be missing.
    web: it is a web page.
    """
    hint = "is it truncated? get it again" if cut else "repair it, or get the file again"
    if web:
        hint = "it looks like a web page, so the address it came from was wrong"
    line, column = _line_of(file, place)
    raise InputError(
        f"{where}: not valid JSON at line {line}, column {column} (byte {place}: {what}); {hint}"
    )


def _line_of(file: Path, place: int) -> tuple[int, int]:
    """Line and column (in characters) of a byte, by reading the file up to there."""
    line = column = 1
    decode = codecs.getincrementaldecoder("utf-8-sig")("replace").decode
    with reading(file), file.open("rb") as handle:
        while place > 0 and (part := handle.read(min(place, 1 << 20))):
            place -= len(part)
            characters = decode(part)
            line += characters.count("\n")
            _, newline, last = characters.rpartition("\n")
            column = len(last) + 1 if newline else column + len(characters)
    return line, column


def kind(value: Any) -> str:
    """Name the type of a JSON value."""
    names = {dict: "a JSON object", list: "a list", str: "a string", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def short(string: str) -> str:
    """Quote a string and cut it to 40 characters, for a message."""
    return repr(string if len(string) <= 40 else string[:37] + "...")
