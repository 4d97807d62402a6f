"""The flow `mta/personalise` against a real server, on a run that was made without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.personalise import personalise
from tasks.report.files import write_run
from tasks.results.run import Run
from tasks.tracking.registry import register
from tasks.tracking.server import Mlflow
from tests.unit.stages import pipeline
from tests.unit.stages.users import user


@pytest.mark.slow
@pytest.mark.server
def test_new_users_of_a_finished_run(
    tmp_path: Path, prefect_server: None, mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bad user is named in the state, and the other is made all the same.

    Then by MLflow's server alone, through which another machine gets the bank.
    """
    file, to = tmp_path / "users.jsonl", tmp_path / "to"
    new = json.dumps(user("new", 3))
    with pipeline.prepared_place(tmp_path) as place:
        cell = pipeline.run(place, pipeline.ROLES, methods=["merge_only", "mta"])
        run = Run(id="one", name="one", date="", report="one", config={}, cells=(cell,))
        write_run(run)
        file.write_text(f'{new}\n{{"user_id": "bad", "profile": 1}}\n')
        state = personalise(str(file), to=str(to), return_state=True)
        assert state.is_failed()
        assert state.name == "Incomplete"
        assert f"1 users made in {to}; 1 missing: {file}: line 2 (user_id 'bad')" in state.message
        assert (to / "new" / "adapter_model.safetensors").is_file()
        file.write_text(new)
        state = personalise(str(file), run="one", to=str(to), keep="recipe", return_state=True)
        assert (state.name, state.message) == ("Completed", f"1 users made in {to}")
        recipe = json.loads((to / "new.json").read_text())
        assert len(recipe["anchors"]) == 2
        state = personalise(str(file), run="absent", return_state=True)
        assert "--run absent: neither a run nor a file of one" in state.message
        mlflow = Mlflow(mlflow_server)
        register(mlflow, mlflow.client.create_run(mlflow.experiment).info.run_id, run)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
        monkeypatch.setenv("MTA_STORE", str(tmp_path / "elsewhere" / "store"))
        bank, to = "models:/mta-bank@LaMP-2M", tmp_path / "there"
        state = personalise(str(file), run=bank, to=str(to), keep="recipe", return_state=True)
        assert (state.name, state.message) == ("Completed", f"1 users made in {to}")
        assert json.loads((to / "new.json").read_text()) == recipe
