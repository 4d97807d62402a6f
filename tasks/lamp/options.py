"""The options of the benchmark: its data, tasks of one's own, the split, and the prompts."""

from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.lamp.definitions import LampTask
from tasks.record import Options


class SyntheticOptions(Options):
    """The generated worlds (`data=synthetic`), one per LaMP task; see docs/worlds.md."""

    base_users: int = Field(200, ge=1)
    """Users that train the tiny base model."""
    anchor_candidates: int = Field(100, ge=1)
    """Users that may become anchors."""
    few_shot_users: int = Field(60, ge=1)
    """Users that are scored."""
    items_min: int = Field(40, ge=1)
    """Fewest items of a base user or candidate."""
    items_max: int = Field(100, ge=1)
    """Most items of a base user or candidate."""
    few_shot_items: int = Field(20, ge=1)
    """Items of a few-shot user in the files."""
    queries: int = Field(20, ge=1)
    """Queries per few-shot user."""
    themes: int = Field(24, ge=1)
    """Themes that items are about."""
    choices: int = Field(4, ge=2, le=15)
    """Plausible answers per theme."""
    archetypes: int = Field(6, ge=2)
    """Archetypes that users are mixtures of."""
    mixture_min: float = Field(0.7, ge=0.5, le=1.0)
    """Least share of a user's first archetype."""
    quirk: float = Field(0.1, ge=0.0, le=1.0)
    """Probability that a user's taste in a theme follows no archetype."""
    label_noise: float = Field(0.04, ge=0.0, le=1.0)
    """Probability that an answer is drawn at random."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.items_max < self.items_min:
            raise ValueError(f"items_max {self.items_max} must be >= items_min {self.items_min}")
        return self


class LampOptions(Options):
    """Where `data=lamp` has the benchmark's own files from (docs/your-data.md)."""

    split: Literal["user", "time"] = "user"
    """Users are disjoint across train and dev (`user`), or each has a past in train and a future in
    dev (`time`)."""
    part: Literal["dev", "train"] = "dev"
    """Whose questions a run takes."""
    url: str = Field(
        "https://ciir.cs.umass.edu/downloads/LaMP", pattern=r"^https?://[^\s/@]+(/\S*)?$"
    )
    """The site, or a mirror with its folders."""
    cache: str | None = Field(None, min_length=1)
    """Where the files are kept; null: `mta/lamp` in the user's own cache."""


class SplitOptions(Options):
    """How users are divided where the data does not say (docs/method.md, Users)."""

    kind: Literal["grouped", "published"] = "grouped"
    """`grouped`: users that share content stay on one side; `published`: as OPPU, Per-Pcs and MTA
    divide users, whoever their author is."""
    few_shot_users: int | None = Field(None, ge=1)
    """Most few-shot users; null: all of them, with `published` 100."""
    base_share: float = Field(1 / 3, ge=0.0, lt=1.0)
    """Share of the users that are base users."""
    anchor_share: float = Field(1 / 3, gt=0.0, lt=1.0)
    """Share of the users that are anchor candidates; the rest are few-shot users."""
    same_author_share: float = Field(0.5, gt=0.0, le=1.0)
    """Users that share so much of the smaller profile are one author."""
    allow_shared_groups: bool = False
    """Leave out and count users of an author on two sides, instead of refusing the data."""
    few_shot_items: int | None = Field(None, ge=1)
    """Items of each few-shot user that are shown; null: all, with `published` 10."""
    base_candidates: bool = False
    """Base users are anchor candidates, too. Nobody of either side is scored."""
    development: bool = False
    """Score half of the anchor candidates that are no base users in the few-shot users' place, to
    choose settings."""

    @model_validator(mode="after")
    def _leaves_few_shot(self) -> Self:
        if self.base_share + self.anchor_share >= 1.0:
            raise ValueError("base_share + anchor_share must stay below 1, the rest is few-shot")
        if self.kind == "published" and self.base_candidates:
            # Its sides may have the same user ids.
            raise ValueError("base_candidates needs split.kind grouped")
        return self


class PromptOptions(Options):
    """What a question looks like to the model."""

    style: Literal["compact", "published"] = "compact"
    """`published`: history, instruction, text, cue; `compact`: text and cue only."""
    history_items: int = Field(0, ge=0)
    """Items of the history before each question."""
    history_index: Literal["text", "published"] = "text"
    """What history is found by: items' texts, or as the MTA code does it (`published`)."""
    chat: Literal["auto", "never"] = "auto"
    """Ask through the base model's chat template where it has one, or never."""


class TaskOptions(Options):
    """A task of the user's own, in LaMP's shape (docs/your-data.md)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Its name in tables, MLflow and `per_task`."""
    text: str = Field(min_length=1)
    """The field of a profile item that is asked about."""
    answer: str = Field(min_length=1)
    """The field with its answer."""
    instruction: str = Field(min_length=1)
    """Stands before a query's text; its last word is the marker that queries may carry, too."""
    labels: list[str] = Field([])
    """Every possible answer; empty for free text."""
    metric: Literal["classification", "rating", "text"]
    """Accuracy and F1 (`classification`), MAE and RMSE (`rating`), or ROUGE (`text`)."""
    max_new_tokens: int = Field(32, ge=1)
    """Most tokens of an answer."""

    @model_validator(mode="after")
    def _labels_fit(self) -> Self:
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
