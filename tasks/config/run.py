"""The configuration of a run: a preset, with any field changed (`-p 'stacking={"rank": 8}'`).

A section replaces only the fields it names. Unknown keys and values out of bounds
fail before anything runs.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from tasks.config.options import SYNTHETIC_TASKS, MlflowOptions, PlanOptions, PresetName
from tasks.config.presets import APART, GIVEN_MODEL, PRESETS, WORLDS
from tasks.config.task import TaskConfig, TaskSections, flat, overlay
from tasks.errors import InputError, masked, short
from tasks.lamp.definitions import TASKS, LampTask, get_task
from tasks.lamp.options import TaskOptions
from tasks.methods import METHODS, MethodName

# Sections that `per_task` may change: what comes after the data and the base model.
PER_TASK = "^(anchors|bank|meta_lora|fusion|stacking|oppu|rag|label_prior|scoring)$"


class RunConfig(TaskSections):
    """The resolved configuration, saved with the run."""

    preset: PresetName = "embedded"
    """The preset that everything else starts from."""
    lamp_tasks: list[str] = Field(["LaMP-2M"], min_length=1)
    """The LaMP tasks to run."""
    task: TaskOptions | None = None
    """A task of the user's own, as a YAML or JSON file or its content (docs/your-data.md)."""
    items_curve: list[Annotated[int, Field(ge=1)]] = Field([])
    """Numbers of items per few-shot user to score again with, for the curve in the report."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field([])
    """Several seeds: the whole benchmark once per seed, compared over all of them."""
    per_task: dict[str, dict[Annotated[str, Field(pattern=PER_TASK)], dict[str, Any]]] = Field({})
    """Sections that differ for a LaMP task, by its name."""
    tune: bool = False
    """Choose settings of `mta` on development users first, per LaMP task and seed."""
    dry_run: bool = False
    """Do nothing but say what the run would take."""
    mlflow: MlflowOptions = MlflowOptions()
    plan: PlanOptions = PlanOptions()

    @field_validator("lamp_tasks", "methods", "items_curve", "seeds")
    @classmethod
    def _each_once(cls, listed: list[Any]) -> list[Any]:
        if twice := [one for one in listed if listed.count(one) > 1]:
            raise ValueError(f"{twice[0]} is listed twice; name each once")
        return listed

    @model_validator(mode="after")
    def _known_tasks(self) -> Self:
        known = [*TASKS, *([self.task.name] if self.task else [])]
        for name in (*self.lamp_tasks, *self.per_task):
            if name not in known:
                raise ValueError(f"there is no LaMP task {name}; there are {', '.join(known)}")
        return self

    @model_validator(mode="after")
    def _of_the_same_users(self) -> Self:
        if self.items_curve and self.split.kind == "published":
            raise ValueError(
                "items_curve needs split.kind grouped, as published chooses users by their items: "
                "give items_curve=[]"
            )
        if self.tune and "mta" not in self.methods:
            raise ValueError("tune chooses settings of mta, which is not in methods: add it")
        if self.tune and self.split.development:
            raise ValueError(
                "tune and split.development both use the development users: give one of the two"
            )
        return self

    @property
    def all_seeds(self) -> list[int]:
        return self.seeds or [self.seed]

    def definition(self, lamp_task: str) -> LampTask:
        """The task of this name: the user's own, or one of LaMP. Raises InputError for another."""
        if self.task and self.task.name == lamp_task:
            return self.task.definition()
        return get_task(lamp_task)

    def for_task(self, lamp_task: str, seed: int, few_shot_items: int | None = None) -> TaskConfig:
        """One LaMP task under one seed, with its `per_task`; few_shot_items: of a curve's point."""
        values = overlay(self.model_dump(), self.per_task.get(lamp_task, {}))
        if few_shot_items is not None:
            values = overlay(values, {"split": {"few_shot_items": few_shot_items}})
        values = {name: values[name] for name in TaskSections.model_fields} | {
            "lamp_task": lamp_task,
            "task": self.definition(lamp_task),
            "seed": seed,
            "several_seeds": len(self.all_seeds) > 1,
        }
        return TaskConfig.model_validate(values)


