"""The results of the stages, in their order. Tables are parquet, weights safetensors.

U users, K anchors, N items, D dimensions, m anchors of a user.
"""

from typing import Annotated, Any, Literal

from tasks.config.options import ComputeOptions
from tasks.lamp.definitions import LampTask
from tasks.lamp.options import PromptOptions
from tasks.record import OUTSIDE_KEY, File, Record, Result

Note = Annotated[dict[str, Any], OUTSIDE_KEY]
Counts = Annotated[dict[str, int], OUTSIDE_KEY]


class SourceFiles(Record):
    """The files that users are read from: where they lie, and the hash of each."""

    path: Annotated[str, OUTSIDE_KEY]
    files: dict[str, str]


class Prepared(Result):
    """The users of one LaMP task on three sides: tables of user_id, group (author), profile, query.

    anchor: the candidates; with `split.base_candidates` the base users stand behind them.
    pooled: user_id, row of base users and candidates that stand in their author's row. Of generated
    worlds: optimum, the best answers to few-shot users' queries; population: user_id, first, second
    (archetypes), mixture. longest_candidate: items of the longest history of an anchor candidate.
    audit: tasks/lamp/audit.py.
    """

    task: LampTask
    base: File
    anchor: File
    few_shot: File
    pooled: File
    optimum: File | None = None
    population: File | None = None
    few_shot_ids: tuple[str, ...]
    instruction: str
    longest_candidate: Annotated[int, OUTSIDE_KEY]
    counts: Counts
    dropped: Counts
    audit: Note

    @property
    def unscored(self) -> tuple[File, ...]:
        """The tables of everybody but few-shot users, in which nobody stands twice."""
        both = self.counts.get("base_users_as_candidates", 0) > 0
        return (self.anchor,) if both else (self.base, self.anchor)

    def side(self, role: str) -> File:
        """The table of `base`, `anchor` or `few_shot`."""
        return {"base": self.base, "anchor": self.anchor, "few_shot": self.few_shot}[role]


class Questions(Record):
    """What turns items into questions, the same for all users of one LaMP task.

    instruction: empty where the prompt's style has none. layout, retrieval: versions of the texts
    and of the look-up of history, where the prompt has these.
    """

    task: LampTask
    prompt: PromptOptions
    instruction: str = ""
    layout: int | str | None = None
    retrieval: int | str | None = None


class Training(Record):
    """How one training went: items, optimiser steps, tokens, cut samples, a loss per step.

    failed: the loss stopped being finite at the last step. seconds: of its share of its job.
    """

    items: int = 0
    steps: int = 0
    tokens: int = 0
    truncated: int = 0
    losses: tuple[float, ...] = ()
    failed: bool = False
    seconds: float = 0.0


class Base(Result):
    """The frozen base model, and how it is loaded.

    model: `tiny`, a folder or a hub id. content: the hash of its files. weights: its folder in the
    store, of `tiny` only. adapter: a PEFT folder that is added when it is loaded. dtype: in memory.
    adapter_dtype: of LoRAs' products.
    """

    model: Annotated[str, OUTSIDE_KEY]
    content: str
    revision: str | None = None
    weights: Annotated[File | None, OUTSIDE_KEY] = None
    adapter: File | None = None
    dtype: Literal["float32", "bfloat16"]
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    max_tokens: int
    chat: Literal["auto", "never"] = "auto"
    engine: Literal["grouped", "peft"] = "grouped"
    gradient_checkpointing: Annotated[bool, OUTSIDE_KEY] = False
    kind: Annotated[str, OUTSIDE_KEY] = "tiny"
    parameters: Annotated[int, OUTSIDE_KEY] = 0
    training: Annotated[Training | None, OUTSIDE_KEY] = None


class Setting(Record):
    """What a stage that runs the model is given: the base model, how it is asked, and where."""

    base: Base
    questions: Questions
    seed: int
    compute: ComputeOptions


class Embedded(Result):
    """One vector per user: `table` of role, user_id, vector [D] (float32).

    whitening: [D, D] of signatures at the input (tasks/method/whitening.py).
    """

    table: File
    whitening: File | None = None
    centred: bool
    users: Annotated[int, OUTSIDE_KEY]
    dimensions: Annotated[int, OUTSIDE_KEY]


class Clusters(Result):
    """A cluster per anchor candidate in their order, -1 is noise."""

    clusters: tuple[int, ...]


