"""Remove a user, and all that was made of the user's texts, and prove it by a search.

    python -m tasks.forget USER_ID [--data PATH] [--store PLACE]

Removed from the store: every piece that holds the user's id or a text of the user's; every LoRA and
tiny base model that was trained on the user's items, and what was made with those for the users of
the same data; every piece without names (tokens, maps, draws), since nothing tells whose they are.
Removed beside it: reports and runs that name any of it, and the id in logs. In MLflow: artifacts
and names. What others lose with it is computed again by their next run, from their data.

The file the user came from is not touched: it is named, and the user is back after the next run
where it still holds the user. `--data` names one that no run remembers. The search afterwards goes
over everything again. Exit code 0: nothing is left; 1: something is, and is said; 2: no such user.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks import checkpoints, spool
from tasks.artifacts import RECORD, Store
from tasks.errors import InputError, label
from tasks.files import PARTIAL
from tasks.forget_records import (
    Records,
    forget_in_mlflow,
    forget_in_prefect,
    left_in_mlflow,
    mlflow_uris,
)
from tasks.forget_sources import in_sources
from tasks.holding import Marks, holds, strings
from tasks.report.table import REPORT_FILE, RUNS_FOLDER, TABLE_FILE
from tasks.stage import store, store_at

ROLES = ("base", "anchor", "few_shot")
# Pieces of many users in which nobody is named.
NAMELESS = ("tokens", "map", "compare", "overall", "refit")
# What is made with the bank, for the few-shot users it was made for.
AFTER_BANK = ("evidence", "fusion", "stacking", "predictions", "score")
# What is made with the base model besides.
AFTER_BASE = ("embedding", "anchors", "meta_lora", "bank", *AFTER_BANK)
# They say what to remove, so they go last: a call that was cut off is simply made again.
LAST = ("prepare", "synthetic")


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
    base_trained: bool = False

    def marks(self) -> Marks:
        return Marks(frozenset(self.names), frozenset(self.texts))

    def company_in(self, stage: str) -> set[str]:
        """Whose pieces of a stage were made with what was trained on the user."""
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
    for folder in tables:
        _own_rows(folder, user_id, known)
    for folder in tables:
        _roles(folder, known)
    known.base_trained = "base" in known.roles and any(
        _trained_base(stage, record) for stage, _, record in listed
    )
    for stage, _, record in listed:
        if record and stage == "anchors":
            known.anchors |= {
                anchor["user_id"]
                for anchor in record["value"]["anchors"]
                if known.names.intersection(anchor["members"])
            }
    return known


def _own_rows(folder: Path, user_id: str, known: Known) -> None:
    """Texts of the user's row; and names of rows in which an author's users are pooled."""
    for _, row in _rows(folder):
        own = _texts(row)
        if row["user_id"] == user_id:
            known.texts |= own
        elif known.texts and known.texts <= own:
            known.names.add(row["user_id"])


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
        return "damaged or half made"
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


def piece_holds(folder: Path, marks: Marks) -> bool:
    """Whether any file of a piece holds a mark; one that cannot be read counts as holding it."""
    try:
        return any(holds(file, marks) for file in sorted(folder.rglob("*")) if file.is_file())
    except Exception:
        return True


def forget(where: Store, user_id: str, data: Path | None = None) -> tuple[list[str], list[str]]:
    """Forget a user; (what was done, what is left), in lines.

    Raises InputError where nothing knows the user, or a run is under way.
    """
    where.sweep()
    checkpoints.sweep(where)
    if working := where.working():
        raise InputError(
            f"store: {where.root / working[0]} is being made by a run; let it end, or remove that "
            "where its machine is gone, and call again"
        )
    where.fetch_all()
    state = where.root.parent
    spool.clear(state)
    if late := spool.waiting(state):
        raise InputError(
            f"{state / spool.FOLDER}: {sum(late.values())} entries wait to be logged to MLflow and "
            "may name the user; `python -m tasks.spool`, or remove that folder, and call again"
        )
    tracked = mlflow_uris(state)
    runs = _run_files(state)
    sources, texts = in_sources(where, [run for _, run in runs], user_id, data)
    known = known_of(where, user_id, texts)
    plan = [
        (stage, folder, reason)
        for stage, folder, record in pieces(where)
        if (reason := reason_to_remove(stage, folder, record, known))
    ]
    cut_off = checkpoints_to_remove(where, known)
    marks = known.marks()
    uris = {f"{stage}/{folder.name}" for stage, folder, _ in plan}
    certain = [
        reason
        for reason in (*(reason for _, _, reason in plan), *cut_off.values())
        if reason in ("holds the user", "trained on the user")
    ]
    touched = {file for file, run in runs if _names(run, uris, marks)} if certain else set()
    mlflow = Records()
    for uri in tracked:
        mlflow += forget_in_mlflow(uri, marks, known.anchors, uris if certain else set())
    if not (certain or mlflow.done or sources):
        raise InputError(f"{label(user_id)}: no such user in {where.root}, MLflow or known data")
    done = [f"{name}: {count} removed" for name, count in mlflow.done.items()]
    flow_runs = {file.stem for file in touched} | mlflow.flow_runs
    said, left = forget_in_prefect(flow_runs)
    done += said
    if certain or mlflow.done:
        done += _forget_beside(state, touched, marks)
        done += _remove(where, plan)
        for file in cut_off:
            file.unlink()
        for reason, count in Counter(cut_off.values()).items():
            done.append(f"checkpoints removed ({reason}): {count}")
    done += _told(known)
    searched, found = search(where, marks)
    left += mlflow.left + found
    left += [line for uri in tracked for line in left_in_mlflow(uri, marks)]
    left = list(dict.fromkeys(left))
    done.append(
        f"proof: searched {searched} files of the store and beside it, and MLflow: "
        + (f"{len(left)} left" if left else "nothing of the user is left")
    )
    done += [f"{source}: still holds the user, who comes back with it" for source in sources]
    return done, left


def _remove(where: Store, plan: list[tuple[str, Path, str]]) -> list[str]:
    counts: Counter[str] = Counter()
    for stage, folder, reason in sorted(plan, key=lambda item: item[0] in LAST):
        where.remove(stage, folder.name)
        counts[f"store: {stage}: pieces removed ({reason})"] += 1
    return [f"{what}: {count}" for what, count in counts.items()]


def _told(known: Known) -> list[str]:
    lines = []
    if known.base_trained:
        lines.append("trained on the user: the base model; all that it was for is made again")
    if known.anchors:
        names = ", ".join(sorted(map(label, known.anchors)))
        lines.append(f"trained on the user: anchors {names}; they are removed, and trained again")
    return lines


def _run_files(state: Path) -> list[tuple[Path, dict[str, Any]]]:
    found = []
    for file in sorted((state / RUNS_FOLDER).glob("*.json")):
        try:
            found.append((file, json.loads(file.read_text(encoding="utf-8"))))
        except ValueError:
            found.append((file, {}))
    return found


def _names(run: dict[str, Any], uris: set[str], marks: Marks) -> bool:
    found = list(strings(run))
    return not run or marks.in_values(found) or any(text in uris for text, _ in found)


def _forget_beside(state: Path, runs: set[Path], marks: Marks) -> list[str]:
    """Runs and reports removed; in logs, which servers go on writing, the id is crossed out."""
    removed = 0
    for file in (*sorted(runs), state / REPORT_FILE, state / TABLE_FILE):
        if file.exists():
            file.unlink()
            removed += 1
    crossed = sum(_cross_out(file, marks) for file in sorted((state / "logs").glob("*.log")))
    return [f"beside the store: {removed} files removed, {crossed} names crossed out in logs"]


def _cross_out(file: Path, marks: Marks) -> int:
    """Ids in a log become x's of the same length, in place: it may be open for appending."""
    text = file.read_bytes().decode("utf-8", "surrogateescape")
    places = [match.span() for match in marks.words.finditer(text)]
    with file.open("r+b") as opened:
        for start, end in places:
            opened.seek(len(text[:start].encode("utf-8", "surrogateescape")))
            opened.write(b"x" * len(text[start:end].encode("utf-8", "surrogateescape")))
    return len(places)


