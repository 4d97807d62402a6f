"""What is in the store, what was made how often, and whether it is what it should be."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.store.files import file_sha256
from tasks.store.pieces import RECORD, digest

# What a run is for: adapters, recipes, answers and every number in the comparison. The rest
# (users, tokens, vectors) leads there, and may be left damaged where nothing asks for it again.
FINAL = ("meta_lora", "bank", "fusion", "stacking", "predictions", "score", "compare", "overall")

Pieces = dict[str, str]  # "stage/key" -> sha256 over its files and value


def whole(root: Path) -> Pieces:
    """The pieces that are whole. Read by the store's format, not by the store: it mends."""
    found = {}
    for record in sorted(root.glob(f"*/*/*/{RECORD}")):
        stage, key = record.relative_to(root).parts[0], record.parent.name
        try:
            read = json.loads(record.read_bytes())
            files, value_sha256 = read["files"], digest(read["value"])
            good = value_sha256 == read["value_sha256"] and all(
                file_sha256(record.parent / name) == sha for name, sha in files.items()
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if good:
            found[f"{stage}/{key}"] = digest([files, value_sha256])
    return found


def final(pieces: Pieces) -> Pieces:
    return {name: sha for name, sha in pieces.items() if name.split("/")[0] in FINAL}


@dataclass
class Ledger:
    """One run from an empty store to its end, through all its faults."""

    undisturbed: Pieces
    journal: Path
    damaged: Counter[str] = field(default_factory=Counter)  # by the driver, so to be made again
    before: Pieces = field(default_factory=dict)  # whole when a fault struck

    def strike(self, pieces: Pieces) -> None:
        """Note what is there at this moment: none of it may go."""
        self.before |= pieces

    def damage(self, piece: str) -> None:
        self.damaged[piece] += 1

    def unfinished(self, pieces: Pieces) -> list[str]:
        """The final pieces that a run must still make, or make again."""
        return sorted(final(self.undisturbed).keys() - pieces.keys())

    def lost(self, pieces: Pieces) -> list[str]:
        """Whole before a fault, and not there or another afterwards."""
        return sorted(
            name
            for name, sha in self.before.items()
            if pieces.get(name) != sha and not self.damaged[name]
        )

    def twice(self) -> list[str]:
        """Made more often than the driver gave reason for."""
        made: Counter[str] = Counter()
        if self.journal.exists():
            for line in self.journal.read_text(encoding="utf-8").splitlines():
                made[json.loads(line)["piece"]] += 1
        return sorted(name for name, times in made.items() if times > 1 + self.damaged[name])

    def differing(self, pieces: Pieces) -> list[str]:
        """Not as in the undisturbed run: other content, or a final piece that is not there.

        Others may be there: a run that lacks an anchor goes on with a smaller bank.
        """
        return sorted(
            name
            for name, sha in self.undisturbed.items()
            if pieces.get(name, "" if name in final(self.undisturbed) else sha) != sha
        )


@dataclass(frozen=True)
class Shown:
    """What a run says of itself at its end: the results it consists of, and its table."""

    results: frozenset[tuple[str, str]]  # uri, sha256
    table: tuple[tuple[str, ...], ...]

    @classmethod
    def read(cls, state: Path) -> Shown:
        """The last run's, from what it wrote beside the store."""
        last = max((state / "runs").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        text = (state / "last_comparison.txt").read_text(encoding="utf-8")
        # What changed since the run before is no result of this one.
        lines = [line for line in text.splitlines() if not line.startswith("note: since the run")]
        rows = [re.split(r"\s{2,}", line.strip()) for line in lines]
        header = rows[0]
        timed = header.index("seconds_per_user")  # the one column that is not a result
        return cls(
            frozenset(_references(json.loads(last.read_text(encoding="utf-8")))),
            tuple(
                tuple(row[:timed] + row[timed + 1 :] if len(row) == len(header) else row)
                for row in rows
            ),
        )


def _references(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        if {"uri", "sha256"} <= value.keys():
            yield value["uri"], value["sha256"]
        for item in value.values():
            yield from _references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)
