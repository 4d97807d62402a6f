"""Reading JSON that a person gave: every fault becomes one line that says where and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tasks.errors import InputError


def text(value: Any, where: str, name: str) -> str:
    """A JSON string or number as a string, null as the empty one; else InputError."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a rating written 4.0 is the label 4
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f"{where}: {name} is {kind(value)}; it must be a string or a number")
    string = str(value)
    try:
        string.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(
            f"{where}: {name} holds half a character (a lone \\ud800-\\udfff escape); repair it"
        ) from None
    return string


def read_list(file: Path) -> list[Any]:
    """The non-empty JSON list that a file holds; else InputError."""
    content = read_json(file)
    if not isinstance(content, list):
        raise InputError(f"{file}: holds {kind(content)}; expected a JSON list of users")
    if not content:
        raise InputError(f"{file}: holds an empty list; expected at least one user")
    return content


def read_json(file: Path) -> Any:
    """What a JSON file holds; InputError says where it stops being JSON."""
    try:
        content = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); check it") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}: not UTF-8 at byte {error.start}; is it compressed? give the plain JSON file"
        ) from None
    if not content.strip():
        raise InputError(f"{file}: is empty; get it again")
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        hint = "is it truncated? get it again"
        if content.lstrip().startswith("<"):
            hint = "it looks like a web page, so the address it came from was wrong"
        raise InputError(
            f"{file}: not valid JSON at line {error.lineno}, column {error.colno} ({error.msg}); "
            f"{hint}"
        ) from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({error}); get it again") from None


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "a JSON object", list: "a list", str: "a string", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def short(string: str) -> str:
    """Quoted and cut, so that strange data stays within one readable line."""
    return repr(string if len(string) <= 40 else string[:37] + "...")
