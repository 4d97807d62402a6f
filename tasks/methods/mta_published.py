"""MTA as its authors' code does it (docs/method.md, stages 1 to 3).

Users are embedded by their texts and clustered by k-means; the top two anchors are merged factor by
factor, with their weights the wrong way round; the stacked LoRA takes two optimiser steps.
"""

from tasks.config.presets import PRESETS
from tasks.methods.method import Method


class MtaPublished(Method):
    name = "mta_published"
    order = 60
    merged = True
    trained = "stacking"
    settings = {  # noqa: RUF012
        "anchors": {"embedding": "text", "clustering": "kmeans", "train_on": "user"},
        "fusion": {**PRESETS["paper"]["fusion"], "weights": "cosine", "order": "published"},
        "stacking": PRESETS["paper"]["stacking"],
    }


METHOD = MtaPublished()
