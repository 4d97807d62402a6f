"""The LaMP tasks, one definition each: all that tells one task from another.

Source: LaMP, arXiv 2304.11406, table 1 and appendix A; the wordings are those of its data. LaMP-2
exists twice: movie tagging (2M, the newer) and news categorisation (2N, the first). LaMP-6 is
subjects of e-mails of a licensed corpus, which nobody ships.
"""

import re
from dataclasses import dataclass
from typing import Literal

from tasks.errors import InputError

# LaMP-1's question, in the wording of LaMP's data: which of two references belongs to a paper?
ASKS = ", which reference is related? Just answer with [1] or [2] without explanation."
LABELS = ("[1]", "[2]")
_QUESTION = re.compile(f'^"(.*)"{re.escape(ASKS)} \\[1\\]: "(.*)" \\[2\\]: "(.*)"$', re.DOTALL)
MOVIE_TAGS = (
    "sci-fi", "based on a book", "comedy", "action", "twist ending", "dystopia", "dark comedy",
    "classic", "psychology", "fantasy", "romance", "thought-provoking", "social commentary",
    "violence", "true story",
)  # fmt: skip
NEWS_CATEGORIES = (
    "women", "religion", "politics", "style & beauty", "entertainment", "culture & arts", "sports",
    "science & technology", "travel", "business", "crime", "education", "healthy living", "parents",
    "food & drink",
)  # fmt: skip


@dataclass(frozen=True)
class Lookup:
    """How the MTA code finds an item of the history: by BM25 over words as written.

    with_answer: items are indexed with their answers. by_input: a query asks with its whole
    `input`. separator: between words; None: any white space.
    """

    with_answer: bool = False
    by_input: bool = False
    separator: str | None = " "


@dataclass(frozen=True)
class LampTask:
    """One task of the benchmark.

    text_field, answer_field: the keys of a profile item, and their names in compact prompts.
    shown_as: the names of text and answer in published prompts ("Review: ... Score:").
    marker: the end of the instruction in a query's `input`; the item's own text follows it.
    marker_names_text: the marker only names the text ("... review: "), so a prompt that names it
        itself leaves it out. Otherwise it ends a sentence ("... the following article: ").
    instruction: our own wording, for data whose queries lack the marker; ends with the marker.
    labels: every possible answer, in the order the queries list them; empty for free text.
    kind: decides the metrics (tasks/lamp/metrics.py).
    items: how a profile item becomes a question. `asked`: like a query, with its own answer.
        `built`: a question is built of it (tasks/lamp/citations.py). `completed`: the prompt is the
        bare cue and the answer the item's text, as OPPU and Per-Pcs train on tweets. (The MTA code
        gives the tweet as both question and answer, which teaches copying.)
    asks: the instruction within an item's text, where there is one. Compact prompts leave it out;
        what stands before it is what the item is about (`subject`).
    lookup: how published prompts look history up. The MTA code lacks LaMP-2N, 6 and 7; for those
        as OPPU's indexes: with the answer, for tweets without.
    """

    name: str
    text_field: str
    answer_field: str
    shown_as: tuple[str, str]
    marker: str
    instruction: str
    kind: Literal["classification", "rating", "text"] = "text"
    max_new_tokens: int = 32
    labels: tuple[str, ...] = ()
    marker_names_text: bool = False
    items: Literal["asked", "built", "completed"] = "asked"
    asks: str = ""
    lookup: Lookup = Lookup()

    @property
    def cue(self) -> str:
        """The name of the answer in compact prompts."""
        return self.shown_as[1].lower() if self.items == "completed" else self.answer_field

    def subject(self, text: str) -> str:
        """What an item's text is about. Items with the same subject and answer are the same."""
        return text.partition(self.asks)[0] if self.asks else text

    def whole(self, text: str, answer: str) -> str:
        """Text and answer, without repeating a text that is its own answer."""
        return text if self.items == "completed" else f"{text} {answer}"


