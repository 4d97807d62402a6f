"""The configuration of a run: one typed model, two presets, any field overridable.

    prefect deployment run mta/full-benchmark -p seed=1 -p 'stacking={"rank": 8}'
    python -m flows.mta -p preset=paper -p 'base={"model": "/models/my-llama"}'

A section that is given replaces only the fields it names; the rest come from the preset.
Unknown keys and values out of bounds fail before anything runs.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from tasks.errors import InputError, masked
from tasks.methods import METHODS, MethodName
from tasks.options import (
    SYNTHETIC_TASKS,
    AnchorOptions,
    BaseOptions,
    ComputeOptions,
    FusionOptions,
    LampOptions,
    LampTaskName,
    Options,
    PlanOptions,
    PresetName,
    PromptOptions,
    RagOptions,
    ScoringOptions,
    SplitOptions,
    StackingOptions,
    SyntheticOptions,
    TrainingOptions,
)
from tasks.presets import GIVEN_MODEL, PRESETS, WORLDS

# Sections that `per_task` may change: what comes after the data and the base model.
PER_TASK = ("anchors", "meta_lora", "fusion", "stacking", "oppu", "rag", "scoring")


class RunConfig(Options):
    """The resolved configuration, saved with the run."""

    preset: PresetName = "embedded"
    data: str = Field("synthetic", min_length=1)
    lamp_tasks: list[LampTaskName] = Field(["LaMP-2M"], min_length=1)
    methods: list[MethodName] = Field(list(METHODS), min_length=1)
    # Scored again with other numbers of items per few-shot user, for the curve in the report.
    items_curve: list[Annotated[int, Field(ge=1)]] = Field([])
    seed: int = Field(0, ge=0, lt=2**32)
    # Several seeds: the whole benchmark once per seed, compared over all of them.
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field([])
    synthetic: SyntheticOptions = SyntheticOptions()
    lamp: LampOptions = LampOptions()
    split: SplitOptions = SplitOptions()
    prompt: PromptOptions = PromptOptions()
    base: BaseOptions = BaseOptions()
    anchors: AnchorOptions = AnchorOptions()
    meta_lora: TrainingOptions = TrainingOptions()
    fusion: FusionOptions = FusionOptions()
    stacking: StackingOptions = StackingOptions()
    oppu: TrainingOptions = TrainingOptions()
    rag: RagOptions = RagOptions()
    scoring: ScoringOptions = ScoringOptions()
    # LaMP task -> sections as above, laid over them for that task.
    per_task: dict[LampTaskName, dict[str, Any]] = Field({})
    compute: ComputeOptions = ComputeOptions()
    # What it would take, instead of doing it.
    dry_run: bool = False
    plan: PlanOptions = PlanOptions()

    @field_validator("lamp_tasks", "methods", "items_curve", "seeds")
    @classmethod
    def _each_once(cls, listed: list[Any]) -> list[Any]:
        if twice := [one for one in listed if listed.count(one) > 1]:
            raise ValueError(f"{twice[0]} stands there more than once; name each once")
        return listed

    @model_validator(mode="after")
    def _curve_of_the_same_users(self) -> RunConfig:
        if self.items_curve and self.split.kind == "published":
            raise ValueError(
                "items_curve needs split.kind grouped, published chooses users by their number of "
                "items: give items_curve=[]"
            )
        return self

    @property
    def all_seeds(self) -> list[int]:
        return self.seeds or [self.seed]

    def for_task(self, lamp_task: str, seed: int) -> RunConfig:
        """The configuration of one LaMP task under one seed, as its stages get it.

        `per_task` is laid over the rest, and gone.
        """
        values = self.model_dump(exclude={"per_task"}) | {"seed": seed}
        for name, own in self.per_task.items():
            if name == lamp_task:
                values = overlay(values, own)
        return RunConfig.model_validate(values)

    def for_method(self, name: str) -> RunConfig:
        """The configuration as this method sees it: its own settings laid over the rest."""
        settings = METHODS[name].settings
        if METHODS[name].history:
            settings = overlay(settings, {"prompt": {"history_items": self.rag.history_items}})
        return RunConfig.model_validate(overlay(self.model_dump(), settings))


def resolve(given: dict[str, Any]) -> RunConfig:
    """The preset's values with `given` laid over them, section by section.

    `given` maps field names to values or, for a section, to a mapping of the fields to change; and
    has two short forms, `model` for base.model and a text as `split` for split.kind. What is given
    for all LaMP tasks also wins over what the preset has for one.
    Raises InputError naming each key that is unknown or out of bounds.
    """
    given = _long_forms(given)
    preset = given.get("preset", "embedded")
    named = given.get("lamp_tasks") or []
    if given.get("data", "synthetic") == "synthetic" and set(named) - set(SYNTHETIC_TASKS):
        raise InputError(
            f"lamp_tasks {named}: data=synthetic holds {', '.join(SYNTHETIC_TASKS)} only; give "
            "data=<folder>"
        )
    values = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    if preset == "embedded" and given.get("data", "synthetic") == "synthetic":
        values = overlay(values, WORLDS)
    if preset == "embedded" and _model(given) != "tiny":
        values = overlay(values | {"per_task": {}}, GIVEN_MODEL)
    if "per_task" in values:
        own = {name: _without(tree, given) for name, tree in values["per_task"].items()}
        values = values | {"per_task": own}
    config = _checked(overlay(values, given))
    _no_passwords(config.model_dump(mode="json"))
    for name, tree in config.per_task.items():
        if wrong := [key for key in tree if key not in PER_TASK]:
            raise InputError(
                f"configuration: per_task.{name}.{wrong[0]}: only {', '.join(PER_TASK)} can differ "
                "from one LaMP task to another"
            )
        _checked(overlay(config.model_dump(exclude={"per_task"}), tree), f"per_task.{name}.")
    return config


def _checked(values: dict[str, Any], where: str = "") -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(where + _problem(item) for item in error.errors())
        raise InputError(f"configuration: {problems}") from None


def _no_passwords(values: Any, name: str = "") -> None:
    """Refuse a URL with a password anywhere: the configuration is saved, logged and shown."""
    if isinstance(values, dict):
        for key, value in values.items():
            _no_passwords(value, f"{name}.{key}" if name else key)
    elif isinstance(values, str) and masked(values) != values:
        raise InputError(
            f"configuration: {name}: a URL with a user or password would be saved with the run; "
            "leave it out, and put it into ~/.netrc or the environment (docs/security.md)"
        )


def _without(tree: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`tree` without the options that `given` names."""
    left = {}
    for key, value in tree.items():
        if key not in given:
            left[key] = value
        elif isinstance(value, dict) and isinstance(given[key], dict):
            left[key] = _without(value, given[key])
    return left


