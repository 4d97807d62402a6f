"""The methods that are compared, on the same users, prompts and seed.

A method is the frozen base model with up to three things added: items of the user's history in the
prompt, a LoRA merged from the bank, a LoRA of the user's own. A new method is an entry in METHODS.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, WithJsonSchema

from tasks.presets import PRESETS


@dataclass(frozen=True)
class Method:
    """What a method adds to the base model.

    history: the items most similar to the query (BM25) stand in the prompt (`rag.history_items`).
    merged: a LoRA merged from the bank by the user's recipe.
    trained: the section of the configuration by which a LoRA is trained on the user's items, over
        the merged one if there is one.
    settings: what it changes in the configuration, for this method only.
    """

    history: bool = False
    merged: bool = False
    trained: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


# As published (METHOD, stages 1 to 3): users embedded by their texts, k-means, the top two anchors
# merged factor by factor with their weights the wrong way round, and two optimiser steps on top.
PUBLISHED = {
    "anchors": {"embedding": "text", "clustering": "kmeans", "train_on": "user"},
    "fusion": {**PRESETS["paper"]["fusion"], "weights": "cosine", "order": "published"},
    "stacking": PRESETS["paper"]["stacking"],
}

METHODS: dict[str, Method] = {
    "base": Method(),
    "rag": Method(history=True),
    "oppu": Method(trained="oppu"),
    "merge_only": Method(merged=True),
    "stack_only": Method(trained="stacking"),
    "mta": Method(merged=True, trained="stacking"),
    "mta_published": Method(merged=True, trained="stacking", settings=PUBLISHED),
}


def bank_kind(config: dict[str, Any]) -> dict[str, Any]:
    """What of a method's configuration decides its bank and recipes: methods alike share them."""
    return {section: config[section] for section in ("anchors", "meta_lora", "fusion")}


def _known(name: str) -> str:
    if name not in METHODS:
        raise ValueError(f"there is no method {name}; there are {', '.join(METHODS)}")
    return name


# The schema of the flow's parameters lists them, too.
MethodName = Annotated[str, AfterValidator(_known), WithJsonSchema({"enum": list(METHODS)})]
