"""Every fenced command of README and of the tutorial, run in order as a reader does.

The stack is a real one, in a copy of the project. Only sizes are small (SIZES), and what a page
leaves to the reader is put in its place: a model, users, adapters.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from infra.local.processes import free_port
from tests import pages
from tests.flows.conftest import write_world
from tests.flows.test_stack import ROOT, copy_project, environment, stack
from tests.llama3 import write_model
from tests.small import SMALL

# Not run, and why not.
SKIPPED = {
    "make test": "it is under way",
    "make install": "it was done before",
    ". .venv/bin/activate": "the environment is active",
}
SIZES: dict[str, Any] = {
    "lamp_tasks": ["LaMP-1", "LaMP-2M"],
    "synthetic": {"base_users": 12, "anchor_candidates": 10, "few_shot_users": 5, "queries": 3},
}
SIZES |= {name: SMALL[name] for name in SMALL if name not in (*SIZES, "split", "fusion")}


class Reader:
    """Somebody who types commands in the project's folder.

    instead: a text of the page -> what this reader has in its place.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.instead: dict[str, str] = {}
        self.server: subprocess.Popen[str] | None = None
        self.env = environment() | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}

    def go_through(self, page: str) -> dict[str, str]:
        """Type or save each fenced block, in order: a command's first two words -> what it said."""
        said: dict[str, str] = {}
        for before, language, block in pages.fenced((ROOT / page).read_text(encoding="utf-8")):
            for here, mine in self.instead.items():
                block = block.replace(here, mine)
            if language in pages.SHELL:
                for words in pages.commands([block]):
                    if shlex.join(words) not in SKIPPED:
                        said[" ".join(words[:2])] = self.type(words)
            else:
                assert language == "python", f"what is to be done with:\n{block}"
                names = re.findall(r"[Ss]ave this[\w ]* as `([\w.]+)`", before)
                assert names, f"which file is this?\n{block}"
                (self.folder / names[-1]).write_text(block)
        return said

    def type(self, words: list[str]) -> str:
        """Run a command to its end; returns what it prints. One that serves goes on behind."""
        if words[:2] == ["python", "serve.py"]:
            self.server = subprocess.Popen(
                words, cwd=self.folder, env=self.env | {"PYTHONUNBUFFERED": "1"}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            assert self.server.stdout
            return self.server.stdout.readline()
        done = subprocess.run(
            self.short(words), cwd=self.folder, env=self.env, capture_output=True, text=True,
            timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
        said = done.stdout + done.stderr
        if words[:2] == ["mta", "export"] and "its base model is " in said:
            self.instead["BASE-FOLDER"] = said.split("its base model is ")[1].split()[0]
        return said

    def short(self, words: list[str]) -> list[str]:
        """A command with the sizes of a short run, and with this environment as make's."""
        if words[:2] == ["make", "benchmark"]:
            named = dict(word.split("=", 1) for word in words[2:])
            extras = named.get("EXTRAS", "")
            stamp = f"{sys.prefix}/.installed{'-' * bool(extras)}{extras}"
            arguments = named.get("ARGS", "")
            small = shlex.join(self.small(shlex.split(arguments)))
            made = [f"VENV={sys.prefix}", f"EXTRAS={extras}", f"ARGS={arguments} {small}"]
            return ["make", "-o", stamp, "benchmark", *made]
        return [*words, *self.small(words)] if words[:2] == ["mta", "run"] else words

    def small(self, words: list[str]) -> list[str]:
        """The fields of SIZES that a command does not set itself."""
        named = {value.partition("=")[0] for value in pages.parameters(words)}
        if "data" in named:
            named |= {"lamp_tasks", "synthetic"}  # a file says by itself what it has
        left = {name: value for name, value in SIZES.items() if name not in named}
        return [part for k, v in left.items() for part in ("-p", f"{k}={json.dumps(v)}")]


@pytest.fixture
def reader(tmp_path: Path, prefect_tables: Path, mlflow_tables: Path) -> Iterator[Reader]:
    """In a copy of the project. Databases have their tables: test_stack.py has them made."""
    folder = tmp_path / "project"
    copy_project(folder)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    copy_tables(folder / ".mta/local", prefect_tables, mlflow_tables)
    made = Reader(folder)
    try:
        yield made
    finally:
        if made.server:
            made.server.kill()
            made.server.wait()
        stack(folder, "down")


def copy_tables(folder: Path, *databases: Path) -> None:
    folder.mkdir(parents=True)
    for database in databases:
        shutil.copy(database, folder)


@pytest.mark.slow
@pytest.mark.server
def test_the_tutorial(reader: Reader) -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    outputs = [textwrap.dedent(block) for block in pages.indented(text)]
    reader.instead["8123"] = str(free_port())
    printed = reader.go_through("docs/tutorial.md")
    # The newcomer is drawn from the world alone, so what the page prints is what everybody sees.
    assert any(output in printed["python newcomer.py"] for output in outputs)
    rows = [line.split()[3] for line in outputs[0].splitlines()[1:]]
    for name in rows:
        assert re.search(rf"mean of 1 +{name} ", printed["mta run"]), printed["mta run"]
    assert (reader.folder / "models/few_shot-00060/adapter_model.safetensors").exists()
    assert "few_shot-00060, by 10 of 20 items, merged from" in printed["mta personalise"]
    for name in ("base", "merged", "stacked"):
        assert re.search(rf"^{name} +\S", printed["mta ask"], re.M), printed["mta ask"]
    assert printed["curl -d"].strip()
    assert not (reader.folder / ".mta/report.html").exists()  # "It also removes ... its report"


@pytest.mark.slow
@pytest.mark.server
def test_the_readme(
    reader: Reader, tmp_path: Path, prefect_tables: Path, mlflow_tables: Path
) -> None:
    copy_tables(reader.folder / ".mta/prefect", prefect_tables)
    copy_tables(reader.folder / ".mta/mlflow", mlflow_tables)
    world = write_world(tmp_path / "world")
    people = [
        person
        for file in sorted(world.glob("user_*.json"))
        for person in json.loads(file.read_text())
    ]
    (reader.folder / "my-users.json").write_text(json.dumps(people))
    (reader.folder / "new.json").write_text(json.dumps(people[-1]))
    texts = [item["description"] for person in people for item in person["profile"]]
    model = write_model(tmp_path / "my-llama", texts)
    for number in range(2):
        torch.manual_seed(number)
        config = LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)
        stock: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
        stock.save_pretrained(reader.folder / "my-loras" / str(number))
    reader.instead["/models/my-llama"] = str(model)
    reader.go_through("README.md")
    for folder in ("models", "adapters"):
        assert [*(reader.folder / folder).rglob("adapter_model.safetensors")], folder


def test_what_is_skipped_is_there() -> None:
    text = "".join((ROOT / page).read_text() for page in ("README.md", "docs/tutorial.md"))
    for command in SKIPPED:
        assert re.search(rf"^{re.escape(command)}\b", text, re.M), command
