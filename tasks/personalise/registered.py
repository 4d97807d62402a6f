"""A registered bank (tasks/tracking/registry.py), loaded: what MLflow's model does."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from tasks.errors import InputError
from tasks.lamp.formats import History
from tasks.personalise.new_users import Keep, each_made, histories, place_of, recipe_values
from tasks.personalise.personaliser import Personaliser
from tasks.results.run import Run
from tasks.results.store import reading_from
from tasks.tracking.registry import RUN_FILE, STORE_FOLDER, new_users_method
from tasks.tracking.taken_run import with_base


class RegisteredBank:
    """The bank whose artifacts lie in a folder, loaded; nothing is put into the run's store.

    base: where its base model lies on this machine, if not where the run had it.
    """

    def __init__(self, folder: Path, base: str | None = None) -> None:
        self.store = folder / STORE_FOLDER
        run = with_base(Run.model_validate_json((folder / RUN_FILE).read_bytes()), base)
        (cell,) = run.cells
        with reading_from(self.store):
            self.personaliser = Personaliser(cell, new_users_method(cell) or "mta")

    def __call__(
        self, records: Sequence[Mapping[str, Any]], keep: str, to: Path
    ) -> list[dict[str, Any]]:
        """For each user the `user_id` and, with keep `recipe`, `anchors` and `weights`; with keep
        `folder` the PEFT `folder` in `to`; or an `error`.

        records: users as a user file has them. Raises InputError where `keep` is neither.
        """
        if keep not in get_args(Keep):
            raise InputError(f"keep {keep!r}: give one of {', '.join(get_args(Keep))}")
        personaliser, written = self.personaliser, to if keep == "folder" else None
        with reading_from(self.store), tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "users.jsonl"
            file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
            read = histories(personaliser.cell, file) if records else []
            users = [one for one in read if isinstance(one, History)]
            made = {
                user.user_id: one for user, one in each_made(personaliser, users, written, "folder")
            }
        rows: list[dict[str, Any]] = []
        for record, user in zip(records, read, strict=True):
            one = made[user.user_id] if isinstance(user, History) else user
            if isinstance(one, InputError):
                what: dict[str, Any] = {"error": str(one).removeprefix(f"{file}: ")}
            elif written and isinstance(user, History):
                what = {"folder": str(place_of(written, user, "folder"))}
            else:
                what = recipe_values(one)
            rows.append({"user_id": str(record.get("user_id")), **what})
        return rows
