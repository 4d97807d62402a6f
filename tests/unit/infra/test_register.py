"""How many slots the `gpu` limit of the local stack gets."""

from __future__ import annotations

from typing import Any

import pytest

from infra.local import register


class Api:
    """A server that knows of the limit `there`, or of none; `calls` has what was changed."""

    def __init__(self, there: dict[str, Any] | None) -> None:
        self.there, self.calls = there, []  # type: ignore[var-annotated]

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        if method == "GET":
            return self.there
        self.calls.append((method, body))
        return None


@pytest.mark.parametrize(
    ("gpu", "slots", "there", "calls"),
    [
        (True, None, None, [("POST", {"name": "gpu", "limit": 1})]),
        (False, None, None, [("POST", {"name": "gpu", "limit": 3})]),
        (False, 1, None, [("POST", {"name": "gpu", "limit": 1})]),
        (False, None, {"limit": 1}, []),
        (False, 2, {"limit": 1}, [("PATCH", {"limit": 2})]),
    ],
)
def test_slots(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, slots: int | None, there: Any, calls: list[Any]
) -> None:
    monkeypatch.setattr(register, "gpu_driver", lambda: gpu)
    monkeypatch.setattr(register, "cpu_jobs", lambda: 3)
    api: Any = Api(there)
    register.ensure_gpu_limit(api, slots)
    assert api.calls == calls
