"""Prompts: every profile item and every query becomes one question with one answer.

A profile item is asked with the other items as its history, a query with the whole profile. Both
read alike; where an item is no question, `LampTask.items` says what it becomes. Source:
docs/method.md, Prompts. The published layout is that of the MTA code: history, instruction, text,
and the cue that the answer follows. The instruction is in the data's own words.

compact    description: <text> tag:      (an instruction within the text, as LaMP-1's, is left out)
published  ### User History:
           Description: <text of a similar item> Tag: <its answer>

           ### User Instruction:
           <instruction>
           Description: <text> Tag:
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tasks.lamp.citations import ASKS, parts
from tasks.lamp.definitions import LampTask
from tasks.lamp.history import Neighbours

Style = Literal["compact", "published"]
# Where history is looked up: in items' texts, or in what the published code indexes.
Index = Literal["text", "published"]
# Part of the cache keys of the published layout; raise it when its text changes.
LAYOUT = 2


@dataclass(frozen=True)
class Sample:
    """One question. id: of the profile item or query."""

    id: str
    prompt: str
    answer: str


def instruction_of(queries_inputs: Iterable[str], task: LampTask) -> str:
    """The commonest start of a query, up to and with the marker, the earliest of a tie.

    Where no query has the marker: `task.instruction`.
    """
    starts: Counter[str] = Counter()
    for question in queries_inputs:
        start, marker, _ = question.partition(task.marker)
        if marker:
            starts[start + marker] += 1
    return starts.most_common(1)[0][0] if starts else task.instruction


def question_text(question: str, task: LampTask) -> str:
    """The item's own text in a query's `input`: what follows the marker, or all of it."""
    _, marker, text = question.partition(task.marker)
    return text if marker else question


def profile_samples(
    profile: Sequence[Mapping[str, str]],
    task: LampTask,
    style: Style,
    history_items: int,
    instruction: str,
    index: Index = "text",
) -> list[Sample]:
    """One sample per profile item {id, text, answer}, in order.

    history_items: how many of the *other* items, the most similar by BM25, stand before the
        question; none before a bare cue, whose only text is the answer.
    instruction: from `instruction_of`; only the published style shows it.
    index: `published` looks items up as `LampTask.lookup` says.
    """
    asked = [
        (item["id"], None if task.items == "completed" else item["text"], item["answer"])
        for item in profile
    ]
    found = None
    if history_items:
        questions = None if index == "text" else [_subject(item["text"], task) for item in profile]
        found = _neighbours(profile, task, index).others(history_items, questions)
    return _samples(profile, asked, found, task, style, instruction)


def query_samples(
    profile: Sequence[Mapping[str, str]],
    queries: Sequence[Mapping[str, str]],
    task: LampTask,
    style: Style,
    history_items: int,
    instruction: str,
    index: Index = "text",
) -> list[Sample]:
    """One sample per query {id, input, gold}, in order, with history from the whole profile."""
    asked = [(query["id"], question_text(query["input"], task), query["gold"]) for query in queries]
    found = None
    if history_items:
        neighbours = _neighbours(profile, task, index)
        texts = [text for _, text, _ in asked]
        if index == "published":
            whole = [query["input"] for query in queries]
            texts = whole if task.lookup.by_input else [_subject(text, task) for text in texts]
            texts = [text.strip() for text in texts]
        found = [neighbours.find(text, history_items) for text in texts]
    return _samples(profile, asked, found, task, style, instruction)


def _neighbours(profile: Sequence[Mapping[str, str]], task: LampTask, index: Index) -> Neighbours:
    if index == "text":
        return Neighbours([item["text"] for item in profile])
    how = task.lookup
    texts = [_subject(item["text"], task) for item in profile]
    if how.with_answer:
        # Stripped, as blanks at the ends would be words.
        both = zip(profile, texts, strict=True)
        texts = [f"{item['answer']} {text}".strip() for item, text in both]
    return Neighbours(texts, lambda text: text.split(how.separator))


def _subject(text: str, task: LampTask) -> str:
    """The title in a question built of a paper; any other text as it is."""
    paper = parts(text) if task.items == "built" else None
    return paper[0] if paper else text


def _samples(
    profile: Sequence[Mapping[str, str]],
    asked: Sequence[tuple[str, str | None, str]],
    found: Sequence[Sequence[int]] | None,
    task: LampTask,
    style: Style,
    instruction: str,
) -> list[Sample]:
    """asked: (id, text, answer). found: for each, the profile items before it."""
    samples = []
    for number, (sample_id, text, answer) in enumerate(asked):
        known = found[number] if found and text is not None else []
        history = [profile[index] for index in known]
        if style == "compact":
            prompt = "\n".join([*(_compact_item(item, task) for item in history), _cue(text, task)])
        else:
            prompt = _published(text, history, task, instruction)
        samples.append(Sample(sample_id, prompt, _one_line(answer)))
    return samples


def _compact_item(item: Mapping[str, str], task: LampTask) -> str:
    text = None if task.items == "completed" else item["text"]
    return f"{_cue(text, task)} {_one_line(item['answer'])}"


def _cue(text: str | None, task: LampTask) -> str:
    """The end of a compact prompt; without a text the bare cue."""
    if text is None:
        return f"{task.cue}:"
    if task.asks:
        text = text.replace(task.asks, "", 1)
    return f"{task.text_field}: {_one_line(text)} {task.cue}:"


def _published(
    text: str | None, history: Sequence[Mapping[str, str]], task: LampTask, instruction: str
) -> str:
    if text is None:
        return f"{task.shown_as[1]}:"
    sections = []
    if history:
        lines = [_published_item(item, task) for item in history]
        sections.append("### User History:\n" + "\n".join(lines))
    if task.marker_names_text:
        instruction = instruction.removesuffix(task.marker)
    asked = _question(_one_line(text), _one_line(instruction), task)
    sections.append(f"### User Instruction:\n{asked}")
    return "\n\n".join(sections)


def _question(text: str, instruction: str, task: LampTask) -> str:
    name, cue = task.shown_as
    if task.items != "built":
        return f"{instruction}\n{name}: {text} {cue}:"
    if paper := parts(text):
        title, first, second = paper
        asks = f'{instruction} "{title}"{ASKS}'
        return f"{asks}\nReference: [1] - {first} [2] - {second}\nAnswer:"
    return f"{instruction} {text}\nAnswer:"


def _published_item(item: Mapping[str, str], task: LampTask) -> str:
    (name, cue), text, answer = task.shown_as, _one_line(item["text"]), _one_line(item["answer"])
    if task.items == "completed":
        return f"{cue}: {answer}"
    if task.items == "built" and (paper := parts(text)):
        title, *references = paper
        text, answer = title, references[task.labels.index(answer)]
    return f"{name}: {text} {cue}: {answer}"


def _one_line(text: str) -> str:
    """White space normalised, as line breaks separate the parts of a prompt."""
    return " ".join(text.split())
