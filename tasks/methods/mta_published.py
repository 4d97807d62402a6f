"""MTA as its authors' code does it (docs/method.md, stages 1 to 3).

Users are embedded by their texts and clustered by k-means. The top two anchors are merged factor by
factor, with their weights the wrong way round. The stacked LoRA takes two optimiser steps.
"""

from tasks.methods.method import Method

# The published hyper-parameters, which the preset `paper` takes from here.
FUSION = {"top_m": 2, "merge": "factors"}
STACKING = {
    "rank": 4,
    "alpha": 8.0,
    "learning_rate": 5e-5,
    "epochs": 1,
    "batch_size": 2,
    "accumulation": 4,
}
SETTINGS = {
    "anchors": {"embedding": "text", "clustering": "kmeans", "train_on": "user"},
    "fusion": {**FUSION, "weights": "cosine", "order": "published"},
    "stacking": STACKING,
}
METHOD = Method("mta_published", order=60, settings=SETTINGS, merged=True, trained="stacking")
