"""Prompts: every profile item and every query becomes one question with one answer.

A profile item is asked about itself, leave-one-out: the other items are its history. A query has
the whole profile as history. Both read alike, so what is trained is what is asked later.
Source: METHOD, Prompts (the published layout: history, instruction, cue; wording our own).

compact    description: <text> tag:      (an instruction within the text, as LaMP-1's, is left out)
published  ### User History: <text and answer of similar items>
           ### User Instruction: <instruction and text>
           ### Answer:
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tasks.lamp.definitions import LampTask
from tasks.lamp.history import Neighbours

Style = Literal["compact", "published"]


@dataclass(frozen=True)
class Sample:
    """One question. id: of the profile item or query. answer: stripped, nothing before it."""

    id: str
    prompt: str
    answer: str


def instruction_of(queries_inputs: Iterable[str], task: LampTask) -> str:
    """The data's own instruction: the commonest start of a query, up to and with the marker.

    Ties go to the one seen first. Without any query that carries the marker: `task.instruction`.
    """
    starts: Counter[str] = Counter()
    for question in queries_inputs:
        start, marker, _ = question.partition(task.marker)
        if marker:
            starts[start + marker] += 1
    return starts.most_common(1)[0][0] if starts else task.instruction


def question_text(question: str, task: LampTask) -> str:
    """The item's own text in a query's `input`: what follows the marker, else all of it."""
    _, marker, text = question.partition(task.marker)
    return text if marker else question


def profile_samples(
    profile: Sequence[Mapping[str, str]],
    task: LampTask,
    style: Style,
    history_items: int,
    instruction: str,
) -> list[Sample]:
    """One sample per profile item {id, text, answer}, in order.

    history_items: how many of the *other* items, most similar by BM25, stand before the question.
    instruction: as from `instruction_of`; only the published style shows it.
    """
    asked = [(item["id"], item["text"], item["answer"]) for item in profile]
    found = _neighbours(profile).others(history_items) if history_items else None
    return _samples(profile, asked, found, task, style, instruction)


def query_samples(
    profile: Sequence[Mapping[str, str]],
    queries: Sequence[Mapping[str, str]],
    task: LampTask,
    style: Style,
    history_items: int,
    instruction: str,
) -> list[Sample]:
    """One sample per query {id, input, gold}, in order, with history from the whole profile."""
    asked = [(query["id"], question_text(query["input"], task), query["gold"]) for query in queries]
    found = None
    if history_items:
        neighbours = _neighbours(profile)
        found = [neighbours.find(text, history_items) for _, text, _ in asked]
    return _samples(profile, asked, found, task, style, instruction)


def _neighbours(profile: Sequence[Mapping[str, str]]) -> Neighbours:
    return Neighbours([item["text"] for item in profile])


def _samples(
    profile: Sequence[Mapping[str, str]],
    asked: Sequence[tuple[str, str, str]],
    found: Sequence[Sequence[int]] | None,
    task: LampTask,
    style: Style,
    instruction: str,
) -> list[Sample]:
    """asked: (id, text, answer). found: for each the profile items that stand before it."""
    samples = []
    for number, (sample_id, text, answer) in enumerate(asked):
        history = [_shown(profile[index], task) for index in found[number]] if found else []
        if style == "compact":
            prompt = "\n".join([*history, _cue(text, task)])
        else:
            sections = [f"### User History:\n{chr(10).join(history)}"] if history else []
            sections.append(f"### User Instruction:\n{instruction.strip()} {_one_line(text)}")
            sections.append("### Answer:")
            prompt = "\n\n".join(sections)
        samples.append(Sample(sample_id, prompt, _one_line(answer)))
    return samples


def _shown(item: Mapping[str, str], task: LampTask) -> str:
    return f"{_cue(item['text'], task)} {_one_line(item['answer'])}"


def _cue(text: str, task: LampTask) -> str:
    if task.asks:
        text = text.replace(task.asks, "", 1)
    return f"{task.text_field}: {_one_line(text)} {task.answer_field}:"


def _one_line(text: str) -> str:
    """White space normalised: line breaks separate the parts of a prompt, nothing else."""
    return " ".join(text.split())
