"""Tokens kept in the store against tokens made anew by every stage.

    python -m tests.benchmarks.tokenise             1,000 users as in preset `paper`
    python -m tests.benchmarks.tokenise --quick     100 of them
    python -m tests.benchmarks.tokenise --embedded  60 users as in the embedded benchmark

Both ask what the stages ask of few-shot users, in their order and batches of 64: the embedding's
signature and the evidence of all at once, then training by four methods (`oppu`, `stack_only`,
`mta`, `mta_published`) and answers by seven, one of them with history in the prompt. Texts are of
random words with Zipf's frequencies, the tokenizer a byte-level BPE trained on them. The last line
is one JSON object: seconds of both, their ratio, and the bytes that were kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tasks.config.run import resolve
from tasks.lamp.definitions import get_task
from tasks.lamp.options import PromptOptions
from tasks.lora.base import Base as LoadedBase
from tasks.lora.batches import Encoded
from tasks.lora.tiny import train_tokenizer
from tasks.methods import METHODS
from tasks.results.models import Base, Questions
from tasks.text.questions import User
from tasks.text.tokens import Kind, samples_of, tokens_of

INSTRUCTION = "Generate a title for the following abstract of a paper: "
BATCH = 64
# (users, words of a text, words of an answer, items, queries, style, history in every prompt)
SHAPES = {
    "paper": (1000, 180, 12, 10, 2, "published", 1),
    "embedded": (60, 8, 2, 10, 20, "compact", 0),
}
Ask = Callable[[Questions, Kind, list[User]], list[list[Encoded]]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--embedded", action="store_true")
    given = parser.parse_args()
    count, words, short, items, queries, style, history = SHAPES[
        "embedded" if given.embedded else "paper"
    ]
    prompt = PromptOptions.model_validate({"style": style, "history_items": history})
    questions = Questions(task=get_task("LaMP-5"), prompt=prompt, instruction=INSTRUCTION)
    draw = text_maker()
    users = [
        person(number, draw, words, short, items, queries)
        for number in range(count // 10 if given.quick else count)
    ]
    texts = [item["text"] for user in users[:100] for item in user["profile"]]
    loaded = LoadedBase(None, train_tokenizer(texts, 32_000), torch.device("cpu"), 8192)
    base = Base(model="none", content="tokenizer", dtype="float32", max_tokens=8192)

    def anew(asked: Questions, kind: Kind, some: list[User]) -> list[list[Encoded]]:
        return [samples_of(asked, loaded, kind, user) for user in some]

    def kept(asked: Questions, kind: Kind, some: list[User]) -> list[list[Encoded]]:
        return [list(own) for own in tokens_of(asked, base, loaded, kind, some)]

    with tempfile.TemporaryDirectory() as folder:
        os.environ["MTA_STORE"] = folder
        first, tokens = measure(anew, questions, users)
        second, same = measure(kept, questions, users)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    if tokens != same:
        raise AssertionError(f"{tokens} tokens anew, {same} kept")
    print(
        json.dumps(
            {
                "users": len(users),
                "tokens_per_sample": round(tokens / samples(users), 1),
                "seconds_anew": round(first, 2),
                "seconds_kept": round(second, 2),
                "ratio": round(first / second, 2),
                "kept_bytes": size,
            }
        )
    )


def calls(questions: Questions, users: list[User]) -> Iterator[tuple[Questions, Kind, list[User]]]:
    """What the stages ask for, one after another."""
    batches = [users[start : start + BATCH] for start in range(0, len(users), BATCH)]
    prompt = questions.prompt.model_copy(update={"history_items": resolve({}).rag.history_items})
    longer = questions.model_copy(update={"prompt": prompt})
    yield questions, "profile", users
    yield questions, "profile", users
    kinds: tuple[Kind, ...] = ("profile", "queries")
    for method in METHODS.values():
        own = longer if method.history else questions
        for kind in kinds if method.trained else kinds[1:]:
            for batch in batches:
                yield own, kind, batch


def measure(ask: Ask, questions: Questions, users: list[User]) -> tuple[float, int]:
    """(seconds of all calls, tokens that they gave)."""
    tokens, seconds = 0, 0.0
    for asked, kind, some in calls(questions, users):
        started = time.perf_counter()
        found = ask(asked, kind, some)
        seconds += time.perf_counter() - started
        tokens += sum(len(one.prompt) + len(one.answer) for own in found for one in own)
    return seconds, tokens


def samples(users: list[User]) -> int:
    """How many samples all calls give."""
    trained = sum(method.trained is not None for method in METHODS.values())
    return sum(
        (2 + trained) * len(user["profile"]) + len(METHODS) * len(user["query"]) for user in users
    )


def text_maker() -> Callable[[int], str]:
    """Texts of so many words, of 20,000 by Zipf's law."""
    generator = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(generator.choices(letters, k=generator.randint(2, 10))) for _ in range(20_000)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    return lambda count: " ".join(generator.choices(words, weights, k=count))


def person(
    number: int, draw: Callable[[int], str], words: int, short: int, items: int, queries: int
) -> dict[str, Any]:
    return {
        "user_id": f"user-{number}",
        "profile": [
            {"id": f"{number}-{n}", "text": draw(words), "answer": draw(short)}
            for n in range(items)
        ],
        "query": [
            {"id": f"{number}-q{n}", "input": INSTRUCTION + draw(words), "gold": draw(short)}
            for n in range(queries)
        ],
    }


if __name__ == "__main__":
    main()
