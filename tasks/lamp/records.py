"""The records of a JSON list of any size, in order, in bounded memory.

A block of the file is cut where one record seems to end, and read in one go as columns of users of
the usual shape (tasks/lamp/usual.py). That it can be read is the proof that the cut was right: what
stands before the cut is then whole values, and JSON has one reading only. Blocks ahead are read
meanwhile, in other threads. Where one cannot be read, because a record is of another shape or
wrong, the standard library reads its records one at a time and says what is wrong where. Of a key
that stands twice in one object the last counts, as `json.load` has it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from tasks.errors import InputError
from tasks.lamp.checks import decoder, not_a_list, not_json, reading
from tasks.lamp.usual import Block, Usual

# Bytes read at once: many records of most data, and few enough to stay near the processor.
BLOCK = 4 << 20
# Blocks that are read at a time, the one that is worked on included.
AHEAD = 4
# The longest record that is taken. A longer one is a damaged file, and memory stays bounded.
LONGEST = 64 << 20
# How many places of a block are tried for the cut.
TRIES = 100

SPACE = b" \t\n\r"
# A user ends with its last list, and items hold none. Users of another order of fields are read
# one by one.
_BORDER = re.compile(rb"\][ \t\n\r]*\}[ \t\n\r]*(,)[ \t\n\r]*\{")
_SPACES = re.compile(r"[ \t\n\r]*")
_JSON = decoder()


def read_records(file: Path, usual: Usual | None) -> Iterator[tuple[int, Block | list[Any]]]:
    """(index of the first, records) of all records of the non-empty JSON list in `file`, in order.

    usual: where it knows a shape (`Usual.learn`), blocks of that shape come as it reads them; all
    other records as lists of dicts, lists, strings and numbers.
    Raises InputError, which names the record, where the file stops being JSON or UTF-8 and where a
    record is longer than LONGEST bytes; and for a file that holds anything else than a list.
    """
    with (
        reading(file),
        file.open("rb", buffering=0) as handle,
        ThreadPoolExecutor(2, thread_name_prefix="records") as threads,
    ):
        stream = _Stream(file, handle)
        stream.start()
        index = 0
        while not stream.ended:
            for block in stream.blocks(usual, threads):
                yield index, block
                index += len(block.lengths)
            if not stream.ended:
                records = stream.careful(index)
                yield index, records
                index += len(records)
                stream.close()


class _Stream:
    """The part of the file that is not used up yet. It begins where a record begins."""

    def __init__(self, file: Path, handle: BinaryIO) -> None:
        self.file = file
        self.handle = handle
        self.rest = b""
        self.offset = 0  # of the first byte of `rest` in the file
        self.whole = False  # `rest` goes to the end of the file
        self.closed = False  # the list has ended
        self.ended = False  # and nothing follows it

    def start(self) -> None:
        """Up to the first record."""
        self._read(BLOCK)
        if self.rest.startswith(codecs.BOM_UTF8):
            self._use(len(codecs.BOM_UTF8))
        if self._first() != b"[":
            not_a_list(self.file)
        self._use(1)
        if self._first() == b"]":
            raise InputError(f"{self.file}: holds an empty list; expected at least one user")

    def blocks(self, usual: Usual | None, threads: ThreadPoolExecutor) -> Iterator[Block]:
        """The next blocks of the usual shape, up to one that is not."""
        if usual is None or usual.shape is None:
            return
        cut: deque[tuple[bytes, Future[Block | None]]] = deque()
        ahead = 1  # and more with each success: where no block is usual, few are tried in vain
        while True:
            while len(cut) < ahead and (listed := self._cut()):
                cut.append((listed, threads.submit(usual.read, listed, usual.shape)))
            if not cut:
                return
            users = cut[0][1].result()
            if users is None:
                # Back to where this block begins; those after it were cut on its account.
                self._put_back([listed for listed, _ in cut])
                return
            cut.popleft()
            self.ended = self.whole and not self.rest and not cut
            ahead = min(ahead + 1, AHEAD)
            yield users

    def careful(self, index: int) -> list[Any]:
        """One record at least, and as many more as fill a block; `index` is the first one's.

        Up to one that cannot be read: that is said when it is the first, after those before it.
        """
        records: list[Any] = []
        while not records:
            text, bad = self._text()
            at = 0
            while not self.closed and at < BLOCK:
                try:
                    read = self._record(text, at, bad, index + len(records))
                except InputError:
                    if not records:
                        raise
                    break
                if read is None:
                    break
                record, at, self.closed = read
                records.append(record)
            self._use(len(text[:at].encode()))
            if not records:
                self._read(max(BLOCK, len(self.rest)))
        return records

    def _record(
        self, text: str, at: int, bad: int | None, index: int
    ) -> tuple[Any, int, bool] | None:
        """The record at `at`, where the next one begins, and whether it was the last.

        bad: the byte of the file at which the text ends because what follows is not UTF-8.
        None where more of the file must be read first.
        """
        try:
            record, end = _JSON.raw_decode(text, _after_space(text, at))
            end = _after_space(text, end)
            if text[end : end + 1] not in ("]", ","):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
            return record, end + 1, text[end] == "]"
        except json.JSONDecodeError as error:
            if not (self.whole or bad is not None or len(self.rest) >= LONGEST):
                return None
            self._fail(error, text, bad, index)
        except (RecursionError, ValueError) as error:
            raise InputError(
                f"{self.file}: record {index}: cannot be read ({error}); repair it"
            ) from None

    def _fail(
        self, error: json.JSONDecodeError, text: str, bad: int | None, index: int
    ) -> NoReturn:
        where = f"{self.file}: record {index}"
        # A word or an escape that is cut off is told of at its first character.
        at_end = error.msg.startswith("Unterminated") or error.pos > len(text.rstrip()) - 8
        if at_end and bad is not None:
            raise InputError(f"{where}: not UTF-8 at byte {bad}; repair it, or get the file again")
        if at_end and not self.whole:
            raise InputError(
                f"{where}: does not end within {LONGEST >> 20} MiB; is a quote missing?"
            )
        place = self.offset + len(text[: error.pos].encode())
        not_json(where, self.file, place, error.msg, cut=at_end)

    def close(self) -> None:
        """After the list: white space up to the end of the file, or it is more than one list."""
        if not self.closed:
            return
        if self._first():
            where = f"{self.file}: after its list"
            not_json(where, self.file, self.offset, "Extra data", cut=False)
        self.ended = True

    def _text(self) -> tuple[str, int | None]:
        """`rest` as text, and where in the file it stops being UTF-8, if it does."""
        try:
            # The first bytes of a character whose others are not read yet are left.
            return codecs.utf_8_decode(self.rest, "strict", self.whole)[0], None
        except UnicodeDecodeError as error:
            return self.rest[: error.start].decode(), self.offset + error.start

    def _first(self) -> bytes:
        """The first byte that is no white space, which is used up before it; b"" at the end."""
        while not (rest := self.rest.lstrip(SPACE)) and not self.whole:
            self._use(len(self.rest))
            self._read(BLOCK)
        self._use(len(self.rest) - len(rest))
        return self.rest[:1]

    def _cut(self) -> bytes | None:
        """The next block as a list of its own, used up; None if it is not sure where it ends."""
        self._read(BLOCK - len(self.rest))
        while (end := self._border()) is None:
            if len(self.rest) > 2 * BLOCK:
                return None
            self._read(BLOCK)
        if not self.rest:
            return None
        # Its last byte is the comma after it; the last block has the list's own end.
        last = self.whole
        listed = b"".join((b"[", memoryview(self.rest)[: end if last else end - 1], b"]"[last:]))
        self._use(end)
        return listed

    def _put_back(self, blocks: list[bytes]) -> None:
        """Undo `_cut` for these blocks, the last ones that were cut."""
        parts = [listed[1:-1] + b"," for listed in blocks]
        if self.whole and not self.rest:
            parts[-1] = blocks[-1][1:]
        self.offset -= sum(map(len, parts))
        self.rest = b"".join((*parts, self.rest))

    def _border(self) -> int | None:
        """Where the next record may begin; the end where the file ends."""
        if self.whole:
            return len(self.rest)
        at = len(self.rest)
        for _ in range(TRIES):
            at = self.rest.rfind(b"]", 0, at)
            if at < 0:
                break
            if found := _BORDER.match(self.rest, at):
                return found.end(1)
        return None

    def _read(self, count: int) -> None:
        while count > 0 and not self.whole:
            more = self.handle.read(count)
            self.whole = not more
            self.rest = self.rest + more if self.rest else more
            count -= len(more)

    def _use(self, count: int) -> None:
        self.rest = self.rest[count:]
        self.offset += count


def _after_space(text: str, at: int) -> int:
    found = _SPACES.match(text, at)
    assert found is not None  # it matches nothing, too
    return found.end()
