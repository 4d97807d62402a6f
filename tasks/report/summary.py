"""A run in a few lines of plain text, for where no page is: what ran, and what came out."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from tasks.adapted import adapted_notes
from tasks.base_model import model_name
from tasks.config import RunConfig
from tasks.report.table import notes
from tasks.report.words import seed_lines, verdict
from tasks.store.artifacts import Store


def run_summary(data: dict[str, Any]) -> list[str]:
    """Two lines of the dict of `data.report_data`."""
    about = data["about"]
    tasks, seeds = ", ".join(about["lamp_tasks"]), ", ".join(map(str, about["seeds"]))
    return [
        f"{len(data['methods'])} methods on {tasks}, seed {seeds}: data {about['data']}, preset "
        f"{about['preset']}, base model {about['base']}.",
        unescape(re.sub(r"<[^>]+>", "", verdict(data))),
    ]


def data_lines(config: RunConfig) -> list[str]:
    """What must be known of the data before anything is read."""
    if config.data != "synthetic" or config.base.model == "tiny":
        return []
    return [
        f"data=synthetic: the users are generated, of words that mean nothing to the model "
        f"{model_name(config)}; give data=FOLDER or data=lamp"
    ]


def run_notes(config: RunConfig, summaries: list[dict[str, Any]], where: Store) -> list[str]:
    """What must be known of a run's numbers: its data, its LoRAs, how far its seeds lie apart."""
    lines = data_lines(config)
    lines += [line for summary in summaries for line in notes(summary, where)]
    return lines + adapted_notes(summaries) + seed_lines(summaries)
