"""The JSON that a user gives: its records, in bounded memory, and checks of their values.

A file is a JSON list, or JSON Lines: objects, one a line. Of a key that stands twice in one object
the last counts, as `json.load` has it. Each fault becomes one line with its place and the remedy.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from tasks.errors import InputError

BLOCK = 4 << 20  # characters read at once
LONGEST = 64 << 20  # characters of one record; a longer one is a damaged file

_SPACES = re.compile(r"[ \t\n\r]*")
_KINDS = {type(None): "null", dict: "a JSON object", list: "a list", str: "a string"}


def read_records(
    file: Path, damaged: Callable[[InputError], None] | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) of a file; the place is "record 0" of a list, "line 1" of lines.

    damaged: takes what is wrong with a line of JSON Lines, and the next line is read. Without it,
    and of a list, that ends the file: raises InputError, which names the place, for what is not
    JSON, not UTF-8 or longer than LONGEST.
    """
    try:
        # A byte that is not UTF-8 becomes a lone surrogate, so what stands before it can be read.
        with file.open(encoding="utf-8", errors="surrogateescape", newline="") as handle:
            yield from _records(_Text(file, handle), damaged)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); check it") from None


def _records(
    text: "_Text", damaged: Callable[[InputError], None] | None
) -> Iterator[tuple[str, Any]]:
    first = text.next()
    if first == "{":
        while text.next():
            text.place = f"line {text.line}"
            try:
                value = text.value()
            except InputError as error:
                if damaged is None:
                    raise
                damaged(error)
                text.skip()
            else:
                yield text.place, value
        return
    text.check(text.at + 1)
    if first != "[":
        what = "holds neither a JSON list nor JSON Lines; is it compressed?"
        if first == "<":
            what = "looks like a web page, so the address it came from was wrong"
        raise InputError(f"{text.file}: {what if first else 'is empty; get it again'}")
    text.use(text.at + 1)
    number, separator = 0, text.next()
    while separator != "]":
        text.place = f"record {number}"
        yield text.place, text.value()
        number, separator = number + 1, text.next()
        if separator not in ("]", ","):
            text.fail("Expecting ',' or ']'", text.at)
        if separator == ",":
            text.use(text.at + 1)
    text.use(text.at + 1)
    text.place = "after its list"
    if text.next():
        text.fail("Extra data", text.at)