def search(where: Store, marks: Marks) -> tuple[int, list[str]]:
    """How many files were searched, and those that hold a mark or cannot be read."""
    where.fetch_all()
    state = where.root.parent
    beside = [state / REPORT_FILE, state / TABLE_FILE, *checkpoints.folder(where).rglob("*"),
              *(state / RUNS_FOLDER).glob("*.json"),
              *(state / "logs").glob("*.log")]  # fmt: skip
    files = sorted(file for file in (*where.root.rglob("*"), *beside) if file.is_file())
    left = []
    for file in files:
        try:
            found = "holds the user" if holds(file, marks) else None
        except Exception as error:
            found = f"cannot be searched ({type(error).__name__})"
        if found:
            left.append(f"{file}: {found}")
    return len(files), left


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.forget",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("user", help="the user's id")
    parser.add_argument("--data", type=Path, help="a file or folder that the user came from")
    parser.add_argument("--store", help="a folder or URL; default: MTA_STORE, else .mta/store")
    given = parser.parse_args(arguments)
    try:
        where = store_at(given.store) if given.store else store()
        done, left = forget(where, given.user, given.data)
    except InputError as error:
        print(f"mta: {error}", file=sys.stderr)
        return 2
    for line in done:
        print(f"mta: {line}")
    for line in left:
        print(f"mta: LEFT: {line}", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
