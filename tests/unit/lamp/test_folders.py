"""Which file of a folder is read, task by task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tasks.config.run import resolve
from tasks.config.task import TaskConfig
from tasks.errors import InputError
from tasks.lamp.definitions import TASKS
from tasks.lamp.folders import find_files, of_task
from tasks.prepare import prepare, prepared_users, source
from tasks.results.models import Prepared
from tasks.results.store import Store
from tests.unit.lamp.helpers import write
from tests.unit.lamp.test_mutated_files import good
from tests.unit.stages.users import FILES, user


def config_of(data: Path, lamp_task: str) -> TaskConfig:
    return resolve({"data": str(data), "anchors": {"min_items": 1}}).for_task(lamp_task, 0)


def prepared(data: Path, lamp_task: str) -> Prepared:
    return prepared_users(config_of(data, lamp_task)).model_copy(update={"seconds": 0.0})


def key(data: Path, lamp_task: str) -> str:
    config = config_of(data, lamp_task)
    return prepare.key(source(config), config.split, config.task, config.seed)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("layout", ["{task}.{end}", "{task}/{task}.{end}", "{task}/a.{end}"])
def test_one_plain_file_per_task(where: Store, tmp_path: Path, layout: str, suffix: str) -> None:
    """What a single file gives, and made again when that task's file changes, no other's."""
    names = ("LaMP-2M", "LaMP-3", "LaMP-4", "LaMP-5")
    files = {}
    for name in names:
        files[name] = tmp_path / "data" / layout.format(task=name, end=suffix)
        files[name].parent.mkdir(parents=True, exist_ok=True)
        users, _ = good(TASKS[name], "users")
        text = "\n".join(map(json.dumps, users)) if suffix == "jsonl" else json.dumps(users)
        files[name].write_text(text)
    for name in names:
        found = prepared(tmp_path / "data", name)
        assert found == prepared(files[name], name)
        assert found.counts["users"] == 9
    before = {name: key(tmp_path / "data", name) for name in names}
    files["LaMP-3"].write_text(files["LaMP-3"].read_text().replace("text 3", "other 3"))
    after = {name: key(tmp_path / "data", name) for name in names}
    assert [name for name in names if before[name] != after[name]] == ["LaMP-3"]


def test_roles_as_json_lines(where: Store, tmp_path: Path) -> None:
    """The names of Per-Pcs and MTA with .jsonl; a user more is other data."""
    roles = {
        "base": [user("base-1", 3)],
        "anchor": [user("anchor-1", 5)],
        "few_shot": [user("few-1", 2, queries=1)],
    }
    for role, users in roles.items():
        lines = "".join(json.dumps(one) + "\n" for one in users)
        (tmp_path / FILES[role]).with_suffix(".jsonl").write_text(lines)
    found = prepared(tmp_path, "LaMP-2M")
    assert found.few_shot_ids == ("few-1",)
    with (tmp_path / "user_few_shot.jsonl").open("a") as file:
        file.write(json.dumps(user("few-2", 2, queries=1)))
    assert prepared(tmp_path, "LaMP-2M").few_shot_ids == ("few-1", "few-2")


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["LaMP-3.json"], ["holds no LaMP data", "one file of users alone"]),
        (["a.json", "b.jsonl"], ["one file of users alone (it holds a.json, b.jsonl)"]),
        (["dev_outputs.json"], ["holds no LaMP data"]),
        (["test_questions.json", "test_outputs.json"], ["LaMP withholds"]),
        (["user_base_LLM.json", "user_base_LLM.jsonl"],
         ["user_base_LLM.json and user_base_LLM.jsonl both hold base users; keep one"]),
        ([], ["user_few_shot.json", "dev_questions.json"]),
    ],
)  # fmt: skip
def test_files_that_are_not_meant(tmp_path: Path, names: list[str], parts: list[str]) -> None:
    """Another task's file is not read as this one's, nor golds as users."""
    for name in names:
        write(tmp_path / name, [user("u", 2)])
    with pytest.raises(InputError) as caught:
        find_files(of_task(tmp_path, "LaMP-2M"))
    for part in parts:
        assert part in str(caught.value)


def test_a_file_and_a_folder_of_one_task(tmp_path: Path) -> None:
    (tmp_path / "LaMP-2M").mkdir()
    write(tmp_path / "LaMP-2M.json", [user("u", 2)])
    with pytest.raises(InputError, match=r"LaMP-2M and LaMP-2M.json both hold users of LaMP-2M"):
        of_task(tmp_path, "LaMP-2M")
    assert of_task(tmp_path, "LaMP-3") == tmp_path
