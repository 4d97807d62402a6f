"""A method that cannot be run leaves the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks import fusion
from tasks.errors import InputError
from tests.flows.test_flow import TABLE, mlflow_runs, run


def test_a_method_without_recipes_leaves_the_others(
    workplace: Path, mlflow_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the published rule gives a user no weights; methods of other banks are scored."""
    real = fusion.search

    def search(users: Any, bank: Any, options: Any) -> Any:
        if options.order == "published":
            raise InputError("no weights from 0 to 1")
        return real(users, bank, options)

    monkeypatch.setattr(fusion, "search", search)
    state = run(methods=["base", "mta_published", "mta"])
    assert state.name == "Incomplete"
    assert "LaMP-2M: mta_published: no weights from 0 to 1" in (state.message or "")
    table = (workplace / TABLE).read_text()
    scored = {line.split()[1] for line in table.splitlines() if line.startswith("LaMP-2M ")}
    assert {"base", "mta"} <= scored
    assert "mta_published" not in scored
    assert "MISSING: LaMP-2M: mta_published: " in table
    _, children = mlflow_runs(mlflow_file, state)
    methods = {c.data.tags["method"] for c in children if c.data.tags["kind"] == "method"}
    assert methods == {"base", "mta"}

    # Where no method is left, the run has failed.
    state = run(methods=["mta_published"])
    assert state.is_failed()
    assert state.name != "Incomplete"
    assert "no weights from 0 to 1" in (state.message or "")
