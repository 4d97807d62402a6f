"""What a method is: the frozen base model, and what is added to it for each user."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.config.task import MethodConfig
    from tasks.record import Result
    from tasks.results.models import (
        Anchors,
        Bank,
        Embedded,
        Merged,
        Prepared,
        Recipes,
        Setting,
    )
    from tasks.stacking import Adapted, Batch


# The settings of methods that need the likelihood of each label.
LIKELIHOOD = {"scoring": {"answer": "likelihood"}}
# Of methods with weights of their own: no evidence is asked for, of which they need none.
WITHOUT_EVIDENCE = {"fusion": {"weights": "cosine", "order": "right", "merge": "exact"}}


@dataclass(frozen=True)
class Method:
    """One way to make the base model personal to each user.

    Most methods only say what they add: items of the history in the prompt, a LoRA merged from the
    bank, a LoRA of the user's own. Others have `fit` and `adapt`, or answer without the model.

    name: in configuration and tables. order: of its row in tables. version: raised when it makes
    other LoRAs than before. settings: what it changes in the configuration, for itself.
    history: the items most similar to the query (BM25) stand in the prompt (`rag.history_items`).
    merged: a LoRA merged from the bank by the user's recipe. trained: the section of the
    configuration by which a LoRA is trained on the user's items, over the merged one if any.
    bank: a stage's bank in place of the usual one, which it is given. recipes: a stage's recipes in
    place of those by `fusion`, which it is given with the bank. Both are of methods that merge, and
    are called in the flow; a plan takes what such a stage is given as `before`.
    fit: what is made once, for all users, beside the bank if any, by a stage (a router, say);
    called in the flow. It reaches `adapt` as `batch.fitted`.
    adapt: what makes the LoRAs of a batch of users, where the model is run; None stands for
    `merged_and_trained` (tasks/stacking.py).
    answer: what answers in the engine's place: per user of the batch, an answer to each query.
    about: a text per user of the batch that stands before each question, and the seconds it took.
    label_prior: the labels' likelihoods are weighed by how often the user gave them
    (`label_prior`); without labels nothing changes.
    passes: how often the model reads a question to answer it; None: once under each anchor of the
    user's recipe. grouped: whether it needs `base.engine=grouped`.
    default: whether it is compared where a run names no methods.
    """

    name: str
    order: int = 100
    version: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    history: bool = False
    merged: bool = False
    trained: str | None = None
    bank: Callable[[MethodConfig, Prepared, Anchors, Bank, Setting], Bank] | None = None
    recipes: Callable[[MethodConfig, Prepared, Embedded, Merged, Setting], Recipes] | None = None
    fit: Callable[[MethodConfig, Prepared, Setting, Merged | None], Result] | None = None
    adapt: Callable[[Batch], Adapted] | None = None
    answer: Callable[[Batch], list[list[str]]] | None = None
    about: Callable[[Batch], list[tuple[str, float]]] | None = None
    label_prior: bool = False
    passes: float | None = 1.0
    grouped: bool = False
    default: bool = True

    @property
    def for_new_users(self) -> bool:
        """Whether bank, recipe and training are all that a user's LoRAs take."""
        own = self.adapt or self.answer or self.recipes or self.about or self.fit
        return self.merged and not own

    @property
    def uses_items(self) -> bool:
        """Whether anything of it depends on the user's items."""
        plain = self.history or self.merged or self.label_prior
        return plain or bool(self.trained or self.answer or self.about)
