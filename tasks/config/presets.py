"""The presets: what each sets beside the defaults of the options."""

from typing import Any

from tasks.config.options import SYNTHETIC_TASKS
from tasks.methods import METHODS
from tasks.methods.mta_published import FUSION, STACKING

# Beside the methods of every run those that need nothing trained for them.
UNTRAINED = ("base_prior", "rag_4", "mta_prior", "commonest_of_all", "commonest", "knn")
# Short trainings of small LoRAs, for the tiny model.
SHORT = {"learning_rate": 5e-3, "epochs": 6, "batch_size": 4, "accumulation": 1}
# `embedded`: values from worlds of seeds 100 to 103 (docs/defaults.md); what else was looked at,
# docs/measurements.md says.
PRESETS: dict[str, dict[str, Any]] = {
    "embedded": {
        # `base`: offline there is no text encoder. Jobs take a second: several anchors in each.
        "anchors": {
            "text_model": "base",
            # At the input, where answers of one of two words tell users apart, too.
            "embedding": "input_signature",
            "signature_vocabulary": 128,
            "signature_hidden": 16,
            "train_on": "cluster",
            "clustering": "silhouette",
            "per_job": 8,
        },
        "meta_lora": {"learning_rate": 5e-3, "epochs": 5, "batch_size": 8, "accumulation": 1},
        "fusion": {"top_m": 16, "weights": "evidence", "evidence_temperature": 1.0},
        "stacking": {"rank": 4, "alpha": 8.0} | SHORT,
        "oppu": SHORT,
        # Ten choices between two references, or ten noisy ratings, teach little: at 5e-3 they took
        # from the merged LoRA. A cluster's hundreds of them take longer to learn, and of choices a
        # smaller rate: at 5e-3 some clusters ended at chance. Vectors of ten such items tell users
        # apart as well as their likelihoods do, and otherwise (docs/defaults.md).
        "per_task": {
            "LaMP-1": {
                "meta_lora": {"learning_rate": 2e-3, "epochs": 24},
                "fusion": {"vectors": True},
                "stacking": {"learning_rate": 1e-3},
                "oppu": {"learning_rate": 2e-3},
            },
            "LaMP-3": {
                "meta_lora": {"epochs": 12},
                "fusion": {"vectors": True},
                "stacking": {"learning_rate": 5e-4},
                "oppu": {"learning_rate": 2e-3},
            },
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
    # A small real model and real people, by development users of LaMP-2M (docs/real.md).
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
        # Without the chat template, through which a small model explains before it answers.
        "prompt": {"chat": "never"},
        # Few people have many items: each candidate of five and more may be an anchor.
        "anchors": {"embedding": "text", "text_model": "base", "min_items": 5},
        "meta_lora": {"learning_rate": 1e-3, "epochs": 2},
        "fusion": {"top_m": 4, "weights": "evidence", "evidence_temperature": 3.0, "shortlist": 8},
        "stacking": {"rank": 4, "alpha": 8.0, "learning_rate": 5e-4, "epochs": 2},
        "oppu": {"learning_rate": 5e-4, "epochs": 2},
        "label_prior": {"strength": 2.0, "smoothing": 0.3},
        "scoring": {"answer": "likelihood"},
    },
}

# What only the generated worlds have: all tasks, and users with more items than are shown at first.
WORLDS: dict[str, Any] = {
    "lamp_tasks": list(SYNTHETIC_TASKS),
    "split": {"few_shot_items": 10},
    "items_curve": [2, 5, 10, 20],
}

# A model that is given in place of the tiny one has learnt most before: rates as published
# (docs/method.md, stage 1), for every LaMP task. What `embedded` has was chosen for the tiny model.
GIVEN_MODEL: dict[str, Any] = {
    section: {"learning_rate": 1e-4} for section in ("meta_lora", "stacking", "oppu")
}
