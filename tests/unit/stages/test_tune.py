"""Settings chosen on development users: who they are, which trials stay, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows import tune
from flows.tune import tuned
from tasks.config.run import resolve
from tasks.config.trials import drawn, with_settings
from tasks.errors import InputError
from tasks.plan.model import plan_model
from tasks.plan.run import plan_text
from tasks.results.models import Compared, Estimate
from tasks.results.run import Trial, Tuning
from tests.unit.stages import pipeline
from tests.unit.stages.users import user

ROLES = pipeline.ROLES | {"anchor": [user(f"anchor-{n:02}", 6) for n in range(16)]}
GIVEN: dict[str, Any] = {
    "methods": ["mta"],
    "fusion": {"top_m": 2, "weights": "evidence"},
    "meta_lora": pipeline.OPTIONS["meta_lora"] | {"epochs": 1},
    "stacking": pipeline.OPTIONS["stacking"] | {"epochs": 1},
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Whom each trial is scored on."""
    return pipeline.noted(
        monkeypatch, "flows.tune.personalised", lambda common: common.users.few_shot_ids
    )


def test_trials_on_development_users(
    place: Path, asked: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter, half and all of them: candidates. The run's own settings stay to the end."""
    monkeypatch.setattr(tune, "TRIALS", 4)
    found = tuned(pipeline.config_of(place, ROLES, **GIVEN))
    assert [len(ids) for ids in asked] == [2] * 4 + [4] * 2 + [8] * 2
    assert {name.split("-")[0] for ids in asked for name in ids} == {"anchor"}
    assert all({*asked[0]} <= {*ids} for ids in asked)
    assert found.users == 8
    first = found.trials[0]
    assert first.settings == {}
    assert first.users == (2, 4, 8)
    last = {n: one.scores[-1] for n, one in enumerate(found.trials) if len(one.scores) == 3}
    assert found.chosen == min(last, key=lambda n: (-last[n], n))
    assert all(one.seconds > 0 for one in found.trials)


@pytest.mark.parametrize(
    ("points", "scored", "chosen"),
    [
        # By hand: 2 and 1 are best of four; the run's own, 0, is kept in place of the second.
        ({0: 0.1, 1: 0.3, 2: 0.4, 3: 0.2}, [0, 1, 2, 3, 2, 0, 2, 0], 2),
        ({0: 0.4, 1: 0.4, 2: 0.4, 3: 0.4}, [0, 1, 2, 3, 0, 1, 0, 1], 0),
        # 2 has no score: it is out.
        ({0: 0.4, 1: 0.5, 3: 0.4}, [0, 1, 2, 3, 1, 0, 1, 0], 1),
    ],
)
def test_halving(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    points: dict[int, float],
    scored: list[int],
    chosen: int,
) -> None:
    """The better half goes on, and the first of equals is chosen."""
    trials: list[int] = []

    def score(_common: Any, trial: Trial, *_: Any) -> Trial:
        number = int(trial.settings.get("number", {}).get("is", 0))
        trials.append(number)
        if number not in points:
            raise InputError("it has no score")
        return trial.model_copy(update={"scores": (*trial.scores, points[number])})

    settings = [{}, *({"number": {"is": n}} for n in (1, 2, 3))]
    monkeypatch.setattr(tune, "drawn", lambda *_: settings)
    monkeypatch.setattr(tune, "scored", score)
    assert tuned(pipeline.config_of(place, ROLES, **GIVEN)).chosen == chosen
    assert trials == scored


def test_a_trial_that_lacks_a_piece(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one is left out; the run's own must work."""
    empty = Compared(groups=0, queries=0, methods=(), intervals={"mta": {"score": Estimate()}},
                     differences={})  # fmt: skip
    monkeypatch.setattr("flows.lamp_task.compared", lambda *_: empty)
    with pytest.raises(InputError, match="it has no score"):
        tuned(pipeline.config_of(place, ROLES, **GIVEN))


def test_the_space() -> None:
    """Factors of the run's own values; what cannot matter is not varied, alpha goes with rank."""
    config = resolve({"preset": "embedded", "seed": 5}).for_task("LaMP-2M", 5)
    found = drawn(config, tune.TRIALS)
    assert found[0] == {}
    assert len(found) == tune.TRIALS
    assert all(one not in found[:n] for n, one in enumerate(found))
    assert found == drawn(config, tune.TRIALS)
    assert found != drawn(config.model_copy(update={"seed": 6}), tune.TRIALS)
    names = {f"{name}.{key}" for one in found for name, own in one.items() for key in own}
    # Whole clusters, weighed by evidence.
    assert names == {
        "anchors.min_cluster_size", "fusion.top_m", "fusion.evidence_temperature",
        "stacking.rank", "stacking.alpha", "stacking.learning_rate",
    }  # fmt: skip
    for one in found:
        own = with_settings(config, one)
        assert own.stacking.alpha / own.stacking.rank == 2.0
        assert own.fusion.top_m in (4, 8, 16, 32)
        assert own.data == config.data
    alone = config.model_copy(
        update={"anchors": config.anchors.model_copy(update={"train_on": "user"})}
    )
    own = [one.get("anchors", {}) for one in drawn(alone, tune.TRIALS)]
    counts = {one["count"] for one in own if "count" in one}
    assert counts == {12, 48}


def test_too_few_to_choose_on(place: Path) -> None:
    roles = ROLES | {"anchor": ROLES["anchor"][:9]}
    with pytest.raises(InputError, match=r"tune: 4 development users are too few .* 16 anchor"):
        tuned(pipeline.config_of(place, roles, **GIVEN))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"methods": ["base"]}, "tune chooses settings of mta, which is not in methods: add it"),
        ({"split": {"development": True}}, "tune and split.development both use"),
    ],
)
def test_what_does_not_go_together(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        resolve({"tune": True, **given})


def test_what_is_said() -> None:
    own = Trial(settings={}, users=(2, 8), scores=(0.5, 0.25), seconds=3)
    other = Trial(settings={"stacking": {"rank": 8, "learning_rate": 1.5e-3}}, users=(2, 8),
                  scores=(0.5, 0.375), seconds=4)  # fmt: skip
    assert Tuning(trials=(own, other), chosen=1, users=8).text() == (
        "tuned on 8 development users: stacking.rank 8, stacking.learning_rate 0.0015 (score "
        "0.375, the run's own settings 0.250), by 2 trials of 7 s together"
    )
    assert Tuning(trials=(own, other), chosen=0, users=8).text() == (
        "tuned on 8 development users: no settings were better than the run's own (score 0.250), "
        "by 2 trials of 7 s together"
    )


def test_a_plan_says_that_trials_are_not_counted(place: Path) -> None:
    told = "Not counted: the trials of `tune`"
    for given in (True, False):
        config = pipeline.run_config(place, ROLES, tune=given)
        assert (told in plan_text(config, plan_model(config), [])) == given
