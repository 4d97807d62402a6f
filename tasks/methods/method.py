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
# The settings of methods that find weights in another way: no evidence is computed for them.
WITHOUT_EVIDENCE = {"fusion": {"weights": "cosine", "order": "right", "merge": "exact"}}


@dataclass(frozen=True)
class Method:
    """One way to make the base model personal to each user.

    Most methods only say what they add: items of the history in the prompt, a LoRA merged from the
    bank, a LoRA trained on the user's items. Others have `fit` and `adapt`, or answer without the
    model.

    name: in configuration and tables. order: of its row in tables. version: raised when it makes
    other LoRAs than before. settings: what it changes in the configuration, for itself.
    history: the items most similar to the query (BM25) stand in the prompt (`rag.history_items`).
    merged: a LoRA is merged from the bank by the user's recipe. trained: the section of the
    configuration by which a LoRA is trained on the user's items, over the merged one if any.
    bank: calls a stage that makes a bank from the usual one. recipes: calls a stage that makes
    recipes from the bank and the recipes by `fusion`. Both are for methods that merge, and run in
    the flow. A plan takes the argument `before` of such a stage for its result.
    fit: calls a stage that makes something once for all users, beside the bank if any (a router,
    say). It runs in the flow, and its result is `batch.fitted`.
    adapt: makes the LoRAs of a batch of users, in the process that runs the model; None stands for
    `merged_and_trained` (tasks/stacking.py).
    answer: answers in place of the engine: per user of the batch, an answer to each query.
    about: per user of the batch, a text that stands before each question, and the seconds it took.
    label_prior: the labels' likelihoods are weighed by how often the user gave them
    (`label_prior`); without labels nothing changes.
    passes: how often the model reads a question to answer it; None: once under each anchor of the
    user's recipe. grouped: whether it needs `base.engine=grouped`.
    default: whether it is compared if a run names no methods.
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
        """Whether a user's LoRAs need only bank, recipe and training."""
        more = self.adapt or self.answer or self.recipes or self.about or self.fit
        return self.merged and not more

    @property
    def uses_items(self) -> bool:
        """Whether anything in it depends on the user's items."""
        plain = self.history or self.merged or self.label_prior
        return plain or bool(self.trained or self.answer or self.about)
