"""Write docs/options.md and docs/commands.md from the code: `make docs`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from tasks.config.options import TrainingOptions
from tasks.config.presets import GIVEN_MODEL, PRESETS, WORLDS
from tasks.config.run import RunConfig
from tasks.config.task import overlay
from tasks.tools.main import app

DOCS = Path(__file__).parents[3] / "docs"
BOUNDS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
    "minItems": "entries >=",
}
OPTIONS = """# Options

Any option is set by `-p`, for `make benchmark ARGS="..."`, `mta run`, `mta plan` and
`prefect deployment run`. A section takes a JSON object of the options to change:

    mta run -p seed=1 -p 'stacking={"rank": 8}'

Short forms: `model` for `base.model`; a word as `split` for `split.kind`; `all` as `methods`.
Unknown names and values out of bounds are refused before anything runs. A preset changes some of
the defaults ([below](#what-the-presets-change)). A default that `embedded`, the preset of a plain
`mta run`, changes is followed by what it becomes.

This page is generated from the code, and a test compares the two.
"""
COMMANDS = """# Commands

`mta` is in the environment that `make install` makes; `. .venv/bin/activate` activates it. Bad
input is one line and exit code 2. Bad data that `mta run` finds after it has begun fail the run:
the line is the last of its log, and the exit code 1. `make help` lists the commands of `make`, and
[running.md](running.md) says what they do.

`mta --install-completion` lets the Tab key complete commands and options in bash, zsh or fish,
from the next terminal on. `mta --show-completion` prints what that installs.

This page is generated from the code, and a test compares the two.
"""
Schema = dict[str, Any]


def pages() -> dict[str, str]:
    """Each generated page of docs/ by its name."""
    return {
        "options.md": "\n".join([OPTIONS, *sections(), *presets()]),
        "commands.md": "\n".join([COMMANDS, *commands()]),
    }


def sections() -> Iterator[str]:
    """A table of the options without a section, then one per section, nested ones after it."""
    schema = RunConfig.model_json_schema()
    waiting = [("", schema)]
    while waiting:
        name, section = waiting.pop(0)
        yield f"## {name or 'Without a section'}\n"
        if name:
            yield sentence(section["description"].split("\n\n")[0]) + "\n"
        yield "| option | type | default | bounds | what it is |\n|---|---|---|---|---|"
        nested = []
        for option, field in section["properties"].items():
            path = f"{name}.{option}" if name else option
            inner = next((one for one in any_of(field) if "$ref" in one), None)
            if inner:
                found = schema["$defs"][inner["$ref"].split("/")[-1]]
                nested.append((path, {**found, **field}))
            else:
                yield row(path, field)
        waiting = [*nested, *waiting]
        yield ""


def row(path: str, field: Schema) -> str:
    kinds = " or ".join(dict.fromkeys(kind(one) for one in any_of(field)))
    default = f"`{json.dumps(field['default'])}`" if "default" in field else "required"
    if path in PLAIN:
        default += f", with `embedded` `{json.dumps(PLAIN[path])}`"
    bounds = ", ".join(
        f"{sign} {one[rule]}"
        for one in any_of(field)
        for rule, sign in BOUNDS.items()
        if rule in one
    )
    # A section that only changes a default leaves the sentence to the section it is made from.
    about = (
        field.get("description") or TrainingOptions.model_fields[path.split(".")[-1]].description
    )
    about = sentence(str(about))
    return f"| `{path}` | {kinds} | {default} | {bounds} | {about} |"


def sentence(text: str) -> str:
    """In one line, with links to the pages that it names."""
    return re.sub(r"docs/([a-z-]+\.md)", r"[\1](\1)", text.replace("\n", " "))


def any_of(field: Schema) -> list[Schema]:
    return field.get("anyOf", [field])


def kind(field: Schema) -> str:
    if "enum" in field:
        return ", ".join(f"`{one}`" for one in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if field.get("type") == "array":
        return f"list of {kind(field['items'])}"
    return str(field.get("type", "any"))


def presets() -> Iterator[str]:
    """What each preset sets beside the defaults."""
    yield "## What the presets change\n"
    alone = {"embedded, for generated users": WORLDS, "embedded, for a given model": GIVEN_MODEL}
    for name, values in {**PRESETS, **alone}.items():
        yield f"### {name}\n\n| option | value |\n|---|---|"
        yield from (f"| `{path}` | `{json.dumps(value)}` |" for path, value in leaves(values))
        yield ""


def leaves(values: Schema, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{name}.")
        else:
            yield path + name, value


# What an option is where nothing is asked for, if that is not its own default.
PLAIN = dict(leaves(overlay(PRESETS["embedded"], WORLDS)))


def commands() -> Iterator[str]:
    """What each command of `mta` does, and a table of what it takes."""
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        yield f"## mta {name}\n\n{command.help}\n"
        yield "| argument or option | default | what it is |\n|---|---|---|"
        for one in command.params:
            given = one.opts if one.opts[0].startswith("-") else [f"{one.name.upper()}"]
            default = "required" if one.required else f"`{one.default}`" if one.default else ""
            yield f"| `{', '.join(given)}` | {default} | {one.help or ''} |"
        yield ""


if __name__ == "__main__":
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
