"""The scheduled run: it picks up users by content, costs only those, and says what changed."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.states import Scheduled

from flows.mta import mta
from tests.flows.conftest import folders, records, write_world
from tests.flows.test_flow import task_runs
from tests.small import SMALL

TABLE = Path(".mta/last_comparison.txt")


def few_shot(data: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((data / "user_few_shot.json").read_text())
    return found


def write(data: Path, users: list[dict[str, Any]]) -> None:
    (data / "user_few_shot.json").write_text(json.dumps(users))


def another(user: dict[str, Any]) -> dict[str, Any]:
    """A user with an id right behind this one's, and items and queries that nobody else has."""
    return {
        "user_id": f"{user['user_id']}b",
        "profile": [
            item | {"id": f"b{item['id']}", "description": f"{item['description']} once more"}
            for item in user["profile"]
        ],
        "query": [
            item | {"id": f"b{item['id']}", "input": f"{item['input']} once more"}
            for item in user["query"]
        ],
    }


@pytest.mark.slow
def test_one_new_user_costs_one_user(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its id lies between the others', so that batches behind it hold other users than before."""
    said: list[str] = []

    def log(line: str, **_more: Any) -> None:
        if not line.startswith("recipes of "):  # said of all users, made or found
            said.append(line)

    for stage in ("stacking", "answer", "embed", "fusion"):
        monkeypatch.setattr(f"tasks.{stage}.log", log)

    def run(**given: Any) -> str:
        said.clear()
        state = mta(**(SMALL | {"fusion": {"top_m": 2}} | given), return_state=True)
        assert state.is_completed(), state.message
        return (workplace / TABLE).read_text()

    data = write_world(workplace / "data")
    users = few_shot(data)
    assert "since the run" not in run(data=str(data))
    again = run(data=str(data))
    assert said == []
    assert ": users and anchors are the same" in again
    assert ": no score moved" in again

    newcomer = another(users[1])
    name = newcomer["user_id"]
    trained = folders(workplace, "meta_lora")
    write(data, [*users, newcomer])
    table = run(data=str(data))
    assert f": LaMP-2M, few-shot users: 1 added ({name})" in table
    assert "anchors:" not in table
    assert folders(workplace, "meta_lora") == trained
    # Five users in batches of three, then six: the second batch is another one, of known users.
    made = [tuple(map(int, re.findall(r" (\d+) users.* (\d+) known", line)[0])) for line in said]
    work = [line.split(" ")[0] for line in said]
    for what in ("embedding", "evidence", "training", "answering"):
        assert sum(new for (new, _), kind in zip(made, work, strict=True) if kind == what) == {
            "embedding": 1, "evidence": 1, "training": 1, "answering": 3,
        }[what]  # fmt: skip

    # Other items of one user, and one user less.
    changing = users[3]
    for item in changing["profile"]:
        item["description"] += " again"
    write(data, users)
    table = run(data=str(data))
    changed = f"1 removed ({name}); 1 changed ({changing['user_id']})"
    assert f": LaMP-2M, few-shot users: {changed}" in table
    training = [line for line in said if "training" in line]
    assert sum(int(re.findall(r"training (\d+)", line)[0]) for line in training) == 1
    page = (workplace / ".mta" / "report.html").read_text()
    assert "Since the last run of this configuration" in page
    assert changed in page

    # All in another place, and one item more of one anchor: the content is the key, not the path,
    # and the other anchors are found in their jobs.
    names = [anchor_of(folder) for folder in trained]
    assert len(names) == 3
    moved = data.rename(workplace / "moved")
    file = moved / "user_anchor_candidate.json"
    candidates = json.loads(file.read_text())
    anchor = next(item for item in candidates if item["user_id"] == names[0])
    anchor["profile"].append(anchor["profile"][0] | {"id": "new", "description": "a new film"})
    file.write_text(json.dumps(candidates))
    run(data=str(moved))
    now = [anchor_of(folder) for folder in folders(workplace, "meta_lora")]
    assert sorted(now) == sorted([*names, names[0]])


def anchor_of(folder: Path) -> str:
    """Whose LoRA lies in a folder of the stage `meta_lora`."""
    return str(json.loads((folder / "meta_lora.json").read_text())["anchor"])


def test_a_curve_takes_the_bank_of_the_run(workplace: Path) -> None:
    """Anchors are the same however many items few-shot users have: their jobs are sent once.

    What comes of it is what a run of its own with so many items finds, and adds nothing to.
    """
    small = SMALL | {"methods": ["mta"]}
    first = mta(**small | {"items_curve": [3, 6]}, return_state=True)
    assert first.is_completed(), first.message
    names = [
        name for name, _ in task_runs(first) if name.startswith(("meta-lora", "anchors", "bank"))
    ]
    assert len(names) == 3 + 1 + 1
    # Not the bank: its map shows the few-shot users, too.
    stages = ("meta_lora", "fusion", "answers", "compare")
    found = [records(workplace, stage).keys() for stage in stages]
    fewer = SMALL["split"] | {"few_shot_items": 3}
    assert mta(**small | {"split": fewer}, return_state=True).is_completed()
    assert [records(workplace, stage).keys() for stage in stages] == found


def test_a_run_that_was_missed_is_offered_when_the_server_is_back(prefect_server: None) -> None:
    """By Prefect itself; the local stack skips it (tests/unit/infra/test_end_worker.py)."""
    yesterday = datetime.now(UTC) - timedelta(days=1)
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="missed", type="process"))
        deployment = client.create_deployment(
            client.create_flow(mta), "missed", work_pool_name="missed"
        )
        run = client.create_flow_run_from_deployment(
            deployment, state=Scheduled(scheduled_time=yesterday)
        )
        # What a worker asks for, again and again.
        due = client.get_scheduled_flow_runs_for_work_pool(
            "missed", scheduled_before=datetime.now(UTC)
        )
        assert [one.flow_run.id for one in due] == [run.id]
        client.delete_flow_run(run.id)
        client.delete_deployment(deployment)
