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

from tasks.lamp.definitions import ASKS, LampTask, parts
from tasks.lamp.history import Neighbours
from tasks.lamp.options import PromptOptions

Item = Mapping[str, str]
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
    split = (question.partition(task.marker) for question in queries_inputs)
    starts = Counter(start + marker for start, marker, _ in split if marker)
    return starts.most_common(1)[0][0] if starts else task.instruction


def question_text(question: str, task: LampTask) -> str:
    """The item's own text in a query's `input`: what follows the marker, or all of it."""
    _, marker, text = question.partition(task.marker)
    return text if marker else question


def profile_samples(
    profile: Sequence[Item], task: LampTask, options: PromptOptions, instruction: str
) -> list[Sample]:
    """One sample per profile item {id, text, answer}, in order.

    Before the question stand the `history_items` *other* items most similar by BM25; none before a
    bare cue, whose only text is the answer. instruction: from `instruction_of`.
    """
    bare = task.items == "completed"
    asked = [(item["id"], None if bare else item["text"], item["answer"]) for item in profile]
    found: Sequence[Sequence[int]] = [()] * len(profile)
    if options.history_items and not bare:
        as_written = options.history_index == "text"
        questions = None if as_written else [_subject(item["text"], task) for item in profile]
        found = _neighbours(profile, task, options).others(options.history_items, questions)
    return _samples(profile, asked, found, task, options, instruction)


def query_samples(
    profile: Sequence[Item],
    queries: Sequence[Item],
    task: LampTask,
    options: PromptOptions,
    instruction: str,
) -> list[Sample]:
    """One sample per query {id, input, gold}, in order, with history from the whole profile."""
    asked = [(query["id"], question_text(query["input"], task), query["gold"]) for query in queries]
    found: Sequence[Sequence[int]] = [()] * len(queries)
    if options.history_items:
        texts = [text for _, text, _ in asked]
        if options.history_index == "published":
            whole = [query["input"] for query in queries]
            texts = whole if task.lookup.by_input else [_subject(text, task) for text in texts]
            texts = [text.strip() for text in texts]
        neighbours = _neighbours(profile, task, options)
        found = [neighbours.find(text, options.history_items) for text in texts]
    return _samples(profile, asked, found, task, options, instruction)


def _neighbours(profile: Sequence[Item], task: LampTask, options: PromptOptions) -> Neighbours:
    if options.history_index == "text":
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
    profile: Sequence[Item],
    asked: Sequence[tuple[str, str | None, str]],
    found: Sequence[Sequence[int]],
    task: LampTask,
    options: PromptOptions,
    instruction: str,
) -> list[Sample]:
    """asked: (id, text, answer). found: for each, the profile items before it."""
    layout = _compact if options.style == "compact" else _published
    samples = []
    for (sample_id, text, answer), known in zip(asked, found, strict=True):
        prompt = layout(text, [profile[index] for index in known], task, instruction)
        samples.append(Sample(sample_id, prompt, _one_line(answer)))
    return samples


def _compact(text: str | None, history: Sequence[Item], task: LampTask, _instruction: str) -> str:
    bare = task.items == "completed"
    shown = [(None if bare else item["text"], f" {_one_line(item['answer'])}") for item in history]
    return "\n".join(_cue(text, task) + answer for text, answer in [*shown, (text, "")])


def _cue(text: str | None, task: LampTask) -> str:
    """The end of a compact prompt; without a text the bare cue."""
    if text is None:
        return f"{task.cue}:"
    if task.asks:
        text = text.replace(task.asks, "", 1)
    return f"{task.text_field}: {_one_line(text)} {task.cue}:"


def _published(text: str | None, history: Sequence[Item], task: LampTask, instruction: str) -> str:
    if text is None:
        return f"{task.shown_as[1]}:"
    if task.marker_names_text:
        instruction = instruction.removesuffix(task.marker)
    asked = _question(_one_line(text), _one_line(instruction), task)
    shown = "\n".join(_published_item(item, task) for item in history)
    start = f"### User History:\n{shown}\n\n" if history else ""
    return f"{start}### User Instruction:\n{asked}"


def _question(text: str, instruction: str, task: LampTask) -> str:
    name, cue = task.shown_as
    if task.items != "built":
        return f"{instruction}\n{name}: {text} {cue}:"
    if paper := parts(text):
        title, first, second = paper
        asks = f'{instruction} "{title}"{ASKS}'
        return f"{asks}\nReference: [1] - {first} [2] - {second}\nAnswer:"
    return f"{instruction} {text}\nAnswer:"


def _published_item(item: Item, task: LampTask) -> str:
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
