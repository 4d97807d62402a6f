"""What each stage costs: a planner that stands in for the stages (tasks/stand_in.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

from tasks.answer import HowAnswered
from tasks.base_model import GivenModel, Lessons
from tasks.compare import Batches
from tasks.config.options import (
    AnchorOptions,
    FusionOptions,
    TaskAdaptOptions,
    TinyModelOptions,
    TrainingOptions,
)
from tasks.embed import WHITENED, Embedding
from tasks.lamp.folders import ROLES
from tasks.lora.answer import on_one_prompt
from tasks.lora.grouped import Shapes
from tasks.method.clusters import members_of
from tasks.methods import METHODS
from tasks.plan import work as cost_of
from tasks.plan.lengths import Lengths, Measure, assumed_clusters
from tasks.plan.model import PlannedModel
from tasks.plan.work import NO_BANK, Below, TaskPlan, Work
from tasks.record import File, Result, key_of
from tasks.results import models
from tasks.results.models import Anchors, Bank, Base, Clusters, Merged, MetaLora, Questions, Setting
from tasks.results.stage import CELL
from tasks.task_adapt import KINDS, chosen_items
from tasks.text.encoder import Encoder
from tasks.text.tokens import by_question

# Bytes of a row in a table, about.
ROW = 100
NOT_LOADED = Base(model="", content="", dtype="float32", max_tokens=0)


class Planner:
    """Stands in for the stages of one LaMP task under one seed, with its curve.

    Each method has the name and the arguments of a stage; it notes what the stage costs, and gives
    a result whose files are names only. `compare` ends a plan, which is then in `plans`.
    """

    def __init__(self, model: PlannedModel) -> None:
        self.plans: list[TaskPlan] = []
        self._model, self._measure = model, Measure(model)
        self._works: list[Work] = []
        # How the LoRA in a file is trained; the users' tables that are embedded, and how.
        self._trained: dict[File, TrainingOptions] = {}
        self._embedded: set[str] = set()
        # The work behind recipes, which is the first method's that asks for it.
        self._behind: dict[File, list[Work]] = {}
        self._start = self._candidates = 0

    def __call__(self, name: str) -> Callable[..., Any] | None:
        if name == "prepare":
            return None
        if name in ("log", "coverage_lines"):
            return lambda *_, **__: ()  # there is no result to look at
        return getattr(self, name, None) or partial(self._unknown, name)

    def _unknown(self, name: str, **_: object) -> Result:
        """A stage of a method's own (`Method.fit`)."""
        self._add(name, Work(note="its work is not known and not counted"))
        return Result()

    def given(self, model: str) -> GivenModel:
        return GivenModel(model=model, content="", revision=None)

    def encoder_of(self, model: str) -> Encoder:
        return Encoder(model=model, content="", libraries={})

    def given_model(self, given: GivenModel, **_: object) -> Base:
        self._add("base model", Work(users=1, memory=self._model.weights))
        return NOT_LOADED

    def tiny_model(
        self, tiny: TinyModelOptions, lessons: Lessons, users: File, **_: object
    ) -> Base:
        samples = self._measure.tokens("profile", lessons.questions, users)
        work = cost_of.pretrain(self._model, samples, tiny.steps, tiny.batch_size)
        self._add("base model", work, disk=4 * self._model.shape.parameters)
        return NOT_LOADED

    def task_adapt(
        self, options: TaskAdaptOptions, questions: Questions, users: File, base: Base, seed: int,
        **_: object,
    ) -> Base:  # fmt: skip
        kinds = KINDS[options.train_on]
        found = chain(*(self._measure.tokens(kind, questions, users) for kind in kinds))
        samples = [*chain(*found)]
        chosen = [samples[place] for place in chosen_items(options, len(samples), seed)]
        work = cost_of.train(self._model, options, [chosen])
        work.users = len(self._measure.users(users))
        self._add("task adaptation", work, disk=self._adapter_bytes(options))
        return base

    def embed(
        self, method: Embedding, population: Mapping[str, File], **_: object
    ) -> models.Embedded:
        """Users who are embedded already, for another method or point, cost nothing."""
        model, measure, options = self._model, self._measure, method.options
        self._start = len(self._works)
        keys = {table: key_of(method, table) for table in population.values()}
        new = [table for table, key in keys.items() if key not in self._embedded]
        self._embedded |= {*keys.values()}
        counts = {table: len(measure.users(table)) for table in keys}
        self._candidates = counts[population["anchor"]]
        whitening = 0
        if questions := method.questions:
            at_input = options.embedding == "input_signature"
            sizes = (options.signature_vocabulary, options.signature_hidden)
            width = min(sizes[0], model.shape.head[1]) * min(sizes[1], model.shape.head[0])
            lengths = [own for table in new for own in measure.tokens("profile", questions, table)]
            work = cost_of.sign(model, lengths, sizes, at_input)
            first = next(table for table, count in counts.items() if count)
            if at_input and first in new:
                # Whitening asks the first users again.
                taught = measure.tokens("profile", questions, first)[:WHITENED]
                work += cost_of.sign(model, taught, sizes, at_input)
            whitening = 4 * width**2 * (at_input and first in new)
        elif method.encoder:
            note = f"the work of {method.encoder.model} is small and not counted"
            width, work = 0, Work(note=note)
        else:
            users = [user for table in new for user in measure.users(table).values()]
            width, work = model.shape.hidden, cost_of.states(model, method.task, users)
        work.users = sum(counts[table] for table in new)
        disk = whitening + sum(counts.values()) * (4 * width + ROW)
        return models.Embedded(
            table=self._add("embedding", work, disk=disk), centred=False,
            users=counts[population["few_shot"]], dimensions=width,
        )  # fmt: skip

    def clusters(self, options: AnchorOptions, embedded: models.Embedded, seed: int) -> Clusters:
        labels, count = assumed_clusters(options, self._candidates, seed)
        if options.refits and options.train_on != "user":
            self._add("refit", Work(note=f"{options.refits} rounds of {count} clusters, the most"))
        return Clusters(clusters=tuple(labels))

    def refit(
        self, before: Clusters, training: TrainingOptions, candidates: File, number: int,
        setting: Setting, **_: object,
    ) -> Clusters:  # fmt: skip
        """Clusters' LoRAs are trained on every second item, and each is asked for all the others.

        Everybody moves, so that there are all rounds.
        """
        model, samples = self._model, self._measure.tokens("profile", setting.questions, candidates)
        labels, count = before.clusters, len(set(before.clusters))
        shown: list[Lengths] = [[] for _ in range(count)]
        for label, own in zip(labels, samples, strict=True):
            shown[label] += own[0::2]
        work = cost_of.train(model, training, shown)
        alone = Below(model.lora(training), anchors=1, each=1)
        held_out = [*chain(*(own[1::2] for own in samples))]
        work += cost_of.likelihoods(model, [held_out], alone, times=count)
        # All rounds are of the same users.
        first = number == 0
        work.users, work.items = first * len(samples), first * sum(map(len, samples))
        self._add("refit", work, disk=4 * count * model.lora(training).width)
        return Clusters(clusters=labels, moved=len(labels))

    def anchors(
        self, options: AnchorOptions, candidates: File, clusters: Clusters, **_: object
    ) -> Anchors:
        """Those that the run would choose of clusters that are dealt at random."""
        items = {name: len(u["profile"]) for name, u in self._measure.users(candidates).items()}
        labels = [*clusters.clusters]
        members = members_of([*items], [*items.values()], labels, options)
        count = len(set(labels))
        note = f"{len(members)} of candidates at random in {count} clusters (assumed)"
        found = tuple(
            models.Anchor(name=name, members=own, items=sum(map(items.__getitem__, own)), cluster=0)
            for name, own in members.items()
        )
        return Anchors(
            table=self._add("anchors", Work(note=note)), anchors=found, whole_clusters=0,
            asked=options.count, candidates=0, eligible=0, clusters=0, noise=0,
        )  # fmt: skip

    def meta_lora(
        self, options: TrainingOptions, anchors: Sequence[models.Anchor], candidates: File,
        setting: Setting, **_: object,
    ) -> models.MetaLoras:  # fmt: skip
        tokens, questions = self._measure.tokens, setting.questions
        found = (tokens("profile", questions, candidates, anchor.members) for anchor in anchors)
        work = cost_of.train(self._model, options, [[*chain(*own)] for own in found])
        disk = len(anchors) * self._adapter_bytes(options) + 22 * work.steps
        file = self._add("meta-LoRAs", work, disk=disk)
        self._trained[file] = options
        loras = (
            MetaLora(anchor=one.name, members=one.members, adapter=file, training=models.Training())
            for one in anchors
        )
        return models.MetaLoras(loras=tuple(loras))

    def bank(self, loras: tuple[MetaLora, ...], **_: object) -> Bank:
        options = self._trained[loras[0].adapter]
        disk = 4 * len(loras) * self._model.lora(options).width
        file = self._add("meta-LoRAs", Work(), disk=disk)
        return Bank(file=file, members=loras)

    def evidence(
        self, shortlist: int | None, embedded: models.Embedded, bank: Bank, users: File,
        setting: Setting,
    ) -> models.Evidence:  # fmt: skip
        anchors, count = len(bank.members), embedded.users
        samples = [*chain(*self._measure.tokens("profile", setting.questions, users))]
        # One anchor's LoRA at a time, as it is.
        alone = Below(self._shapes(bank), anchors=1, each=1)
        times = min(shortlist or anchors, anchors)
        work = cost_of.likelihoods(self._model, [samples], alone, times=times)
        work.users = count
        return models.Evidence(table=self._add("evidence", work, disk=count * (ROW + 8 * anchors)))

    def fusion(
        self, options: FusionOptions, embedded: models.Embedded, bank: Bank, **_: object
    ) -> models.Recipes:
        each, users = min(options.top_m, len(bank.members)), embedded.users
        file = self._add("fusion", Work(users=users), disk=users * (ROW + each * 40))
        self._behind[file] = self._works[self._start :]
        return models.Recipes(
            table=file, users=users, anchors_per_user=each, without_similar_anchor=0
        )

    def answers(
        self, how: HowAnswered, users: File, user_ids: tuple[str, ...], merged: Merged | None,
        setting: Setting, **_: object,
    ) -> models.Answers:  # fmt: skip
        model, tokens, below = self._model, self._measure.tokens, NO_BANK
        questions, training = setting.questions, how.training
        if merged:
            for work in self._behind.pop(merged.recipes.table, ()):
                work.method = how.method
            each, anchors = merged.recipes.anchors_per_user, len(merged.bank.members)
            below = Below(self._shapes(merged.bank), anchors, each, merged.how)
        if training:
            samples = tokens("profile", questions, users, user_ids)
            work = cost_of.train(model, training, samples, below)
            own = 4 * model.lora(training).width
            self._add("training", work, how.method, disk=len(user_ids) * (own + 2 * ROW))
        if METHODS[how.method].answer:
            work = Work(users=len(user_ids))
        elif how.answer != "generate" and (many := len(questions.task.labels)):
            samples = [
                [*map(on_one_prompt, by_question(mine, many))]
                for mine in tokens("choices", questions, users, user_ids)
            ]
            work = cost_of.likelihoods(model, samples, below, training)
        else:
            samples = tokens("queries", questions, users, user_ids)
            work = cost_of.answer(model, samples, questions.task.max_new_tokens, below, training)
        by_id = self._measure.users(users)
        queries = [query for user_id in user_ids for query in by_id[user_id]["query"]]
        # Predictions twice as tables, and in LaMP's own format; what each user took.
        disk = len(user_ids) * ROW + sum(ROW + 3 * len(query["gold"]) for query in queries)
        file = self._add("scoring", work, how.method, disk)
        return models.Answers(users=user_ids, predictions=file, work=file)

    def compare(self, users: models.Prepared, answered: Batches, **_: object) -> models.Compared:
        """A plan is made of all work since the last one."""
        measure = self._measure
        counts = {role: len(measure.users(users.side(role))) for role in ROLES}
        self._add("tokens kept", Work(users=sum(counts.values())), disk=measure.kept)
        self.plans.append(TaskPlan(CELL.get(), counts, self._works, measure.notes))
        self._works, measure.measured, measure.notes = [], {}, []
        names = tuple(answered)
        return models.Compared(groups=0, queries=0, methods=names, intervals={}, differences={})

    def _add(self, stage: str, work: Work, method: str = "", disk: int = 0) -> File:
        """Note the work; the name of a file that nobody writes."""
        work.stage, work.method, work.disk = stage, method, disk
        self._works.append(work)
        return File(uri=f"plan/{len(self.plans)}/{len(self._works)}", sha256="")

    def _shapes(self, bank: Bank) -> Shapes:
        return self._model.lora(self._trained[bank.members[0].adapter])

    def _adapter_bytes(self, options: TrainingOptions) -> int:
        """A PEFT folder and its record: weights, and their names."""
        shapes = self._model.lora(options)
        return 4 * shapes.width + sum(3 * len(name) + 220 for name in shapes.sizes) + 2000
