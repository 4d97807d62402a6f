"""Which pieces and checkpoints of a store have to go with a user, and why (`tasks.forget`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.forget.holding import Marks, holds
from tasks.prepare import POOLED_FILE
from tasks.store import checkpoints
from tasks.store.artifacts import Store
from tasks.store.files import PARTIAL
from tasks.store.pieces import RECORD

ROLES = ("base", "anchor", "few_shot")
# Pieces of many users in which nobody is named.
NAMELESS = ("tokens", "map", "compare", "overall", "refit")
# What is made with the bank, for the few-shot users it was made for.
AFTER_BANK = ("evidence", "fusion", "stacking", "predictions", "score")
# What is made with the base model besides.
AFTER_BASE = ("embedding", "anchors", "meta_lora", "bank", *AFTER_BANK)


@dataclass
class Known:
    """What the store says of a user. names: the user's id, and rows that have the user's items."""

    names: set[str] = field(default_factory=set)
    texts: set[str] = field(default_factory=set)
    roles: set[str] = field(default_factory=set)
    # Few-shot users, or all, of the same tables: theirs was made with what the user taught.
    few_shot: set[str] = field(default_factory=set)
    company: set[str] = field(default_factory=set)
    anchors: set[str] = field(default_factory=set)
    # Anchors of the company: a cluster's LoRA names none of those whom it was trained on.
    others: set[str] = field(default_factory=set)
    base_trained: bool = False
    # Tables in which the user may be without being named.
    unsaid: list[str] = field(default_factory=list)

    def marks(self) -> Marks:
        return Marks(frozenset(self.names), frozenset(self.texts))

    def company_in(self, stage: str) -> set[str]:
        """Whose pieces of a stage were made with what was trained on the user."""
        if self.base_trained and stage == "meta_lora":
            return self.company | self.anchors | self.others
        if self.base_trained and stage in (*AFTER_BASE, "refit"):
            return self.company | self.anchors
        if self.anchors and stage in ("bank", *AFTER_BANK):
            return self.few_shot | self.anchors
        return set()


def pieces(where: Store) -> Iterator[tuple[str, Path, dict[str, Any] | None]]:
    """Stage, folder and record of every piece; None where the record cannot be read."""
    for folder in sorted(where.root.glob("*/*/*")):
        if folder.is_dir():
            try:
                record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                record = None
            yield folder.parent.parent.name, folder, record


def known_of(where: Store, user_id: str, texts: set[str]) -> Known:
    """Who the user is in this store. `texts`: those that the source files have of the user."""
    known = Known({user_id}, set(texts))
    listed = list(pieces(where))
    tables = [folder for stage, folder, _ in listed if stage == "prepare"]
    known.unsaid = _unsaid(listed, user_id)
    for folder in tables:
        _own_rows(folder, user_id, known)
    for folder in tables:
        _roles(folder, known)
    known.base_trained = "base" in known.roles and any(
        _trained_base(stage, record) for stage, _, record in listed
    )
    for anchor, members in _trained_on(listed):
        if known.names.intersection(members):
            known.anchors.add(anchor)
        elif known.company.intersection(members):
            known.others.add(anchor)
    return known


def _trained_on(
    listed: list[tuple[str, Path, dict[str, Any] | None]],
) -> Iterator[tuple[str, list[str]]]:
    """Each anchor with those whom it was trained on, by all that says so: one may be damaged."""
    for stage, _, record in listed:
        if record and stage == "anchors":
            for anchor in record["value"]["anchors"]:
                yield anchor["user_id"], anchor["members"]
        elif record and stage == "bank":
            yield from record["value"].get("users", {}).items()


def _unsaid(listed: list[tuple[str, Path, dict[str, Any] | None]], user_id: str) -> list[str]:
    """Tables that an earlier version pooled without writing down whom.

    But for those that have the user's own row, and those that a later version made again.
    """
    found = [(f, record["value"]) for stage, f, record in listed if record and stage == "prepare"]
    said = [value["sha256"] for folder, value in found if (folder / POOLED_FILE).exists()]
    lines = []
    for folder, value in found:
        if (folder / POOLED_FILE).exists() or value.get("sha256") in said:
            continue
        if not value.get("counts", {}).get("pooled_users"):
            continue
        if all(row["user_id"] != user_id for _, row in _rows(folder)):
            lines.append(
                f"{folder}: an earlier version pooled users here and did not write down whom; run "
                "the program on these data again, and then call again"
            )
    return lines


def _own_rows(folder: Path, user_id: str, known: Known) -> None:
    """Texts of the user's row; and the name of the author's row that has what the user brought."""
    import polars as pl

    for _, row in _rows(folder):
        if row["user_id"] == user_id:
            known.texts |= _texts(row)
    if (file := folder / POOLED_FILE).exists():
        pooled = pl.read_parquet(file).filter(pl.col("user_id") == user_id)
        known.names |= set(pooled["row"])


def _roles(folder: Path, known: Known) -> None:
    rows = list(_rows(folder))
    found = {role for role, row in rows if row["user_id"] in known.names}
    known.roles |= found
    if found:
        known.company |= {row["user_id"] for _, row in rows}
        known.few_shot |= {row["user_id"] for role, row in rows if role == "few_shot"}


def _rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import polars as pl

    for role in ROLES:
        if (file := folder / f"{role}.parquet").exists():
            for row in pl.read_parquet(file).iter_rows(named=True):
                yield role, row


def _texts(row: dict[str, Any]) -> set[str]:
    found = {item["text"] for item in row["profile"]} | {item["input"] for item in row["query"]}
    return {text for text in found if text.strip()}


def _trained_base(stage: str, record: dict[str, Any] | None) -> bool:
    if stage == "base_model":
        return record is None or record["value"].get("model") == "tiny"
    return stage == "task_adapt"


def reason_to_remove(
    stage: str, folder: Path, record: dict[str, Any] | None, known: Known
) -> str | None:
    """Why a piece has to go, in a few words, or None."""
    if record is None:
        # A removal that was cut off may have left the user's texts without the record.
        held = piece_holds(folder, known.marks(), unreadable=False)
        return "holds the user" if held else "damaged or half made"
    if stage == "folder_hash":
        return None
    if _trained_base(stage, record):
        return "trained on the user" if "base" in known.roles else None
    if stage in NAMELESS:
        return "holds many users without names"
    if stage == "meta_lora" and record["value"]["anchor"] in known.anchors | known.names:
        return "trained on the user"
    if piece_holds(folder, known.marks()):
        return "holds the user"
    company = known.company_in(stage)
    if company and piece_holds(folder, Marks(frozenset(company))):
        return "made with what was trained on the user"
    return None


def checkpoints_to_remove(where: Store, known: Known) -> dict[Path, str]:
    """Trainings that were cut off, of the user or over what was trained on the user, and why."""
    found = {}
    for file in sorted(checkpoints.folder(where).glob("*/*")):
        company = Marks(frozenset(known.company_in(file.parent.name)))
        try:
            if file.name.startswith(PARTIAL):
                found[file] = "half written"
            elif holds(file, known.marks()):
                found[file] = "trained on the user"
            elif company.ids and holds(file, company):
                found[file] = "made with what was trained on the user"
        except Exception:  # whose it is cannot be read
            found[file] = "damaged"
    return found


def piece_holds(folder: Path, marks: Marks, unreadable: bool = True) -> bool:
    """Whether any file of a piece holds a mark. unreadable: what of one that cannot be read."""
    for file in sorted(folder.rglob("*")):
        try:
            if file.is_file() and holds(file, marks):
                return True
        except Exception:
            if unreadable:
                return True
    return False
