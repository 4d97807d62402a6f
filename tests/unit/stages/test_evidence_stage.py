"""The stage `evidence` on a tiny model against stock PEFT, and small runs that weigh by it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tasks.fusion import read_recipes
from tasks.lora.adapters import read_peft
from tasks.lora.base import load_base
from tasks.lora.batches import encode
from tasks.stage import store
from tests.unit.lora.peft_reference import attached, likelihood
from tests.unit.stages.pipeline import OPTIONS, ROLES, run
from tests.unit.stages.users import user

EVIDENCE = {"weights": "evidence", "top_m": 2, "evidence_temperature": 2.0}


@pytest.fixture(scope="module")
def weighed(place: Path) -> dict[str, Any]:
    return run(place, ROLES, fusion=EVIDENCE)


def table(done: dict[str, Any]) -> dict[str, list[float | None]]:
    folder = store().open(done["evidence"]["ref"]).folder
    frame = pl.read_parquet(folder / "evidence.parquet")
    assert frame.schema == {"user_id": pl.String, "log_likelihoods": pl.List(pl.Float64)}
    return dict(zip(frame["user_id"], frame["log_likelihoods"].to_list(), strict=True))


def by_peft(place: Path, done: dict[str, Any]) -> dict[str, list[float]]:
    """Sum over the user's items of log p(answer | prompt), under each anchor's own folder."""
    where = store()
    base = load_base(place / "model", max_tokens=64, device="cpu")
    found: dict[str, list[float]] = {one["user_id"]: [] for one in ROLES["few_shot"]}
    members = done["bank"]["value"]["members"]
    for anchor in done["bank"]["value"]["ids"]:
        (record,) = [
            piece
            for path in where.root.glob("meta_lora/*/*/record.json")
            if (piece := where.find("meta_lora", path.parent.name))
            and piece.ref["sha256"] == members[anchor]
        ]
        stock = attached(base.model, own=read_peft(record.folder / "adapter"))
        for one in ROLES["few_shot"]:
            samples = [
                encode(base, f"description: {item['description']} tag:", item["tag"])
                for item in one["profile"]
            ]
            found[one["user_id"]].append(sum(likelihood(stock, item) for item in samples))
    return found


def test_evidence_is_that_of_stock_peft(place: Path, weighed: dict[str, Any]) -> None:
    wanted, got = by_peft(place, weighed), table(weighed)
    assert weighed["evidence"]["value"]["anchors"] == weighed["bank"]["value"]["ids"]
    assert list(got) == list(wanted)
    for name, own in wanted.items():
        assert len(own) == 3
        assert got[name] == pytest.approx(own, rel=1e-5)
    # Anchors differ by far more than that.
    assert min(np.ptp(own) for own in wanted.values()) > 0.1


def test_recipes_are_the_softmax_of_the_evidence(weighed: dict[str, Any]) -> None:
    """The two largest of three, at a temperature of 2."""
    ids = weighed["bank"]["value"]["ids"]
    recipes = read_recipes(store(), weighed["fusion"])
    for name, own in table(weighed).items():
        best = sorted(range(3), key=lambda k: -own[k])[:2]
        first = 1 / (1 + math.exp((own[best[1]] - own[best[0]]) / 2.0))
        assert recipes[name]["anchors"] == [ids[k] for k in best]
        assert recipes[name]["weights"] == pytest.approx([first, 1 - first])


def test_the_way_of_weighing_trains_no_anchor_again(place: Path, weighed: dict[str, Any]) -> None:
    first = run(place, ROLES, recipes_only=True, fusion={"top_m": 2, "weights": "cosine"})
    assert first["evidence"] is None
    again = run(place, ROLES, fusion=EVIDENCE)
    assert {name for names in again["states"].values() for name in names} == {"Cached"}
    assert weighed["bank"]["ref"] == first["bank"]["ref"]
    assert weighed["fusion"]["ref"] != first["fusion"]["ref"]
    warmer = EVIDENCE | {"evidence_temperature": 4.0}
    hotter = run(place, ROLES, recipes_only=True, fusion=warmer)
    assert hotter["states"]["evidence"] == ["Cached"]
    assert hotter["states"]["fusion"] == ["Completed"]


def test_one_users_new_item_is_one_users_evidence(
    place: Path, weighed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    changed_user = user("few-1", 5, queries=2) | {"query": ROLES["few_shot"][1]["query"]}
    few_shot = [ROLES["few_shot"][0], changed_user, ROLES["few_shot"][2]]
    capsys.readouterr()
    changed = run(place, ROLES | {"few_shot": few_shot}, fusion=EVIDENCE)
    out = capsys.readouterr().out
    assert "evidence of 1 users for 3 anchors, 2 known from before" in out
    assert "mta: training 1 users, 2 known" in out
    before, after = table(weighed), table(changed)
    for name in ("few-0", "few-2"):
        assert after[name] == before[name]
    # One more item is one more factor below 1.
    for old, new in zip(before["few-1"], after["few-1"], strict=True):
        assert old is not None
        assert new is not None
        assert new < old
    times = [done["evidence"]["notes"]["per_user"] for done in (weighed, changed)]
    assert [times[0][n] == times[1][n] for n in (0, 2)] == [True, True]


def test_off_the_shortlist_there_is_no_evidence(place: Path, weighed: dict[str, Any]) -> None:
    """The two most similar anchors of three are asked: those of the recipes by cosine."""
    near = run(place, ROLES, fusion=EVIDENCE | {"shortlist": 2, "top_m": 3})
    by_cosine = run(place, ROLES, recipes_only=True, fusion={"top_m": 2, "weights": "cosine"})
    cosine = read_recipes(store(), by_cosine["fusion"])
    ids = near["bank"]["value"]["ids"]
    full, short = table(weighed), table(near)
    recipes = read_recipes(store(), near["fusion"])
    for name, own in short.items():
        asked = {anchor for anchor, one in zip(ids, own, strict=True) if one is not None}
        assert asked == set(cosine[name]["anchors"])
        for value, wanted in zip(own, full[name], strict=True):
            # Rounded to four decimals, after the last bits that company moves.
            assert value is None or value == pytest.approx(wanted, abs=2e-4)
        # Three members, the third without weight: nothing of it is in the merged LoRA.
        assert set(recipes[name]["anchors"][:2]) == asked
        assert recipes[name]["weights"][2] == 0.0
        assert sum(recipes[name]["weights"]) == pytest.approx(1)
    assert near["scores"]["mta"]["value"]["queries"] == 6


def test_a_shortlist_as_long_as_the_bank_is_none(place: Path, weighed: dict[str, Any]) -> None:
    long = run(place, ROLES, recipes_only=True, fusion=EVIDENCE | {"shortlist": 3})
    assert long["states"]["evidence"] == ["Cached"]
    assert long["evidence"]["ref"] == weighed["evidence"]["ref"]


def test_anchors_trained_otherwise_are_weighed_anew(place: Path, weighed: dict[str, Any]) -> None:
    """The same anchors and users, so recipes by cosine stay."""
    shorter = OPTIONS["meta_lora"] | {"epochs": 1}
    cosine = {"top_m": 2, "weights": "cosine"}
    for options, name in ((EVIDENCE, "Completed"), (cosine, "Cached")):
        run(place, ROLES, recipes_only=True, fusion=options)
        changed = run(place, ROLES, recipes_only=True, fusion=options, meta_lora=shorter)
        assert changed["bank"]["value"]["ids"] == weighed["bank"]["value"]["ids"]
        assert changed["states"]["fusion"] == [name]