class Anchor(Record):
    """An anchor user, or a whole cluster (`cluster-<number>`); items: of all members together."""

    name: str
    items: int
    cluster: int
    members: tuple[str, ...]


class Anchors(Result):
    """The anchors in order of choice, and how they were chosen.

    table: role, user_id, items, cluster (-1 is noise), x, y (principal components), order (null for
    who is no anchor alone). asked: single users that were wanted. eligible: with enough items.
    """

    table: File
    anchors: tuple[Anchor, ...]
    whole_clusters: int
    asked: int
    candidates: int
    eligible: int
    clusters: int
    noise: int

    @property
    def single_users(self) -> int:
        """How many of the anchors are no whole clusters."""
        return len(self.anchors) - self.whole_clusters


class MetaLora(Record):
    """The LoRA of one anchor: a PEFT folder `adapter`; without members it was given."""

    anchor: str
    members: tuple[str, ...]
    adapter: File
    training: Annotated[Training, OUTSIDE_KEY]


class MetaLoras(Result):
    """The LoRAs of one job's anchors; of those that failed, why, in a line each."""

    loras: tuple[MetaLora, ...]
    failed: tuple[str, ...] = ()


class Bank(Result):
    """The meta-LoRAs side by side in `file`, in the order of `members`. map: of the users."""

    file: File
    members: tuple[MetaLora, ...]
    map: Annotated[File | None, OUTSIDE_KEY] = None

    @property
    def names(self) -> list[str]:
        return [member.anchor for member in self.members]


class Evidence(Result):
    """`table`: user_id, log_likelihoods [K] under the bank's LoRAs (NaN: not asked), seconds."""

    table: File


class Recipes(Result):
    """`table`: user_id, anchors, similarities, weights [m], best first; seconds, steps, tokens."""

    table: File
    users: int
    anchors_per_user: int
    without_similar_anchor: int


class Merged(Record):
    """What users' LoRAs are merged from, and how (`fusion.merge`)."""

    bank: Bank
    recipes: Recipes
    how: str


class Answers(Result):
    """The answers of one method to a batch of users.

    predictions: user_id and lists of query_id, gold, prediction. work: user_id, and `Training` with
    the seconds of answering. merged: whether a LoRA is merged below. stacked: the users' own, a
    bank in their order. bytes_per_user: of one, and of the text about the user. failed: whose
    training stopped, in a line each.
    """

    users: tuple[str, ...]
    predictions: File
    work: Annotated[File, OUTSIDE_KEY]
    merged: bool = False
    stacked: File | None = None
    bytes_per_user: int = 0
    failed: Annotated[tuple[str, ...], OUTSIDE_KEY] = ()


class Scored(Record):
    """What a method was scored on: `predictions`, and `golds` in LaMP's format of submissions.

    no_label: the share (0..1) of answers that are no label; None for tasks without labels.
    """

    method: str
    users: int
    queries: int
    predictions: File
    golds: File
    no_label: float | None = None


class Estimate(Record):
    """A number with its 95 % interval; None where it is not known."""

    point: float | None = None
    lo: float | None = None
    hi: float | None = None

    def text(self, form: str = ".3f") -> str:
        """The number, and its interval if there is one; `-` where it is not known."""
        if self.point is None:
            return "-"
        if self.lo is None or self.hi is None:
            return f"{self.point:{form}}"
        return f"{self.point:{form}} [{self.lo:{form}}, {self.hi:{form}}]"


class Difference(Estimate):
    """A difference of two methods; holds: its interval does not touch zero."""

    holds: bool | None = None


class Compared(Result):
    """Methods of one LaMP task and seed (a cell), or of the mean over cells.

    intervals: method -> metric -> estimate. differences: method -> opponent -> metric. Worlds with
    an optimum have `nonpersonal`, `bayes` and `oracle`, too. draws: the bootstrap's, of a cell.
    """

    task: LampTask | None = None
    rules: Literal["lamp", "mta_published", "unicode"] = "lamp"
    sample: str = ""
    cells: int = 1
    groups: int
    queries: int
    methods: tuple[str, ...]
    intervals: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, dict[str, Difference]]]
    scored: tuple[Scored, ...] = ()
    draws: File | None = None
    golds_without_token: Annotated[int, OUTSIDE_KEY] = 0

    def estimate(self, method: str, metric: str = "score") -> Estimate:
        """A method's metric; an empty one where it has none."""
        return self.intervals.get(method, {}).get(metric, Estimate())
