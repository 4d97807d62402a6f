"""Check the values of JSON that a user gives: a fault becomes one line with place and remedy."""

from __future__ import annotations

import math
from typing import Any

from tasks.errors import InputError


def text(value: Any, where: str, name: str) -> str:
    """Return a JSON string or number as a string, null as ""; else raise InputError."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{where}: {name} holds half a character (a lone \\ud800-\\udfff escape); repair it"
            ) from None
        return value
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}: {name} is {kind(value)}; it must be a string or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where}: {name} is a number too large to be read; repair it")
    return str(int(value) if value == int(value) else value)  # 4.0 is the label 4


def fields_of(value: Any, where: str, names: tuple[str, ...], task: str) -> list[str]:
    """Return the fields of a JSON object that a task needs, as strings (`text`); no id is empty."""
    if not isinstance(value, dict):
        raise InputError(f"{where} is {kind(value)}; it must be a JSON object")
    fields = []
    for name in names:
        if name not in value:
            present = ", ".join(short(str(key)) for key in list(value)[:8]) or "none"
            raise InputError(f"{where} has no {name!r} (its fields: {present}); {task} needs it")
        field = value[name]
        if not (isinstance(field, str) and field.isascii()):  # most are
            field = text(field, where, name)
        if name in ("id", "user_id") and not field.strip():
            raise InputError(f"{where}: {name} is empty; give it a string or a whole number")
        fields.append(field)
    return fields


def item_fields(item: Any, number: int, where: str, names: tuple[str, ...], task: str) -> list[str]:
    """Return the id of item `number` of a profile, by default its number, and its fields."""
    if isinstance(item, dict) and "id" in item:
        return fields_of(item, where, ("id", *names), task)
    return [str(number), *fields_of(item, where, names, task)]


def list_of(value: Any, where: str, name: str) -> list[Any]:
    """Return a JSON list; raise InputError for anything else."""
    if not isinstance(value, list):
        raise InputError(f"{where}: {name} is {kind(value)}; it must be a list")
    return value


def kind(value: Any) -> str:
    """Name the type of a JSON value."""
    names = {dict: "a JSON object", list: "a list", str: "a string", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def short(string: str) -> str:
    """Quote a string and cut it to 40 characters, for a message."""
    return repr(string if len(string) <= 40 else string[:37] + "...")
