"""The options of the benchmark: its data, tasks of one's own, the split, and the prompts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tasks.lamp.definitions import LampTask
from tasks.record import Options


class SyntheticOptions(Options):
    """The generated worlds (`data=synthetic`), one per LaMP task; see docs/benchmark.md."""

    base_users: int = Field(200, ge=1)
    anchor_candidates: int = Field(100, ge=1)
    few_shot_users: int = Field(60, ge=1)
    items_min: int = Field(40, ge=1)
    items_max: int = Field(100, ge=1)
    few_shot_items: int = Field(20, ge=1)
    queries: int = Field(20, ge=1)
    themes: int = Field(24, ge=1)
    choices: int = Field(4, ge=2, le=15)
    archetypes: int = Field(6, ge=2)
    mixture_min: float = Field(0.7, ge=0.5, le=1.0)
    quirk: float = Field(0.1, ge=0.0, le=1.0)
    label_noise: float = Field(0.04, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _ordered(self) -> SyntheticOptions:
        if self.items_max < self.items_min:
            raise ValueError(f"items_max {self.items_max} must be >= items_min {self.items_min}")
        return self


class LampOptions(Options):
    """Where `data=lamp` has the benchmark's own files from (docs/data.md).

    `split`: users are disjoint across train and dev (`user`), or each has a past in train and a
    future in dev (`time`). `part`: whose questions a run takes. `url`: the site, or a mirror with
    its folders. `cache`: where the files are kept; null is `mta/lamp` in the user's own cache.
    """

    split: Literal["user", "time"] = "user"
    part: Literal["dev", "train"] = "dev"
    url: str = Field(
        "https://ciir.cs.umass.edu/downloads/LaMP", pattern=r"^https?://[^\s/@]+(/\S*)?$"
    )
    cache: str | None = Field(None, min_length=1)


class SplitOptions(Options):
    """How users are divided where the data does not say (docs/method.md, Users).

    kind: `grouped`, users that share content stay on one side; or `published`, as OPPU, Per-Pcs and
    MTA do: few-shot users with `few_shot_items` items each (null: 10), and whole authors nowhere.
    few_shot_users: at most so many (null: all of them, published 100).
    allow_shared_groups: where the data has a group on two sides, leave its users out of the base or
    anchor side, and count them, instead of refusing the data.
    development: half of the anchor candidates stand in the few-shot users' place, who are not
    looked at (tasks/lamp/development.py): for choosing settings.
    """

    kind: Literal["grouped", "published"] = "grouped"
    few_shot_users: int | None = Field(None, ge=1)
    base_share: float = Field(1 / 3, ge=0.0, lt=1.0)
    anchor_share: float = Field(1 / 3, gt=0.0, lt=1.0)
    same_author_share: float = Field(0.5, gt=0.0, le=1.0)
    allow_shared_groups: bool = False
    few_shot_items: int | None = Field(None, ge=1)
    development: bool = False

    @model_validator(mode="after")
    def _leaves_few_shot(self) -> SplitOptions:
        if self.base_share + self.anchor_share >= 1.0:
            raise ValueError("base_share + anchor_share must stay below 1, the rest is few-shot")
        return self


class PromptOptions(Options):
    """`published`: history section, instruction, text, cue. `compact`: text and cue only.

    history_index: history is looked up by items' texts, or as the MTA code does it (`published`).
    chat: through the chat template where the base model has one, or `never`.
    """

    style: Literal["compact", "published"] = "compact"
    history_items: int = Field(0, ge=0)
    history_index: Literal["text", "published"] = "text"
    chat: Literal["auto", "never"] = "auto"


class TaskOptions(Options):
    """A task of the user's own, in LaMP's shape (docs/data.md).

    text, answer: the fields of a profile item. instruction: stands before a query's text; its last
    word is the marker that queries of the data may carry, too. labels: every possible answer; empty
    for free text. metric: accuracy and F1 (`classification`), MAE and RMSE (`rating`) or ROUGE
    (`text`). max_new_tokens: of an answer.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    text: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    instruction: str = Field(min_length=1)
    labels: list[str] = Field([])
    metric: Literal["classification", "rating", "text"]
    max_new_tokens: int = Field(32, ge=1)

    @model_validator(mode="after")
    def _labels_fit(self) -> TaskOptions:
        if self.metric == "text" and self.labels:
            raise ValueError("metric text takes no labels; leave them out, or use classification")
        if self.metric != "text" and len(set(self.labels)) < 2:
            raise ValueError(f"metric {self.metric} needs two different labels or more")
        if self.metric == "rating" and self.labels != ["1", "2", "3", "4", "5"]:
            raise ValueError("metric rating is LaMP's, from 1 to 5: labels 1, 2, 3, 4, 5")
        return self

    def definition(self) -> LampTask:
        """As the benchmark takes it."""
        words = self.instruction.split()
        return LampTask(
            name=self.name,
            text_field=self.text,
            answer_field=self.answer,
            shown_as=(self.text.capitalize(), self.answer.capitalize()),
            marker=f" {words[-1]} ",
            instruction=f"{self.instruction.rstrip()} ",
            labels=tuple(self.labels),
            kind=self.metric,
            max_new_tokens=self.max_new_tokens,
        )
