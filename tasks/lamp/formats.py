"""Reads LaMP data in the two formats that exist, checks it, and counts what it leaves out.

User file (OPPU, Per-Pcs, MTA): a list of {user_id, profile: [item], query: [{id, input, gold}]}.
LaMP official: `{split}_questions.json`, a list of {id, input, profile: [item]}, and
`{split}_outputs.json`, {task, golds: [{id, output}]}; each question is a user of its own.

    loaded = read_users(Path("data/lamp2m"), get_task("LaMP-2M"))
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from tasks.errors import InputError
from tasks.lamp import citations
from tasks.lamp.checks import kind, read_json, read_list, short, text
from tasks.lamp.definitions import LampTask

ROLES = ("base", "anchor", "few_shot")
ROLE_FILE_NAMES: dict[str, tuple[str, ...]] = {
    "base": ("user_base_LLM.json",),
    "anchor": ("user_anchor_candidate.json",),
    "few_shot": (
        "user_few_shot.json",
        "user_test_100.json",
        "test_100.json",
        "test_100/user_test_100.json",
        "test_100/test_100.json",
    ),
}
# LaMP withholds the golds of its test split, so it is never read.
SPLITS = ("dev", "train")

PROFILE_TYPE = pl.List(pl.Struct({"id": pl.String, "text": pl.String, "answer": pl.String}))
QUERY_TYPE = pl.List(pl.Struct({"id": pl.String, "input": pl.String, "gold": pl.String}))
USERS_SCHEMA = {
    "user_id": pl.String(),
    "role": pl.String(),
    "profile": PROFILE_TYPE,
    "query": QUERY_TYPE,
}

EMPTY_ITEM = "profile item with empty text or answer"
DUPLICATE_ITEM = "profile item that stands twice in one profile"
UNKNOWN_LABEL = "profile item with a label outside the task's set"
NO_NEGATIVE = "paper without another one of another citation to ask it against"
EMPTY_QUERY = "query with empty input or gold"
UNKNOWN_GOLD = "query with a gold outside the task's set"
EMPTY_USER = "user with no profile items left"
ORPHAN_QUERY = "query of a user with no profile items left"


@dataclass(frozen=True)
class Loaded:
    """Users as read.

    users: columns user_id, role (base, anchor, few_shot, or null where the data does not say),
        profile (list of {id, text, answer}) and query (list of {id, input, gold}), all strings,
        one row per user in the order of the files.
    dropped: how many items, queries and users were left out, by reason; no zeros.
    sources: the files that were read.
    """

    users: pl.DataFrame
    dropped: dict[str, int]
    sources: list[str]


def read_users(path: Path | str, task: LampTask) -> Loaded:
    """Read the users of one LaMP task.

    path: a user file; or a folder with role-named user files (ROLE_FILE_NAMES); or a folder with
    LaMP's official questions and outputs (dev if it is there, else train).
    Empty and repeated items, and labels that the task does not have, are dropped and counted.
    Raises InputError, in one line, for anything that does not have the format's shape.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder; check the path of the data")
    reader = _Reader(task)
    if path.is_file():
        reader.add_user_file(path, None)
    else:
        _read_folder(path, reader)
    return reader.result()


def _read_folder(folder: Path, reader: _Reader) -> None:
    role_files = []
    for role, names in ROLE_FILE_NAMES.items():
        found: list[str] = [name for name in names if (folder / name).is_file()]
        if len(found) > 1:
            raise InputError(f"{folder}: {' and '.join(found)} both hold {role} users; keep one")
        role_files += [(role, folder / name) for name in found]
    questions = [folder / f"{split}_questions.json" for split in SPLITS]
    official = [file for file in questions if file.is_file()]
    if role_files and official:
        raise InputError(
            f"{folder}: holds both {role_files[0][1].name} and {official[0].name}; keep the user "
            "files and LaMP's own files in different folders"
        )
    if not role_files and not official:
        wanted = [name for group in ROLE_FILE_NAMES.values() for name in group]
        hint = ""
        if (folder / "test_questions.json").is_file():
            hint = " (LaMP withholds the golds of test_questions.json: use its dev split)"
        raise InputError(
            f"{folder}: holds no LaMP data; expected {', '.join(wanted)}, or dev_questions.json "
            f"and dev_outputs.json{hint}"
        )
    for role, file in role_files:
        reader.add_user_file(file, role)
    if official:
        outputs = official[0].with_name(official[0].name.replace("_questions", "_outputs"))
        reader.add_official(official[0], outputs)


