"""`tune=true` in the flow: what is chosen is what the run has, said, logged, and found again."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows import tune
from tasks.report.files import read_run
from tests.flows.test_flow import TABLE, made, mlflow_runs, run


@pytest.mark.slow
@pytest.mark.server
def test_settings_are_chosen_once(
    workplace: Path, mlflow_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(tune, "TRIALS", 3)
    given = {"tune": True, "methods": ["mta"], "synthetic": {"anchor_candidates": 20}}
    state = run(**given)
    assert state.is_completed(), state.message
    (cell,) = read_run().cells
    tuning = cell.tuning
    assert tuning is not None
    assert tuning.users == 10
    for section, settings in tuning.settings.items():
        own = getattr(cell.config, section)
        assert {name: getattr(own, name) for name in settings} == settings
    # The few-shot users of the run are those of any other, and no candidate.
    assert all(name.startswith("few_shot") for name in cell.users.few_shot_ids)
    assert not cell.config.split.development
    assert f"LaMP-2M: {tuning.text()}" in TABLE.read_text()
    parent, children = mlflow_runs(mlflow_file, state)
    assert parent.data.tags["tuned.LaMP-2M"] == tuning.text()
    trials = {one.info.run_name: one for one in children if one.data.tags["kind"] == "trial"}
    assert sorted(trials) == [f"LaMP-2M trial {number}" for number in range(3)]
    for number, trial in enumerate(tuning.trials):
        logged = trials[f"LaMP-2M trial {number}"]
        assert logged.data.metrics == {"score": trial.scores[-1]}
        assert logged.data.params.keys() == {
            f"{section}.{name}" for section, own in trial.settings.items() for name in own
        }
        assert logged.data.tags["chosen"] == str(number == tuning.chosen).lower()
    again = run(**given)
    assert made(again) == set()
    assert read_run().cells[0].tuning == tuning