def resolve(changes: dict[str, Any]) -> RunConfig:
    """The preset's values with `changes` laid over them, section by section.

    changes: field -> value, or for a section the fields to change. Short forms: `model` for
    base.model, a text as `split` for split.kind, `all` for all `methods`. The published split has
    base users apart from candidates; preset `embedded` has more epochs then. A change for all LaMP
    tasks also wins over what the preset has for one. Raises InputError naming each key that is
    unknown or out of bounds.
    """
    changes = _long_forms(changes)
    preset, data = changes.get("preset", "embedded"), changes.get("data", "synthetic")
    asked = changes.get("lamp_tasks") or []
    if data == "synthetic" and set(asked) - set(SYNTHETIC_TASKS):
        few = ", ".join(SYNTHETIC_TASKS)
        raise InputError(f"lamp_tasks {asked}: data=synthetic holds {few} only; give data=<folder>")
    values = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    if preset == "embedded" and data == "synthetic":
        values = overlay(values, WORLDS)
    split, base = changes.get("split"), changes.get("base")
    if preset == "embedded" and isinstance(split, dict) and split.get("base_candidates") is False:
        values = overlay(values, APART)
    if preset == "embedded" and isinstance(base, dict) and base.get("model", "tiny") != "tiny":
        values = overlay(values | {"per_task": {}}, GIVEN_MODEL)
    per_task = values.get("per_task", {})
    per_task = {name: _without(sections, changes) for name, sections in per_task.items()}
    config = _checked(overlay(values | {"per_task": per_task}, changes))
    for name, value in flat(config.model_dump(mode="json")).items():
        if masked(str(value)) != str(value):
            raise InputError(
                f"configuration: {name}: a URL with a user or password would be saved with the "
                "run; leave it out, and put it into ~/.netrc or the environment (docs/security.md)"
            )
    for name, sections in config.per_task.items():
        _checked(overlay(config.model_dump(exclude={"per_task"}), sections), f"per_task.{name}.")
    for name in config.lamp_tasks:
        task = config.for_task(name, config.seed)
        for method in task.methods:
            _refuse(method, task)
    return config


def _checked(values: dict[str, Any], prefix: str = "") -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(prefix + _problem(item) for item in error.errors())
        raise InputError(f"configuration: {problems}") from None


def _refuse(name: MethodName, task: TaskConfig) -> None:
    """Raises InputError if a method cannot run as it is configured.

    Some methods need the grouped engine. The users of `bank.adapters` are unknown, so nobody can be
    similar to one.
    """
    config, method = task.method(name), METHODS[name]
    learned = method.merged and config.fusion.weights == "learned"
    if config.base.engine == "peft" and (method.grouped or learned):
        why = "with fusion.weights=learned " if learned else ""
        raise InputError(
            f"configuration: methods: {name} {why}needs base.engine=grouped (got 'peft')"
        )
    if not (config.bank.adapters and method.merged):
        return
    if method.bank:
        raise InputError(
            f"configuration: methods: {name} trains a bank of its own; leave it out, or "
            "bank.adapters"
        )
    got: str | int
    if not config.fusion.by_evidence:
        option, got, helps = "weights", config.fusion.weights, 'give "evidence"'
    elif config.fusion.shortlist is not None:
        option, got, helps = "shortlist", config.fusion.shortlist, "give null"
    else:
        return
    if option in method.settings.get("fusion", {}):
        left = [one for one in task.methods if one != name]
        helps = f"the method sets this, so leave it out (methods={json.dumps(left)})"
    raise InputError(
        f"configuration: fusion.{option}: {name} takes {json.dumps(got)}, which needs the "
        f"anchors' users, and those of bank.adapters are unknown; {helps}"
    )


def _without(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`tree` without the options that `changes` names."""
    left = {}
    for key, value in tree.items():
        if isinstance(value, dict) and isinstance(changes.get(key), dict):
            left[key] = _without(value, changes[key])
        elif key not in changes:
            left[key] = value
    return left


def _long_forms(changes: dict[str, Any]) -> dict[str, Any]:
    changes = dict(changes)
    if changes.get("methods") == "all":
        changes["methods"] = [*METHODS]
    if isinstance(task := changes.get("task"), str):
        changes["task"] = task = _read_task(Path(task).expanduser())
    if isinstance(task, dict):
        changes.setdefault("lamp_tasks", [task.get("name")])
        if changes.get("data", "synthetic") == "synthetic":
            raise InputError("task: a task of your own needs users of its own: give data=<folder>")
    if isinstance(changes.get("split"), str):
        changes["split"] = {"kind": changes["split"]}
    if isinstance(split := changes.get("split"), dict) and split.get("kind") == "published":
        changes["split"] = {"base_candidates": False} | split
    if (model := changes.pop("model", None)) is not None:
        base = changes.get("base", {})
        if not isinstance(base, dict) or base.get("model", model) != model:
            raise InputError(f"model {model}: base {base} disagrees; give one of the two")
        changes["base"] = base | {"model": model}
    return changes


def _read_task(file: Path) -> dict[str, Any]:
    """A task's definition from a YAML file, or a JSON file, which is YAML, too."""
    try:
        fields = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = short(error)
        raise InputError(f"task {file}: cannot be read as YAML or JSON ({why})") from error
    if not isinstance(fields, dict):
        raise InputError(
            f"task {file}: holds no fields; write name: ..., text: ... (docs/your-data.md)"
        )
    return fields


def _problem(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{name}: there is no such option (docs/options.md lists all)"
    if item["type"] == "model_type":
        return f"{name}: give a JSON object of the options to change (got {item['input']!r})"
    # A rule between sections has no field name, and its input is the whole configuration.
    message = item["msg"].removeprefix("Value error, ")
    return f"{name}: {message} (got {item['input']!r})" if name else message
