"""What the LoRAs of a run are on: how many layers, what share of the model's parameters."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tasks.config.options import TrainingOptions
from tasks.config.task import TaskConfig
from tasks.log import log
from tasks.methods import METHODS
from tasks.record import library_versions
from tasks.results.models import Base
from tasks.results.run import Cell
from tasks.results.store import remembered
from tasks.stand_in import plannable
from tasks.text.loading import model_folder


@plannable
def coverage_lines(config: TaskConfig, base: Base) -> tuple[str, ...]:
    """A line for each choice of layers (`target_modules`) that the methods' LoRAs make.

    Logged, and counted once per model. Raises InputError where no layer is so named.
    """
    lines = []
    for modules, sections in _sections(config).items():
        about = [library_versions(("transformers", "peft")), base.content, modules]

        def count(modules: str = modules) -> str:
            from transformers import AutoConfig

            from tasks.lora.base import without_weights
            from tasks.lora.targets import coverage

            shape = AutoConfig.from_pretrained(model_folder(base), trust_remote_code=False)
            return coverage(without_weights(shape), json.loads(modules)).text()

        lines.append(f"{', '.join(sections)}: {remembered('coverage', about, count)}")
        log(lines[-1])
    return tuple(lines)


def coverage_notes(cells: Iterable[Cell]) -> list[str]:
    """The lines of all cells, each once; with the LaMP tasks where these differ."""
    tasks: dict[str, dict[str, None]] = {}
    everyone: dict[str, None] = {}
    for cell in cells:
        everyone[cell.config.lamp_task] = None
        for line in cell.coverage:
            tasks.setdefault(line, {})[cell.config.lamp_task] = None
    return [
        line if own.keys() == everyone.keys() else f"{', '.join(own)}: {line}"
        for line, own in tasks.items()
    ]


def _sections(config: TaskConfig) -> dict[str, list[str]]:
    """`target_modules` as JSON -> the sections of the configuration that have them, in use."""
    used: dict[str, TrainingOptions] = {}
    if config.base.task_adapt.enabled:
        used["base.task_adapt"] = config.base.task_adapt
    for name in config.methods:
        own, method = config.method(name), METHODS[name]
        if method.merged:
            used["meta_lora"] = own.meta_lora
        if method.trained and own.training:
            used[method.trained] = own.training
    found: dict[str, list[str]] = {}
    for section, how in used.items():
        found.setdefault(json.dumps(how.target_modules), []).append(section)
    return found
