"""The records of a JSON list of any size, in order, in bounded memory.

The standard library decodes record after record from the part of the file that is in memory. Of a
key that stands twice in one object the last counts, as `json.load` has it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from tasks.errors import InputError
from tasks.lamp.checks import decoder, not_a_list, not_json, reading

# Bytes read at once.
BLOCK = 4 << 20
# The longest record that is taken. A longer one is a damaged file, and memory stays bounded.
LONGEST = 64 << 20

_SPACES = re.compile(r"[ \t\n\r]*")
_JSON = decoder()


def read_records(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield (index, record) of the non-empty JSON list in `file`.

    Raises InputError, which names the record, for what is not JSON, not UTF-8 or longer than
    LONGEST; and for a file that holds no list.
    """
    with reading(file), file.open("rb", buffering=0) as handle:
        text = Text(file, handle)
        if text.next() != "[":
            not_a_list(file)
        text.at += 1
        if text.next() == "]":
            raise InputError(f"{file}: holds an empty list; expected at least one user")
        index, separator = 0, ","
        while separator == ",":
            record, separator = text.record(index)
            yield index, record
            index += 1
        if text.next() or text.bad is not None:
            not_json(f"{file}: after its list", file, text.byte(text.at), "Extra data", cut=False)


class Text:
    """The part of a file that is in memory; what stands before `at` has been used."""

    def __init__(self, file: Path, handle: BinaryIO) -> None:
        self.file = file
        self.handle = handle
        self.text = ""
        self.at = 0
        self.bad: int | None = None  # the byte of the file that is not UTF-8
        self.ended = False  # nothing follows that can be read
        self._offset = 0  # of the text's first byte in the file
        self._cut = b""  # the first bytes of a character whose others are not read yet
        self._read()
        if self.text.startswith("\ufeff"):
            self.at = 1

    def next(self) -> str:
        """Return the next character that is no white space, without using it; "" at the end."""
        while True:
            self.at = _after_space(self.text, self.at)
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._read()

    def record(self, index: int) -> tuple[Any, str]:
        """Use and return the next record, and the comma or bracket after it."""
        while True:
            try:
                record, end = _JSON.raw_decode(self.text, _after_space(self.text, self.at))
                end = _after_space(self.text, end)
                if self.text[end : end + 1] not in ("]", ","):
                    raise json.JSONDecodeError("Expecting ',' delimiter", self.text, end)
                self.at = end + 1
                return record, self.text[end]
            except json.JSONDecodeError as error:
                if self.ended or len(self.text) - self.at >= LONGEST:
                    self._fail(error, f"{self.file}: record {index}")
                self._read()
            except (RecursionError, ValueError) as error:
                raise InputError(
                    f"{self.file}: record {index}: cannot be read ({error}); repair it"
                ) from None

    def byte(self, at: int) -> int:
        """The byte of the file where a character of the text stands."""
        return self._offset + len(self.text[:at].encode())

    def _read(self) -> None:
        """Drop what was used, and read at least as much as is left."""
        self._offset, self.text, self.at = self.byte(self.at), self.text[self.at :], 0
        more = self.handle.read(max(BLOCK, len(self.text)))
        block = self._cut + more
        self.ended = not more
        try:
            decoded, used = codecs.utf_8_decode(block, "strict", self.ended)
        except UnicodeDecodeError as error:
            decoded, used = block[: error.start].decode(), error.start
            self.bad = self.byte(len(self.text)) + used
            self.ended = True
        self.text += decoded
        self._cut = block[used:]

    def _fail(self, error: json.JSONDecodeError, where: str) -> NoReturn:
        # The error of a cut word or escape is at its first character.
        at_end = error.msg.startswith("Unterminated") or error.pos > len(self.text.rstrip()) - 8
        if at_end and self.bad is not None:
            raise InputError(
                f"{where}: not UTF-8 at byte {self.bad}; repair it, or get the file again"
            )
        if at_end and not self.ended:
            raise InputError(
                f"{where}: does not end within {LONGEST >> 20} MiB; is a quote missing?"
            )
        not_json(where, self.file, self.byte(error.pos), error.msg, cut=at_end)


def _after_space(text: str, at: int) -> int:
    found = _SPACES.match(text, at)
    assert found is not None  # it matches nothing, too
    return found.end()
