"""The parameters of a run of seconds, for the flow tests and the driver of faults."""

from __future__ import annotations

from typing import Any

# A world of seconds: 12 base users, 10 anchor candidates in reach of 3 anchors, 5 few-shot users.
SMALL: dict[str, Any] = {
    "lamp_tasks": ["LaMP-2M"],
    "methods": ["base", "merge_only", "mta"],
    "items_curve": [],
    "split": {"few_shot_items": 6, "base_candidates": False},
    "synthetic": {
        "base_users": 12,
        "anchor_candidates": 10,
        "few_shot_users": 5,
        "items_min": 11,
        "items_max": 14,
        "few_shot_items": 8,
        "queries": 3,
        "themes": 4,
    },
    "base": {"tiny": {"hidden": 16, "layers": 1, "heads": 2, "steps": 30, "batch_size": 16}},
    # 256 numbers a user: the matrix that whitens them would else be most of the store.
    "anchors": {
        "signature_vocabulary": 16,
        "signature_hidden": 16,
        "count": 3,
        "min_cluster_size": 3,
        "train_on": "user",
        "per_job": 1,
    },
    "meta_lora": {"rank": 2, "alpha": 4.0, "epochs": 1, "batch_size": 8},
    "fusion": {"top_m": 2, "weights": "cosine"},
    "stacking": {"rank": 2, "alpha": 4.0, "epochs": 1, "users_per_job": 3},
    # tests/flows/test_personalise.py has one registered.
    "mlflow": {"register_bank": False},
    # Tests change the code in their own process; what processes do is tested in test_runners.py.
    "compute": {"workers": "threads", "max_workers": 1},
}
