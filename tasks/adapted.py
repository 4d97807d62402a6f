"""What the LoRAs of a run are on: how many layers, and what share of the base model's parameters.

Counted once per model and kept in the store: a run that finds everything needs no torch for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tasks.config import RunConfig
from tasks.methods import METHODS
from tasks.options import TrainingOptions
from tasks.stage import log
from tasks.store.artifacts import Store
from tasks.store.pieces import Piece, digest, library_versions

VERSION = 1


def noted(options: RunConfig, where: Store, base: Piece, folder: Path) -> Piece:
    """The `base_model` piece with the note `adapted`, which is logged, too: a line for each choice
    of layers (`target_modules`) that the methods' LoRAs make.

    folder: the base model's. Raises InputError where no layer is so named.
    """
    lines = []
    for modules, names in _sections(options).items():
        key = digest(
            {
                "version": VERSION,
                "libraries": library_versions(("transformers",)),
                "base": base.ref["sha256"],
                "target_modules": modules,
            }
        )

        def count(_out: Path, modules: str = modules) -> dict[str, Any]:
            from transformers import AutoConfig

            from tasks.lora.base import without_weights
            from tasks.lora.coverage import coverage

            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            found = coverage(without_weights(config), json.loads(modules))
            return asdict(found) | {"text": found.text()}

        found = where.get("adapted_layers", key, count)
        lines.append(f"{', '.join(names)}: {found.value['text']}")
        log(lines[-1])
    return replace(base, notes=base.notes | {"adapted": lines})


def adapted_notes(summaries: Iterable[dict[str, Any]]) -> list[str]:
    """The lines of all LaMP tasks and seeds, each once; with the LaMP tasks where these differ."""
    tasks: dict[str, dict[str, None]] = {}
    everyone: dict[str, None] = {}
    for summary in summaries:
        everyone[summary["lamp_task"]] = None
        for line in summary["base"]["notes"].get("adapted", []):
            tasks.setdefault(line, {})[summary["lamp_task"]] = None
    return [
        line if own.keys() == everyone.keys() else f"{', '.join(own)}: {line}"
        for line, own in tasks.items()
    ]


def _sections(options: RunConfig) -> dict[str, list[str]]:
    """`target_modules` as JSON -> the sections of the configuration that have them, in use."""
    used: dict[str, TrainingOptions] = {}
    if options.base.task_adapt.enabled:
        used["base.task_adapt"] = options.base.task_adapt
    for name in options.methods:
        own, method = options.for_method(name), METHODS[name]
        if method.merged:
            used["meta_lora"] = own.meta_lora
        if method.trained:
            used[method.trained] = getattr(own, method.trained)
    found: dict[str, list[str]] = {}
    for section, how in used.items():
        found.setdefault(json.dumps(how.target_modules), []).append(section)
    return found
