"""Every task's prompts against those written by hand (tests/data/prompts/README.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.lamp.definitions import TASKS, LampTask, get_task
from tasks.lamp.formats import read_users
from tasks.lamp.prompts import Prompts, Sample, instruction_of
from tasks.lora.base import Base, end_of_turn
from tasks.lora.batches import encode
from tests import llama3
from tests.unit.lamp.helpers import how

FOLDER = Path(__file__).resolve().parents[2] / "data" / "prompts"


def golden(name: str) -> dict[str, tuple[str, str]]:
    """What stands between "== " and " ->" -> (text, answer)."""
    blocks = {}
    for block in (FOLDER / f"{name}.txt").read_text(encoding="utf-8")[3:].split("\n== "):
        head, _, text = block.partition("\n")
        what, answer = head.split(" -> ")
        blocks[what] = (text, answer)
    return blocks


def samples(task: LampTask, style: Any) -> dict[str, Sample]:
    (user,) = read_users(FOLDER / f"{task.name}.json", task).users.to_dicts()
    inputs = [query["input"] for query in user["query"]]
    instruction = instruction_of(inputs, task)
    given: Any = (task, how(style, 1), instruction)
    items = Prompts(*given).of_items(user["profile"])
    (query,) = Prompts(*given).of_queries(user["profile"], user["query"])
    return {"item 1": items[0], "item 2": items[1], "query": query}


@pytest.mark.parametrize("name", TASKS)
def test_as_written_by_hand(name: str) -> None:
    wanted = golden(name)
    found = {
        f"{style}, {what}": (sample.prompt, sample.answer)
        for style in ("compact", "published")
        for what, sample in samples(get_task(name), style).items()
    }
    chat = wanted.pop("chat, query")
    assert found == wanted
    tokenizer = llama3.tokenizer_of([text for text, _ in wanted.values()])
    base = Base(None, tokenizer, torch.device("cpu"), 10_000, end_of_turn(tokenizer))
    query = samples(get_task(name), "published")["query"]
    encoded = encode(base, query.prompt, query.answer)
    assert (tokenizer.decode(encoded.prompt), query.answer) == chat
    # Only the answer is a label, and the end of the assistant's turn.
    assert tokenizer.decode(encoded.answer) == query.answer + llama3.END_OF_TURN
    assert encoded.prompt.count(tokenizer.bos_token_id) == 1


def test_there_is_a_file_for_every_task() -> None:
    assert {file.stem for file in FOLDER.glob("*.json")} == set(TASKS)
