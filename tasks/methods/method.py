"""What a method is: the frozen base model, and what is added to it for each user."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from tasks.config.task import MethodConfig
    from tasks.record import Result
    from tasks.results.models import Base, Prepared
    from tasks.stacking import Adapted, Batch


class Method:
    """One way to make the base model personal to each user.

    Most methods only say what they add: items of the history in the prompt, a LoRA merged from the
    bank, a LoRA of the user's own. Others define `fit` and
    `adaptation`.

    name: in configuration and tables. order: of its row in tables. version: raised when it
    makes other LoRAs than before. settings: what it changes in the configuration, for itself.
    history: the items most similar to the query (BM25) stand in the prompt (`rag.history_items`).
    merged: a LoRA merged from the bank by the user's recipe. trained: the section of the
    configuration by which a LoRA is trained on the user's items, over the merged one if any.
    """

    name: ClassVar[str]
    order: ClassVar[int] = 100
    version: ClassVar[int] = 1
    settings: ClassVar[Mapping[str, Any]] = {}
    history: ClassVar[bool] = False
    merged: ClassVar[bool] = False
    trained: ClassVar[str | None] = None

    @property
    def uses_items(self) -> bool:
        """Whether anything of it depends on the user's items."""
        return self.history or self.merged or self.trained is not None

    def fit(self, config: MethodConfig, users: Prepared, base: Base) -> Result | None:
        """What is made once, for all users, beside the bank: a stage's result (a router, say).

        Called in the flow. It reaches the adaptation as `batch.fitted`.
        """
        return None

    def adaptation(self) -> Callable[[Batch], Adapted] | None:
        """What makes the LoRAs of a batch of users, where the model is run.

        None stands for `merged_and_trained` (tasks/stacking.py).
        """
        return None
