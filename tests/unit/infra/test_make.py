"""The Makefile's stamps, and what the committed files promise."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from infra.local.server import deployed_from
from infra.local.settings import DEPLOYMENT, DEPLOYMENTS, WORK_POOL
from tests.flows.test_stack import environment

ROOT = Path(__file__).parents[3]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    return tmp_path


def would_install(folder: Path, *arguments: str) -> bool:
    done = subprocess.run(
        ["make", "-n", *arguments], cwd=folder, env=environment(), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return "pip install" in done.stdout


def later(path: Path) -> None:
    newest = max(file.stat().st_mtime for file in path.parent.rglob("*") if file.is_file())
    os.utime(path, (newest + 10, newest + 10))


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_pip_runs_only_when_what_is_asked_for_has_changed(checkout: Path) -> None:
    assert would_install(checkout, "install")
    stamp = checkout / ".venv" / ".installed"
    stamp.touch()
    later(stamp)
    assert not would_install(checkout, "install")
    assert would_install(checkout, "install", "EXTRAS=text")
    for name in ("pyproject.toml", "constraints.txt"):
        later(checkout / name)
        assert would_install(checkout, "install")
        later(stamp)
        assert not would_install(checkout, "install")


def test_constraints_are_plain_pins() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9A-Za-z.]+", pin) for pin in pins)
    names = {re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() for pin in pins}
    assert not any(name.startswith(("nvidia-", "cuda-", "triton")) for name in names)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    for requirement in wanted:
        name = re.split(r"[<>=!~\[; ]", requirement)[0]
        assert re.sub(r"[-_.]+", "-", name).lower() in names, f"{name} has no pin"


def test_prefect_yaml_has_the_deployments_and_no_path() -> None:
    import yaml

    text = (ROOT / "prefect.yaml").read_text()
    assert str(ROOT) not in text
    read = yaml.safe_load(text)
    # Both flows are called mta.
    assert tuple(f"mta/{one['name']}" for one in read["deployments"]) == DEPLOYMENTS
    assert DEPLOYMENTS[0] == DEPLOYMENT
    assert {one["work_pool"]["name"] for one in read["deployments"]} == {WORK_POOL}
    for one in read["deployments"]:
        file, _, name = one["entrypoint"].partition(":")
        assert '\n@flow(name="mta"' in (ROOT / file).read_text()
        assert f"\ndef {name}(" in (ROOT / file).read_text()
    deployment = read["deployments"][0]
    assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}


def test_a_changed_flow_is_deployed_again(tmp_path: Path) -> None:
    (tmp_path / "flows").mkdir()
    flow = tmp_path / "flows" / "mta.py"
    for file in (flow, tmp_path / "prefect.yaml"):
        file.write_text("a = 1\n")
    before = deployed_from(tmp_path)
    assert deployed_from(tmp_path) == before
    later(flow)
    assert deployed_from(tmp_path) != before
