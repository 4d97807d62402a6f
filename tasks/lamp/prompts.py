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


@dataclass(frozen=True)
class Prompts:
    """How a task's items and queries are asked. instruction: from `instruction_of`."""

    task: LampTask
    options: PromptOptions
    instruction: str

    def of_items(self, profile: Sequence[Item]) -> list[Sample]:
        """One sample per profile item {id, text, answer}, in order.

        Before the question stand the `history_items` *other* items most similar by BM25; none
        before a bare cue, whose only text is the answer.
        """
        bare = self.task.items == "completed"
        similar: Sequence[Sequence[int]] = [()] * len(profile)
        if self.options.history_items and not bare:
            as_written = self.options.history_index == "text"
            questions = None if as_written else [self._subject(item["text"]) for item in profile]
            similar = self._neighbours(profile).others(self.options.history_items, questions)
        samples = []
        for item, places in zip(profile, similar, strict=True):
            text, history = None if bare else item["text"], [profile[place] for place in places]
            samples.append(self._sample(item["id"], text, item["answer"], history))
        return samples

    def of_queries(self, profile: Sequence[Item], queries: Sequence[Item]) -> list[Sample]:
        """One sample per query {id, input, gold}, in order, with history from the whole profile."""
        texts = [question_text(query["input"], self.task) for query in queries]
        similar: Sequence[Sequence[int]] = [()] * len(queries)
        if self.options.history_items:
            sought = texts
            if self.options.history_index == "published":
                whole = [query["input"] for query in queries]
                by_input = self.task.lookup.by_input
                sought = whole if by_input else [self._subject(text) for text in texts]
                sought = [text.strip() for text in sought]
            neighbours = self._neighbours(profile)
            similar = [neighbours.find(text, self.options.history_items) for text in sought]
        return [
            self._sample(query["id"], text, query["gold"], [profile[place] for place in places])
            for query, text, places in zip(queries, texts, similar, strict=True)
        ]

    def _neighbours(self, profile: Sequence[Item]) -> Neighbours:
        if self.options.history_index == "text":
            return Neighbours([item["text"] for item in profile])
        how = self.task.lookup
        texts = [self._subject(item["text"]) for item in profile]
        if how.with_answer:
            # Stripped, as blanks at the ends would be words.
            both = zip(profile, texts, strict=True)
            texts = [f"{item['answer']} {text}".strip() for item, text in both]
        return Neighbours(texts, lambda text: text.split(how.separator))

    def _subject(self, text: str) -> str:
        """The title in a question built of a paper; any other text as it is."""
        paper = parts(text) if self.task.items == "built" else None
        return paper[0] if paper else text

    def _sample(self, name: str, text: str | None, answer: str, history: list[Item]) -> Sample:
        """text: None for a bare cue."""
        layout = self._compact if self.options.style == "compact" else self._published
        return Sample(name, layout(text, history), _one_line(answer))

    def _compact(self, text: str | None, history: Sequence[Item]) -> str:
        bare = self.task.items == "completed"
        shown = [(None if bare else one["text"], f" {_one_line(one['answer'])}") for one in history]
        return "\n".join(self._cue(text) + answer for text, answer in [*shown, (text, "")])

    def _cue(self, text: str | None) -> str:
        task = self.task
        if text is None:
            return f"{task.cue}:"
        if task.asks:
            text = text.replace(task.asks, "", 1)
        return f"{task.text_field}: {_one_line(text)} {task.cue}:"

    def _published(self, text: str | None, history: Sequence[Item]) -> str:
        name, cue = self.task.shown_as
        if text is None:
            return f"{cue}:"
        text, instruction = _one_line(text), self.instruction
        if self.task.marker_names_text:
            instruction = instruction.removesuffix(self.task.marker)
        instruction = _one_line(instruction)
        asked = f"{instruction}\n{name}: {text} {cue}:"
        if self.task.items == "built":
            asked = f"{instruction} {text}\nAnswer:"
            if paper := parts(text):
                title, first, second = paper
                references = f"Reference: [1] - {first} [2] - {second}"
                asked = f'{instruction} "{title}"{ASKS}\n{references}\nAnswer:'
        shown = "\n".join(self._published_item(item) for item in history)
        start = f"### User History:\n{shown}\n\n" if history else ""
        return f"{start}### User Instruction:\n{asked}"

    def _published_item(self, item: Item) -> str:
        name, cue = self.task.shown_as
        text, answer = _one_line(item["text"]), _one_line(item["answer"])
        if self.task.items == "completed":
            return f"{cue}: {answer}"
        if self.task.items == "built" and (paper := parts(text)):
            text, *references = paper
            answer = references[self.task.labels.index(answer)]
        return f"{name}: {text} {cue}: {answer}"


def _one_line(text: str) -> str:
    """White space normalised, as line breaks separate the parts of a prompt."""
    return " ".join(text.split())