class _Reader:
    """Collects checked users from one or more files."""

    def __init__(self, task: LampTask) -> None:
        self.task = task
        self.rows: list[dict[str, Any]] = []
        self.dropped: Counter[str] = Counter()
        self.sources: list[str] = []

    def result(self) -> Loaded:
        users = pl.DataFrame(self.rows, schema=USERS_SCHEMA, orient="row")
        return Loaded(users, dict(sorted(self.dropped.items())), self.sources)

    def add_user_file(self, file: Path, role: str | None) -> None:
        seen_users: dict[str, int] = {}
        seen_queries: dict[str, int] = {}
        for index, record in enumerate(read_list(file)):
            where = f"{file}: record {index}"
            if not isinstance(record, dict):
                raise InputError(f"{where} is {kind(record)}; a user must be a JSON object")
            if "user_id" not in record:
                hint = "give every user its user_id"
                if "input" in record:
                    hint = "these are LaMP's own questions: give the folder that holds them"
                raise InputError(f"{where} has no user_id; {hint}")
            user_id = self._identifier(record["user_id"], where, "user_id")
            where += f" (user_id {short(user_id)})"
            if user_id in seen_users:
                raise InputError(
                    f"{where} has the user_id of record {seen_users[user_id]}; merge the two or "
                    "give each its own"
                )
            seen_users[user_id] = index
            queries = record.get("query", [])
            if not isinstance(queries, list):
                raise InputError(f"{where}: query is {kind(queries)}; it must be a list")
            checked = []
            for number, query in enumerate(queries):
                place = f"{where}, query {number}"
                fields = self._fields(query, place, ("id", "input", "gold"))
                query_id = self._identifier(query["id"], place, "id")
                # Predictions are matched to golds by query id alone (LaMP's rule).
                if query_id in seen_queries:
                    raise InputError(
                        f"{place} has the id {short(query_id)}, which a query of record "
                        f"{seen_queries[query_id]} has too; give every query its own id"
                    )
                seen_queries[query_id] = index
                checked.append((query_id, fields["input"], fields["gold"]))
            self._add(user_id, role, record, checked, where)
        self.sources.append(str(file))

    def add_official(self, questions_file: Path, outputs_file: Path) -> None:
        questions = read_list(questions_file)
        if not outputs_file.is_file():
            raise InputError(f"{outputs_file}: not there; {questions_file.name} needs its golds")
        golds = self._read_golds(outputs_file)
        seen: dict[str, int] = {}
        for index, record in enumerate(questions):
            where = f"{questions_file}: record {index}"
            fields = self._fields(record, where, ("id", "input"))
            user_id = self._identifier(record["id"], where, "id")
            where += f" (id {short(user_id)})"
            if user_id in seen:
                raise InputError(f"{where} has the id of record {seen[user_id]}; ids must differ")
            seen[user_id] = index
            if user_id not in golds:
                raise InputError(
                    f"{where} has no gold in {outputs_file.name}; get both files of one split"
                )
            self._add(user_id, None, record, [(user_id, fields["input"], golds[user_id])], where)
        for gold_id in golds:
            if gold_id not in seen:
                raise InputError(
                    f"{outputs_file}: the gold with id {short(gold_id)} has no question in "
                    f"{questions_file.name}; get both files of one split"
                )
        self.sources += [str(questions_file), str(outputs_file)]

    def _read_golds(self, file: Path) -> dict[str, str]:
        content = read_json(file)
        records = content.get("golds") if isinstance(content, dict) else None
        if not isinstance(records, list):
            raise InputError(f'{file}: has no list "golds"; expected LaMP\'s own outputs file')
        golds: dict[str, str] = {}
        for index, record in enumerate(records):
            where = f"{file}: gold {index}"
            output = self._fields(record, where, ("id", "output"))["output"]
            gold_id = self._identifier(record["id"], where, "id")
            if gold_id in golds:
                raise InputError(f"{where} has the id {short(gold_id)} of an earlier gold")
            golds[gold_id] = output
        return golds

    def _add(
        self,
        user_id: str,
        role: str | None,
        record: dict[str, Any],
        queries: list[tuple[str, str, str]],
        where: str,
    ) -> None:
        """Check the profile, drop and count what cannot be used, and keep the user."""
        if "profile" not in record:
            raise InputError(f"{where} has no profile; every user needs its list of items")
        if not isinstance(record["profile"], list):
            raise InputError(f"{where}: profile is {kind(record['profile'])}; it must be a list")
        items = record["profile"]
        if self.task.items == "built":
            items = self._questions(items, where)
        profile: dict[tuple[str, str], dict[str, str]] = {}
        for number, item in enumerate(items):
            place = f"{where}, profile item {number}"
            fields = self._fields(item, place, (self.task.text_field, self.task.answer_field))
            body = fields[self.task.text_field]
            answer = self._answer(fields[self.task.answer_field])
            # Items are told apart by content; an id is only carried along.
            item_id = self._identifier(item["id"], place, "id") if "id" in item else str(number)
            if not body.strip() or not answer.strip():
                self.dropped[EMPTY_ITEM] += 1
            elif self.task.labels and answer not in (*self.task.labels, citations.UNASKED):
                self.dropped[UNKNOWN_LABEL] += 1
            elif (body, answer) in profile:
                self.dropped[DUPLICATE_ITEM] += 1
            else:
                profile[body, answer] = {"id": item_id, "text": body, "answer": answer}
        kept = []
        for query_id, question, gold in queries:
            gold = self._answer(gold)
            if not question.strip() or not gold.strip():
                self.dropped[EMPTY_QUERY] += 1
            elif self.task.labels and gold not in self.task.labels:
                self.dropped[UNKNOWN_GOLD] += 1
            else:
                kept.append({"id": query_id, "input": question, "gold": gold})
        if not profile:
            self.dropped[EMPTY_USER] += 1
            if kept:
                self.dropped[ORPHAN_QUERY] += len(kept)
            return
        self.rows.append(
            {"user_id": user_id, "role": role, "profile": list(profile.values()), "query": kept}
        )

    def _questions(self, papers: list[Any], where: str) -> list[dict[str, Any]]:
        """LaMP-1's papers as items whose title is a question and whose citation is its label.

        A paper may name its own `negative`. Ours do: a citation of the same user, as the nearest
        paper's is, shows nothing of the user's taste. Where no paper of a profile names a citation,
        as in LaMP's official files, they stay to be asked about (`related.ask_related`).
        """
        named = any(isinstance(paper, dict) and "citation" in paper for paper in papers)
        read = []
        for number, paper in enumerate(papers):
            place = f"{where}, profile item {number}"
            fields = self._fields(paper, place, ("title", "citation") if named else ("title",))
            for name in ("abstract", "negative"):
                fields[name] = text(paper.get(name), place, name)
            if not named:
                title = fields["title"].strip()
                fields |= {"title": f'"{title}"' if title else "", "citation": citations.UNASKED}
            read.append({"id": str(number), **paper, **fields})
        if not named:
            return read
        questions = citations.questions(read)
        if len(questions) < len(read):
            self.dropped[NO_NEGATIVE] += len(read) - len(questions)
        return questions

    def _answer(self, answer: str) -> str:
        """Labels are looked up stripped, as LaMP's scoring does; free text stays as it is."""
        return answer.strip() if self.task.labels else answer

    def _fields(self, value: Any, where: str, names: tuple[str, ...]) -> dict[str, str]:
        """The named fields of a JSON object as strings; null counts as empty."""
        if not isinstance(value, dict):
            raise InputError(f"{where} is {kind(value)}; it must be a JSON object")
        fields = {}
        for name in names:
            if name not in value:
                present = ", ".join(short(str(key)) for key in list(value)[:8]) or "none"
                raise InputError(
                    f"{where} has no {name!r} (its fields: {present}); {self.task.name} needs it"
                )
            fields[name] = text(value[name], where, name)
        return fields

    def _identifier(self, value: Any, where: str, name: str) -> str:
        identifier = text(value, where, name)
        if not identifier.strip():
            raise InputError(f"{where}: {name} is empty; give it a string or a whole number")
        return identifier