TASKS: dict[str, LampTask] = {
    task.name: task
    for task in (
        LampTask(
            name="LaMP-1",
            # After reading: the question that tasks/lamp/citations.py builds, and its label.
            text_field="title",
            answer_field="citation",
            shown_as=("Paper Title", "Citation"),
            marker=" with the title ",
            instruction="Choose the reference that its author cites in the paper with the title ",
            labels=LABELS,
            kind="classification",
            max_new_tokens=8,
            # The two references follow; they are no part of the paper, one is a negative.
            asks=ASKS,
            items="built",
        ),
        LampTask(
            name="LaMP-2M",
            text_field="description",
            answer_field="tag",
            shown_as=("Description", "Tag"),
            marker=" description: ",
            instruction=(
                "Choose the one tag that fits this movie best. Answer with the tag alone. "
                f"tags: [{', '.join(MOVIE_TAGS)}] description: "
            ),
            marker_names_text=True,
            labels=MOVIE_TAGS,
            kind="classification",
            max_new_tokens=8,
            lookup=Lookup(with_answer=True, by_input=True, separator=None),
        ),
        LampTask(
            name="LaMP-2N",
            text_field="text",
            answer_field="category",
            shown_as=("Article", "Category"),
            marker=" article: ",
            instruction=(
                "Choose the one category that fits this article best. Answer with the category "
                f"alone. categories: [{', '.join(NEWS_CATEGORIES)}] article: "
            ),
            marker_names_text=True,
            labels=NEWS_CATEGORIES,
            kind="classification",
            max_new_tokens=8,
            lookup=Lookup(with_answer=True),
        ),
        LampTask(
            name="LaMP-3",
            text_field="text",
            answer_field="score",
            shown_as=("Review", "Score"),
            marker=" review: ",
            instruction="Rate this review from 1 to 5. Answer with the number alone. review: ",
            labels=("1", "2", "3", "4", "5"),
            kind="rating",
            max_new_tokens=4,
            marker_names_text=True,
            lookup=Lookup(by_input=True),
        ),
        LampTask(
            name="LaMP-4",
            text_field="text",
            answer_field="title",
            shown_as=("Article", "Headline"),
            marker=" article: ",
            instruction="Write the headline of this news article: ",
            lookup=Lookup(with_answer=True),
        ),
        LampTask(
            name="LaMP-5",
            text_field="abstract",
            answer_field="title",
            shown_as=("Abstract", "Title"),
            marker=" paper: ",
            instruction="Write the title of this scholarly paper: ",
            max_new_tokens=48,
        ),
        LampTask(
            name="LaMP-6",
            text_field="text",
            answer_field="title",
            shown_as=("Email", "Subject"),
            marker=" email: ",
            instruction="Write the subject of this email: ",
            lookup=Lookup(with_answer=True),
        ),
        LampTask(
            name="LaMP-7",
            # A tweet is its own answer; a query's text is a paraphrase of one that is not here.
            text_field="text",
            answer_field="text",
            shown_as=("Text", "Tweet"),
            marker=" before or after it: ",
            instruction="Write this as a tweet, with nothing before or after it: ",
            max_new_tokens=64,
            items="completed",
        ),
    )
}


def question(title: str, first: str, second: str) -> str:
    """LaMP-1's question as it stands in a query, after "... the paper with the title "."""
    return f'"{title}"{ASKS} [1]: "{first}" [2]: "{second}"'


def parts(text: str) -> tuple[str, str, str] | None:
    """Title, first and second reference of a `question`; None for any other text."""
    match = _QUESTION.match(text)
    return None if match is None else (match[1], match[2], match[3])


def get_task(name: str) -> LampTask:
    """Return the task called `name`; raise InputError for another name."""
    if name not in TASKS:
        raise InputError(f"LaMP task {name!r} is not known: use one of {', '.join(TASKS)}")
    return TASKS[name]