class _Text:
    """The part of a file that is in memory. What stands before `at` has been used.

    line, column, byte: where `at` is in the file; bytes are counted from 0, the others from 1.
    """

    def __init__(self, file: Path, handle: TextIO) -> None:
        self.file = file
        self.place = "at its start"
        self.text = handle.read(1).removeprefix("\ufeff")
        self.at = 0
        self.line = self.column = 1
        self.byte = 0 if self.text else 3  # after a byte order mark
        self._handle = handle
        self._ended = False
        self._json = json.JSONDecoder(parse_constant=_refuse)

    def next(self) -> str:
        """Return the next character that is no white space, without using it; "" at the end."""
        while True:
            spaces = _SPACES.match(self.text, self.at)
            self.use(spaces.end() if spaces else self.at)
            if self.at < len(self.text) or self._ended:
                return self.text[self.at : self.at + 1]
            self._more()

    def value(self) -> Any:
        """Use and return the next JSON value."""
        while True:
            self.next()
            try:
                value, end = self._json.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self._ended or len(self.text) - self.at >= LONGEST:
                    what = "" if self._ended else f", or it does not end within {LONGEST >> 20} MiB"
                    self.fail(error.msg + what, error.pos)
                self._more()
            except (RecursionError, ValueError) as error:
                raise InputError(
                    f"{self.file}: {self.place}: cannot be read ({error}); repair it"
                ) from None
            else:
                self.check(end)
                self.use(end)
                return value

    def use(self, end: int) -> None:
        """Go on to `end`."""
        self.line, self.column, self.byte = self._position(end)
        self.at = end

    def _position(self, end: int) -> tuple[int, int, int]:
        """Line, column and byte of `end`."""
        used = self.text[self.at : end]
        breaks, size = used.count("\n"), len(used.encode(errors="surrogateescape"))
        column = len(used) - 1 - used.rfind("\n") + (1 if breaks else self.column)
        return self.line + breaks, column, self.byte + size

    def skip(self) -> None:
        """Go on to the next line that begins an object, or to the end where there is none."""
        while (end := self.text.find("\n{", self.at)) < 0 and not self._ended:
            self._more()
        self.use(len(self.text) if end < 0 else end + 1)

    def check(self, end: int) -> None:
        """Raise InputError where a byte before `end` is not UTF-8."""
        try:
            self.text[self.at : end].encode()
        except UnicodeEncodeError as error:
            _, _, byte = self._position(self.at + error.start)
            raise InputError(
                f"{self.file}: {self.place}: not UTF-8 at byte {byte}; repair it, or get it again"
            ) from None

    def fail(self, what: str, at: int) -> NoReturn:
        self.check(at + 1)
        line, column, _ = self._position(at)
        hint = "repair it, or get it again if it was truncated"
        if self.place.startswith("line"):
            hint += "; JSON Lines have one user a line, and no comma"
        raise InputError(
            f"{self.file}: {self.place}: not valid JSON at line {line}, column {column} ({what}); "
            f"{hint}"
        )

    def _more(self) -> None:
        """Drop what was used, and read at least as much as is left."""
        self.text, self.at = self.text[self.at :], 0
        block = self._handle.read(max(BLOCK, len(self.text)))
        self.text += block
        self._ended = not block


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def as_text(value: Any, location: str, name: str) -> str:
    """Return a JSON string or number as a string, null as ""; else raise InputError."""
    if value is None:
        return ""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{location}: {name} holds half a character (a lone \\ud800-\\udfff escape); "
                "repair it"
            ) from None
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        what = f"{name} is {type_name(value)}"
        raise InputError(f"{location}: {what}; it must be a string or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{location}: {name} is a number too large to be read; repair it")
    return str(int(value) if value == int(value) else value)  # 4.0 is the label 4


def fields_of(value: Any, location: str, names: tuple[str, ...], task: str) -> list[str]:
    """Return the fields of a JSON object that a task needs, by `as_text`; no id is empty."""
    if not isinstance(value, dict):
        raise InputError(f"{location} is {type_name(value)}; it must be a JSON object")
    fields = []
    for name in names:
        if name not in value:
            present = ", ".join(quoted(str(key)) for key in list(value)[:8]) or "none"
            raise InputError(f"{location} has no {name!r} (its fields: {present}); {task} needs it")
        field = value[name]
        if not (isinstance(field, str) and field.isascii()):  # most are
            field = as_text(field, location, name)
        if name in ("id", "user_id") and not field.strip():
            raise InputError(f"{location}: {name} is empty; give it a string or a whole number")
        fields.append(field)
    return fields


def item_fields(
    item: Any, number: int, location: str, names: tuple[str, ...], task: str
) -> list[str]:
    """Return the id of item `number` of a profile, by default its number, and its fields."""
    if isinstance(item, dict) and "id" in item:
        return fields_of(item, location, ("id", *names), task)
    return [str(number), *fields_of(item, location, names, task)]


def list_of(value: Any, location: str, name: str) -> list[Any]:
    """Return a JSON list; raise InputError for anything else."""
    if not isinstance(value, list):
        raise InputError(f"{location}: {name} is {type_name(value)}; it must be a list")
    return value


def type_name(value: Any) -> str:
    """Name the type of a JSON value."""
    return "true or false" if isinstance(value, bool) else _KINDS.get(type(value), "a number")


def quoted(string: str) -> str:
    """Quote a string and cut it to 40 characters, for a message."""
    return repr(string if len(string) <= 40 else string[:37] + "...")
