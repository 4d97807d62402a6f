"""The configuration of one LaMP task under one seed, and of one method in it."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from tasks.config import options
from tasks.config.options import TrainingOptions
from tasks.lamp.definitions import LampTask
from tasks.lamp.options import LampOptions, PromptOptions, SplitOptions, SyntheticOptions
from tasks.methods import METHODS, MethodName
from tasks.record import Options, key_of


class MethodSections(Options):
    """What a method sees of a run, and may change for itself."""

    seed: int = Field(0, ge=0, lt=2**32)
    """Decides every random choice."""
    base: options.BaseOptions = options.BaseOptions()
    prompt: PromptOptions = PromptOptions()
    anchors: options.AnchorOptions = options.AnchorOptions()
    bank: options.BankOptions = options.BankOptions()
    meta_lora: TrainingOptions = TrainingOptions()
    """How the anchors' LoRAs are trained."""
    fusion: options.FusionOptions = options.FusionOptions()
    stacking: options.StackingOptions = options.StackingOptions()
    oppu: TrainingOptions = TrainingOptions()
    """The method `oppu`: one LoRA per user, from scratch."""
    rag: options.RagOptions = options.RagOptions()
    label_prior: options.PriorOptions = options.PriorOptions()
    scoring: options.ScoringOptions = options.ScoringOptions()


class TaskSections(MethodSections):
    """The configuration of a LaMP task: also its users and methods, and where it runs."""

    data: str = Field("synthetic", min_length=1)
    """`synthetic`, `lamp` (downloaded), a user file, or a folder (docs/your-data.md)."""
    methods: list[MethodName] = Field(
        [name for name, method in METHODS.items() if method.default], min_length=1
    )
    """The methods that are compared; `all` names every one."""
    synthetic: SyntheticOptions = SyntheticOptions()
    lamp: LampOptions = LampOptions()
    split: SplitOptions = SplitOptions()
    compute: options.ComputeOptions = options.ComputeOptions()


class MethodConfig(MethodSections):
    """The configuration as one method sees it: its own settings are laid over the rest."""

    lamp_task: str
    method: MethodName

    @property
    def training(self) -> TrainingOptions | None:
        """How the method trains a user's own LoRA, if it trains one."""
        section = METHODS[self.method].trained
        return None if section is None else TrainingOptions.of(getattr(self, section))


class TaskConfig(TaskSections):
    """One LaMP task under one seed. `per_task` has been applied and is gone."""

    lamp_task: str
    task: LampTask
    several_seeds: bool = False

    @property
    def name(self) -> str:
        """The name of the cell: the LaMP task, and the seed if the run has several."""
        return f"{self.lamp_task} seed {self.seed}" if self.several_seeds else self.lamp_task

    def method(self, name: MethodName) -> MethodConfig:
        """The configuration as this method sees it."""
        shared = self.model_dump(include=set(MethodConfig.model_fields))
        values = overlay(shared, dict(METHODS[name].settings))
        if METHODS[name].history:
            items = values["rag"]["history_items"]
            values = overlay(values, {"prompt": {"history_items": items}})
        return MethodConfig.model_validate(values | {"method": name})

    def sharing_a_bank(self) -> list[tuple[MethodName, ...]]:
        """The methods that merge, grouped by those that share bank and recipes."""
        alike: dict[str, tuple[MethodName, ...]] = {}
        for name in self.methods:
            if METHODS[name].merged:
                config, method = self.method(name), METHODS[name]
                alone = name if method.bank or method.recipes else None
                key = key_of(config.anchors, config.bank, config.meta_lora, config.fusion, alone)
                alike[key] = (*alike.get(key, ()), name)
        return list(alike.values())


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as `section.field` -> value."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + key
        result |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return result


def overlay(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`under` with the values of `over` laid over it, section by section."""
    result = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = overlay(result[key], value) if both else value
    return result
