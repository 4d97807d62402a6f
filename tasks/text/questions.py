"""From users' profiles and queries to questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tasks.lamp import history
from tasks.lamp.options import PromptOptions
from tasks.lamp.prompts import LAYOUT, Prompts, Sample
from tasks.results.models import Base, Prepared, Questions, Setting

if TYPE_CHECKING:
    from tasks.config.task import MethodConfig, TaskConfig

# What a user's row in any table is about; item ids are carried along but decide nothing. `about`,
# if there is one, is a text that stands before each of the user's queries.
Item = Mapping[str, str]
User = Mapping[str, Any]


def questions_of(prompt: PromptOptions, users: Prepared, model: str) -> Questions:
    """How items of these users become questions; what decides no text is left out.

    model: `base.model`; the tiny one has no chat template.
    """
    unused: dict[str, Any] = {}
    if model == "tiny":
        unused["chat"] = "auto"
    if not prompt.history_items:
        unused["history_index"] = "text"
    published = prompt.style == "published"
    return Questions(
        task=users.task,
        prompt=prompt.model_copy(update=unused),
        instruction=users.instruction if published else "",
        layout=LAYOUT if published else None,
        retrieval=history.VERSION if prompt.history_items else None,
    )


def shown_prompt(prompt: PromptOptions, users: Prepared, model: str) -> str:
    """How a query's prompt looks, with `<text>` for its text; model: `base.model`."""
    query = {"id": "", "input": f"{users.instruction}<text>", "gold": ""}
    questions = questions_of(prompt, users, model)
    (sample,) = user_queries(questions, {"profile": [], "query": [query]})
    return sample.prompt


def setting_of(task: TaskConfig, method: MethodConfig, users: Prepared, base: Base) -> Setting:
    """What a method's stages that run the model are given."""
    questions = questions_of(method.prompt, users, method.base.model)
    return Setting(base=base, questions=questions, seed=method.seed, compute=task.compute)


def content(profile: Sequence[Item]) -> list[list[str]]:
    """What of a profile decides numbers, for cache keys: (text, answer) in order."""
    return [[item["text"], item["answer"]] for item in profile]


def asked(user: User) -> list[list[str]]:
    """What of a user's queries counts, for cache keys: ids too, as they stand in tables."""
    before = [[user["about"]]] if "about" in user else []
    return before + [[query["id"], query["input"], query["gold"]] for query in user["query"]]


def profile_questions(questions: Questions, profile: Sequence[Item]) -> list[Sample]:
    """Each profile item asked about itself, without itself in the history (docs/method.md)."""
    return _prompts(questions).of_items(profile)


def user_queries(questions: Questions, user: User) -> list[Sample]:
    """The questions a few-shot user is scored on."""
    samples = _prompts(questions).of_queries(user["profile"], user["query"])
    if about := user.get("about"):
        samples = [replace(one, prompt=f"{about}\n{one.prompt}") for one in samples]
    return samples


def _prompts(questions: Questions) -> Prompts:
    return Prompts(questions.task, questions.prompt, questions.instruction)
