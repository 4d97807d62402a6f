"""Where results live and how they are found again.

A *piece* is the result of one unit of work: a folder of files plus a small JSON value, stored under
the key of what it depends on. The key holds the hashes of the inputs, the options the stage reads,
the seed, the stage's version and the versions of the libraries that decide the numbers; not the
run, not a path, not the time.

    <store>/<stage>/<key[:2]>/<key>/record.json + files

A piece is written beside its place and renamed into it, so it is there whole or not at all. It is
verified each time it is found: a file that is missing or does not match its recorded hash makes
the piece be made again. It is verified once more after it was read (`confirm`): a piece is put in
its place only where all that was found for it is still as it was found. Between stages travel
references `{uri, sha256, kind}`. Whoever makes a piece claims it first (claims.py), so that two
runs share what both want.

Prefect's own result cache is not used for this: it keeps one key per task run, and here one task
run holds many users, each of whom must be found again on their own (`find_rows`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tasks.errors import InputError
from tasks.store.claims import Claims, FolderBoard
from tasks.store.files import file_sha256, fsync
from tasks.store.pieces import (
    NOTES,
    RECORD,
    Piece,
    Ref,
    Stamp,
    content,
    digest,
    folder_files,
    row_keys,
    stamp_of,
    verified,
)
from tasks.store.processes import abandoned, host, own_prefix

CLAIMS_FOLDER = ".claims"
# In front of whose it is (processes.py): a folder that is being filled.
MAKING = ".making-"


class NotFound(Exception):
    """A piece is to be made, in a store that only finds."""


class Store:
    """The pieces under one folder. `only_finds`: what would be made raises NotFound instead."""

    only_finds = False

    def __init__(self, root: Path, warn: Callable[[str], None] = lambda _line: None) -> None:
        self.root = root
        self.warn = warn
        self.claims = Claims(FolderBoard(root / CLAIMS_FOLDER), warn)
        # What was found here and may have been read: stage and key -> hash and record's stamp.
        self._found: dict[tuple[str, str], tuple[str, Stamp]] = {}

    def find(self, stage: str, key: str) -> Piece | None:
        """The piece of `key`, verified, or None; a damaged piece is removed and said so."""
        folder = self._place(stage, key)
        while folder.exists():
            judged = _stamp(folder)
            seen = verified(folder)
            if not isinstance(seen, str):
                record, stamp = seen
                self._found[stage, key] = (content(record), stamp)
                return self._piece(stage, key, record, cached=True)
            if self._discard(folder, judged):
                self.warn(f"store: {stage}/{key[:12]}: {seen}; this piece is made again")
                return None
        return None

    def confirm(self) -> None:
        """Raises InputError when a piece that was found here has changed since.

        Between the check of a file and its reading lies a moment, a second or two where libraries
        are imported; and what was made of a damaged file would be found for good.
        """
        for (stage, key), found in list(self._found.items()):
            seen = verified(self._place(stage, key))
            # The stamp: it may have been damaged, noticed by another and made again meanwhile.
            if isinstance(seen, str) or (content(seen[0]), seen[1]) != found:
                raise InputError(
                    f"store: {stage}/{key[:12]} was damaged or removed while it was read, so "
                    "nothing is made of it; start the run again"
                )

    def get(
        self,
        stage: str,
        key: str,
        make: Callable[[Path], dict[str, Any]],
        rows: Collection[str] = (),
    ) -> Piece:
        """The piece of `key`: found, or made by `make(folder)`, which returns the JSON value.

        Under the key NOTES `make` may return what differs from one making to the next. `rows`: keys
        of the rows the piece will hold. While another makes the piece, or one with any of the rows,
        this waits; `make` then finds those rows.
        """
        found = self.find(stage, key)
        if found:
            return found
        with self.claimed(stage, [key, *rows]):
            return self.find(stage, key) or self.make(stage, key, make)

    def claimed(self, stage: str, keys: Collection[str]) -> AbstractContextManager[None]:
        """Claim `keys` for who makes several pieces at once; look for them again once inside."""
        if self.only_finds and keys:
            raise NotFound(stage)
        return self.claims.held(stage, keys)

    def make(self, stage: str, key: str, make: Callable[[Path], dict[str, Any]]) -> Piece:
        """Run `make` in a fresh folder and put the result in its place, whole or not at all."""
        self._found.pop((stage, key), None)  # found before, and damaged since: no part of the work
        place = self._place(stage, key)
        place.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=own_prefix(MAKING), dir=place.parent))
        try:
            started = time.perf_counter()
            value = make(work)
            self.confirm()
            notes = value.pop(NOTES, {})
            notes.setdefault("seconds", round(time.perf_counter() - started, 3))
            files = folder_files(work)
            record = {
                "stage": stage,
                "key": key,
                "files": files,
                "value": value,
                "value_sha256": digest(value),
                "notes": notes,
                "notes_sha256": digest(notes),
            }
            text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
            (work / RECORD).write_text(text)
            for path in (*work.rglob("*"), work):
                fsync(path)
            try:
                work.rename(place)
            except OSError:
                # Another run made the same piece meanwhile; theirs is as good, unless damaged.
                if self.find(stage, key) is None:
                    work.rename(place)
            fsync(place.parent)
            _note_made(stage, key)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        # As it will be found: in JSON a tuple is a list.
        return self._piece(stage, key, json.loads(text), cached=False)

    def open(self, ref: Ref) -> Piece:
        """The piece a reference points to. Raises InputError when it is gone or another."""
        stage, _, key = ref["uri"].partition("/")
        piece = self.find(stage, key)
        if piece is None or piece.ref["sha256"] != ref["sha256"]:
            raise InputError(
                f"store: {ref['uri']} is gone or damaged since it was made; start the run again"
            )
        return piece

    def find_rows(self, stage: str, keys: Iterable[str]) -> dict[str, tuple[Piece, int]]:
        """Where single rows (users) were made before: row key -> (piece, row number).

        Pieces that hold many rows list the rows' keys in `value["rows"]`. Only pieces that hold
        a wanted row are verified; keys that are in none are left out.
        """
        wanted = set(keys)
        found: dict[str, tuple[Piece, int]] = {}
        for key, rows in self._rows(stage):
            if not wanted:
                break
            if wanted.isdisjoint(rows) or (piece := self.find(stage, key)) is None:
                continue
            for number, row in enumerate(piece.value["rows"]):
                if row in wanted:
                    found[row] = (piece, number)
                    wanted.discard(row)
        return found

    def remove(self, stage: str, key: str) -> None:
        """Remove the piece."""
        self._found.pop((stage, key), None)
        shutil.rmtree(self._place(stage, key))

    def fetch_all(self) -> None:
        """Have every piece below `root`, where they all are (in a remote store they may not be)."""

    def hash_folder(self, folder: Path, patterns: Sequence[str]) -> str:
        """sha256 over the files in a folder outside the store (a model, say).

        Only files that match one of `patterns` count. Remembered by the machine, and the files'
        names, sizes and times, so that gigabytes are read once: on another machine, which shares
        the store, something else may lie at the same place.
        """
        files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
        names = [file.relative_to(folder).as_posix() for file in files]
        stats = [
            [name, file.stat().st_size, file.stat().st_mtime_ns]
            for name, file in zip(names, files, strict=True)
        ]
        key = digest([host(), str(folder.resolve()), stats])

        def make(_out: Path) -> dict[str, Any]:
            return {"files": {n: file_sha256(file) for n, file in zip(names, files, strict=True)}}

        return self.get("folder_hash", key, make).ref["sha256"]

    def sweep(self) -> None:
        """Remove what processes of this machine that were killed left half-made or claimed."""
        self.working()
        for left in self.root.glob(f"*/*/{MAKING}*"):
            if abandoned(left.name, MAKING):
                shutil.rmtree(left, ignore_errors=True)

    def working(self) -> list[str]:
        """Where claims and unfinished pieces are just now: paths, and URLs in a store at one."""
        made = sorted(self.root.glob(f"*/*/{MAKING}*"))
        return [*self.claims.in_force(), *map(str, made)]

    def _rows(self, stage: str) -> Iterator[tuple[str, list[str]]]:
        """Key and row keys of every piece of a stage; those that cannot be read are left out."""
        for path in sorted((self.root / stage).glob(f"*/*/{RECORD}")):
            try:
                yield path.parent.name, row_keys(path)
            except OSError:
                continue

    def _discard(self, folder: Path, judged: Stamp | None) -> bool:
        """Remove a damaged piece, unless another has made it again since it was judged.

        judged: its record's stamp from before. Returns whether it is gone.
        """
        aside = Path(tempfile.mkdtemp(prefix=own_prefix(MAKING), dir=folder.parent))
        taken = aside / folder.name
        try:
            # Whoever makes it again does so at once in this place: what was taken is looked at.
            with contextlib.suppress(FileNotFoundError):
                folder.rename(taken)
            if not taken.exists() or _stamp(taken) == judged:
                return True
            # Where yet another stands there by now, that one is as good.
            with contextlib.suppress(OSError):
                taken.rename(folder)
            return False
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _place(self, stage: str, key: str) -> Path:
        return self.root / stage / key[:2] / key

    def _piece(self, stage: str, key: str, record: dict[str, Any], cached: bool) -> Piece:
        ref = Ref(uri=f"{stage}/{key}", sha256=content(record), kind=stage)
        return Piece(ref, record["value"], record["notes"], self._place(stage, key), cached)


def _stamp(folder: Path) -> Stamp | None:
    """The stamp of a piece's record, None where there is none."""
    try:
        return stamp_of(folder / RECORD)
    except FileNotFoundError:
        return None


def _note_made(stage: str, key: str) -> None:
    """One line in the file that MTA_JOURNAL names, if it does: what was made, by which process.

    How tests see that no work is done twice, also where the second result was thrown away.
    """
    if journal := os.environ.get("MTA_JOURNAL"):
        with open(journal, "a", encoding="utf-8") as file:
            file.write(json.dumps({"piece": f"{stage}/{key}", "pid": os.getpid()}) + "\n")
