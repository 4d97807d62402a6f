"""The presets: what each sets beside the defaults of the options."""

from typing import Any

from tasks.config.options import SYNTHETIC_TASKS
from tasks.methods import METHODS
from tasks.methods.mta_published import FUSION, STACKING

# Methods that need no training of their own, beside those of every run.
UNTRAINED = ("base_prior", "rag_4", "mta_prior", "commonest_of_all", "commonest", "knn")
# Short trainings of small LoRAs, for the tiny model.
SHORT = {"learning_rate": 5e-3, "epochs": 6, "batch_size": 4, "accumulation": 1}
# `embedded`: chosen on worlds of seeds 100 to 103 (docs/defaults.md). docs/measurements.md has what
# else was tried.
PRESETS: dict[str, dict[str, Any]] = {
    "embedded": {
        # Three times the items for a LoRA of the bank (docs/defaults.md). Without them: APART.
        "split": {"base_candidates": True},
        # `base`: there is no text encoder offline. `per_job`: an anchor takes a second.
        "anchors": {
            "text_model": "base",
            # At the input, even answers of one of two words tell users apart.
            "embedding": "input_signature",
            "signature_vocabulary": 128,
            "signature_hidden": 16,
            "train_on": "cluster",
            "clustering": "silhouette",
            "per_job": 8,
        },
        "meta_lora": {"learning_rate": 5e-3, "epochs": 2, "batch_size": 8, "accumulation": 1},
        "fusion": {"top_m": 16, "weights": "evidence", "evidence_temperature": 0.25},
        "stacking": {"rank": 4, "alpha": 8.0} | SHORT,
        "oppu": SHORT,
        # Ten choices between two references, or ten noisy ratings, teach little: at 5e-3 stacking
        # spoilt what merging gave. Clusters need more epochs. For LaMP-1 they need a smaller rate,
        # too: at 5e-3 some ended at chance. Vectors of ten such items tell users apart as well as
        # likelihoods do, and by other facts (docs/defaults.md).
        "per_task": {
            "LaMP-1": {
                "meta_lora": {"learning_rate": 2e-3, "epochs": 8},
                "fusion": {"vectors": True},
                "stacking": {"learning_rate": 1e-3},
                "oppu": {"learning_rate": 2e-3},
            },
            "LaMP-3": {
                "meta_lora": {"epochs": 4},
                "fusion": {"vectors": True},
                "stacking": {"learning_rate": 5e-4},
                "oppu": {"learning_rate": 2e-3},
            },
            # At 5e-3 stacking took from LaMP-5 of seeds 6 to 8. 2e-3 adds as much.
            "LaMP-4": {"stacking": {"learning_rate": 2e-3}},
            "LaMP-5": {"stacking": {"learning_rate": 2e-3}},
        },
    },
    # docs/method.md, stages 1 to 3: the published hyper-parameters.
    "paper": {
        "methods": ["base", "merge_only", "mta"],
        "base": {
            "model": "meta-llama/Meta-Llama-3-8B-Instruct",
            "gradient_checkpointing": True,
            "max_tokens": 8192,
        },
        "split": {"kind": "published", "few_shot_users": 100},
        "prompt": {"style": "published", "history_items": 1, "history_index": "published"},
        "anchors": {"embedding": "text", "clustering": "kmeans", "count": 50},
        "fusion": FUSION,
        "stacking": STACKING,
    },
    # For a small real model and real people, chosen on LaMP-2M's development users (docs/real.md).
    "real": {
        "methods": [name for name in METHODS if METHODS[name].default or name in UNTRAINED],
        "base": {
            "model": "smollm2",
            "max_tokens": 512,
            "task_adapt": {
                "enabled": True,
                "train_on": "profile",
                "target_modules": "all-linear",
                "learning_rate": 5e-4,
                "epochs": 2,
                "batch_size": 4,
                "max_grad_norm": 1.0,
            },
        },
        # With its chat template a small model explains before it answers.
        "prompt": {"chat": "never"},
        # Few people have many items, so five are enough for an anchor.
        "anchors": {"embedding": "text", "text_model": "base", "min_items": 5},
        "meta_lora": {"learning_rate": 1e-3, "epochs": 2},
        "fusion": {"top_m": 4, "weights": "evidence", "evidence_temperature": 3.0, "shortlist": 8},
        "stacking": {"rank": 4, "alpha": 8.0, "learning_rate": 5e-4, "epochs": 2},
        "oppu": {"learning_rate": 5e-4, "epochs": 2},
        "label_prior": {"strength": 2.0, "smoothing": 0.3},
        "scoring": {"answer": "likelihood"},
    },
}

# For generated worlds only: all five tasks, ten items of each user, and a curve up to twenty.
WORLDS: dict[str, Any] = {
    "lamp_tasks": list(SYNTHETIC_TASKS),
    "split": {"few_shot_items": 10},
    "items_curve": [2, 5, 10, 20],
}

# Where base users are no candidates, a cluster has fewer items, and its LoRA needs more epochs.
APART: dict[str, Any] = {
    "meta_lora": {"epochs": 5},
    "per_task": {
        "LaMP-1": {"meta_lora": {"epochs": 24}},
        "LaMP-3": {"meta_lora": {"epochs": 12}},
    },
}

# For a given model in place of the tiny one: the published rate and epochs (docs/method.md, stage
# 1), in every LaMP task, and the posterior's own weights. Those of `embedded` are for the tiny
# model. A given model has learned most before.
GIVEN_MODEL: dict[str, Any] = {
    "fusion": {"evidence_temperature": 1.0},
    "meta_lora": {"learning_rate": 1e-4, "epochs": 3},
    "stacking": {"learning_rate": 1e-4},
    "oppu": {"learning_rate": 1e-4},
}