def _model(given: dict[str, Any]) -> Any:
    """The base model that is given; `tiny` where none is."""
    base = given.get("base")
    return base.get("model", "tiny") if isinstance(base, dict) else "tiny"


def _long_forms(given: dict[str, Any]) -> dict[str, Any]:
    given = dict(given)
    if isinstance(given.get("split"), str):
        given["split"] = {"kind": given["split"]}
    if (model := given.pop("model", None)) is not None:
        base = given.get("base", {})
        if not isinstance(base, dict) or base.get("model", model) != model:
            raise InputError(f"model {model}: base {base} says another; give one of the two")
        given["base"] = base | {"model": model}
    return given


def _problem(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{name}: there is no such option (tasks/options.py has them all)"
    if item["type"] == "model_type":
        return f"{name}: give a JSON object of the options to change (got {item['input']!r})"
    # A rule between sections has no name of its own, and all of the configuration as its input.
    message = item["msg"].removeprefix("Value error, ")
    return f"{name}: {message} (got {item['input']!r})" if name else message


def overlay(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`under` with the values of `over` laid over it, section by section."""
    result = dict(under)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            value = overlay(result[key], value)
        result[key] = value
    return result


def derive_seed(seed: int, *about: str) -> int:
    """A seed for one piece of work, by the configuration's seed and what the work is about."""
    return int(hashlib.sha256("\x1f".join([str(seed), *about]).encode()).hexdigest()[:8], 16)
