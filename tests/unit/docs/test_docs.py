"""What README and docs/ say exists: commands, options, files. Their links: `make docs`."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

from infra.local.alone import parameters
from infra.local.settings import DEPLOYMENTS
from tasks.config.run import resolve
from tasks.tools.main import app
from tests import pages
from tests.unit.docs import reference

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "infra").rglob("*.md")])
MAKE = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VARIABLES = {"ARGS", "EXTRAS", "GPU_SLOTS", "MLFLOW_PORT", "PREFECT_PORT", "PYTHON"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(text: str) -> list[list[str]]:
    """The words of each command of the fenced and the indented blocks."""
    shell = [block for _, language, block in pages.fenced(text) if language in pages.SHELL]
    return list(pages.commands([*shell, *pages.indented(text)]))


def check(words: list[str]) -> None:
    match words:
        case ["make", target, *rest]:
            assert target in MAKE
            settings = dict(word.split("=", 1) for word in rest)
            assert settings.keys() <= VARIABLES
            extras = filter(None, settings.get("EXTRAS", "").split(","))
            assert set(extras) <= PROJECT["optional-dependencies"].keys()
            resolve(parameters(pages.parameters(shlex.split(settings.get("ARGS", "")))))
        case ["mta", name, *rest] if name != "--help":
            command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
            parsed = command.make_context(name, rest)
            resolve(parameters(parsed.params.get("param") or []))
        case ["prefect", "deployment", "run", name, *rest]:
            assert name in DEPLOYMENTS
            if name == DEPLOYMENTS[0]:
                resolve(parameters(pages.parameters(rest)))
        case ["python" | ".venv/bin/python", "-m", module, *rest]:
            assert importlib.util.find_spec(module) is not None
            if module == "flows.mta":
                resolve(parameters(pages.parameters(rest)))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_exists(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text(encoding="utf-8")
    # Options may name a task's file: the one that a page shows.
    for task in re.findall(r"^```yaml\n(name: .*?)^```", text, re.M | re.S):
        (tmp_path / "reviews.yaml").write_text(task)
    monkeypatch.chdir(tmp_path)
    for words in commands(text):
        try:
            check([word.replace("$PWD", str(tmp_path)) for word in words])
        except Exception as error:
            pytest.fail(f"{page.name}: {shlex.join(words)}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_named_file_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    paths = re.findall(r"`((?:flows|tasks|infra|tests|docs)/[\w./-]+)`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def headings(page: Path) -> set[str]:
    """The anchors of a page, as MkDocs and GitHub make them of its headings."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", one).lower()) for one in found}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for place, anchor in re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", text):
        to = page.parent / place if place else page
        assert to.exists(), place
        assert not anchor or anchor in headings(to), f"{place}#{anchor}"


def test_commands_are_read_over_lines() -> None:
    text = "```\nA=1 make up  # x\nmta run \\\n  -p 'a=\n  1'\n```\n\n    make stop\n"
    found = commands(text)
    assert found == [["make", "up"], ["mta", "run", "-p", "a=\n  1"], ["make", "stop"]]


@pytest.mark.parametrize("name", reference.pages())
def test_generated_pages_are_those_of_the_code(name: str) -> None:
    written = (reference.DOCS / name).read_text(encoding="utf-8")
    assert written == reference.pages()[name], "`make docs` writes it"


def test_readme_is_short() -> None:
    """A page of 150 lines at most, of sentences of 25 words at most."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    plain = re.sub(r"```.*?```|<.*?>|\]\(.*?\)|^[#|].*?$", "\n\n", text, flags=re.M | re.S)
    parts = re.split(r"(?<=[.!?])\**\s+|\n\n", plain)
    assert [part for part in parts if len(part.split()) > 25] == []
