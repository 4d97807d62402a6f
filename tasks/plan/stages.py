"""What each stage costs: a planner that stands in for the stages (tasks/stand_in.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

from tasks.answer import HowAnswered, MethodRef
from tasks.base_model import GivenModel, Lessons
from tasks.compare import Answered
from tasks.config.options import (
    AnchorOptions,
    FusionOptions,
    TaskAdaptOptions,
    TinyModelOptions,
    TrainingOptions,
)
from tasks.config.task import derive_seed
from tasks.embed import CHUNK, WHITENED, Embedding, Population
from tasks.fusion import Asked
from tasks.method.clusters import members_of
from tasks.plan.lengths import Lengths, Measure, assumed_clusters
from tasks.plan.model import PlannedModel, encoder_shape
from tasks.plan.text import TaskPlan
from tasks.plan.work import NOTHING, Below, Work, answer, likelihoods, pretrain, sign, states, train
from tasks.prepare import ROLES
from tasks.record import File, Record, Result, files_of, key_of
from tasks.results import models
from tasks.results.models import Anchors, Bank, Base, Clusters, Merged, MetaLora, Questions
from tasks.results.stage import CELL
from tasks.task_adapt import KINDS, chosen_items
from tasks.text.encoder import Encoder
from tasks.text.tokens import Kind

# Bytes of a table's own headers and of what stands beside it, about; and of a row.
TABLE, ROW = 1500, 100
UNTRAINED = models.Training(items=0, steps=0, tokens=0, truncated=0, losses=())
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
        # The work behind each file, and how the LoRA in it is trained.
        self._behind: dict[File, list[Work]] = {}
        self._trained: dict[File, TrainingOptions] = {}
        self._embedded: set[str] = set()

    def __call__(self, name: str) -> Callable[..., Any] | None:
        if name == "prepare":
            return None
        if name in ("log", "coverage_lines", "failed_users"):
            return lambda *_, **__: ()  # there is no result to look at
        return getattr(self, name, None) or partial(self._unknown, name)

    def _unknown(self, name: str, **_: object) -> Result:
        """A stage of a method's own (`Method.fit`)."""
        self._file(Work(name, note="its work is not known and not counted"))
        return Result()

    def given(self, model: str) -> GivenModel:
        return GivenModel(model=model, content="", revision=None)

    def encoder_of(self, model: str) -> Encoder:
        return Encoder(model=model, content="", libraries={})

    def given_model(self, given: GivenModel, **_: object) -> Base:
        self._file(Work("base model", users=1, memory=self._model.weights))
        return NOT_LOADED

    def tiny_model(
        self, tiny: TinyModelOptions, lessons: Lessons, users: File, **_: object
    ) -> Base:
        samples = self._measure.tokens("profile", lessons.questions, users)
        work = pretrain(self._model, "base model", samples, tiny.steps * tiny.batch_size)
        work.steps, work.disk = tiny.steps, 4 * self._model.shape.parameters
        self._file(work)
        return NOT_LOADED

    def task_adapt(
        self, options: TaskAdaptOptions, questions: Questions, users: File, base: Base, seed: int,
        **_: object,
    ) -> Base:  # fmt: skip
        kinds = KINDS[options.train_on]
        found = chain(*(self._measure.tokens(kind, questions, users) for kind in kinds))
        samples, seeds = [*chain(*found)], [derive_seed(seed, "task_adapt")]
        chosen = [samples[place] for place in chosen_items(options, len(samples), seed)]
        checkpointing = base.gradient_checkpointing
        work = train(self._model, "task adaptation", options, [chosen], seeds, checkpointing)
        work.users, work.disk = len(self._measure.users(users)), self._adapter_bytes(options)
        self._file(work)
        return base

    def embed(self, method: Embedding, population: Population, **_: object) -> models.Embedded:
        """Users who are embedded already, for another method or point, cost nothing."""
        model, measure, options = self._model, self._measure, method.options
        keys = {table: key_of(method, table) for table in population.tables}
        new = [table for table, key in keys.items() if key not in self._embedded]
        self._embedded |= {*keys.values()}
        counts = {table: len(measure.users(table)) for table in keys}
        few_shot = counts[population.tables[-1]]
        if questions := method.questions:
            at_input = options.embedding == "input_signature"
            sizes = (options.signature_vocabulary, options.signature_hidden)
            width = min(sizes[0], model.shape.head[1]) * min(sizes[1], model.shape.head[0])
            lengths = [own for table in new for own in measure.tokens("profile", questions, table)]
            work = sign(model, "embedding", lengths, CHUNK, sizes, at_input)
            first = next(table for table, count in counts.items() if count)
            if at_input and first in new:
                # Whitening asks the first users again; it has the eigenvectors of their scatter.
                taught = measure.tokens("profile", questions, first)[:WHITENED]
                work += sign(model, "embedding", taught, CHUNK, sizes, at_input)
                work.memory = max(work.memory, model.weights + 3 * 8 * width**2)
            work.disk = 4 * width**2 * (at_input + (at_input and first in new))
        else:
            own = method.encoder is None
            texts = [n for table in new for n in measure.texts(method.task, table, own)]
            if method.encoder is None:
                width, work = model.shape.hidden, states(model, "embedding", texts)
            else:
                width, parameters = encoder_shape(method.encoder.model)
                work = Work("embedding", items=len(texts), tokens=sum(texts))
                work.flops = 2 * parameters * work.tokens
                work.seconds = model.seconds(work.flops)
                if not parameters:
                    work.note = f"the work of {method.encoder.model} is not known and not counted"
        work.users = sum(counts[table] for table in new)
        work.disk += TABLE + sum(counts.values()) * (4 * width + ROW)
        return models.Embedded(
            table=self._file(work), centred=False, users=few_shot, dimensions=width
        )

    def refit(
        self, anchors: AnchorOptions, training: TrainingOptions, embedded: models.Embedded,
        candidates: File, questions: Questions, base: Base, number: int, seed: int, **_: object,
    ) -> Clusters:  # fmt: skip
        """Clusters' LoRAs are trained on every second item, and each is asked for all the others.

        Everybody moves, so that there are all rounds.
        """
        model, samples = self._model, self._measure.tokens("profile", questions, candidates)
        labels, count = assumed_clusters(anchors, len(samples), seed)
        shown: list[Lengths] = [[] for _ in range(count)]
        for label, own in zip(labels, samples, strict=True):
            shown[label] += own[0::2]
        seeds = [derive_seed(seed, "refit", str(number), str(k)) for k in range(count)]
        work = train(model, "refit", training, shown, seeds, base.gradient_checkpointing)
        alone = Below(model.lora(training), anchors=1, each=1)
        held_out = [*chain(*(own[1::2] for own in samples))]
        work += likelihoods(model, "refit", [held_out], alone, times=count)
        # All rounds are of the same users.
        first = number == 0
        work.users, work.items = first * len(samples), first * sum(map(len, samples))
        work.disk = 4 * count * model.lora(training).width + TABLE + 4 * len(samples)
        work.note = f"refit: {anchors.refits} rounds of {count} clusters, the most"
        file = self._file(work, embedded)
        return Clusters(
            clusters=labels, nearest=(), moved=len(labels), log_likelihood=None, bank=file
        )

    def anchors(
        self, options: AnchorOptions, embedded: models.Embedded, candidates: File,
        refitted: Clusters | None, seed: int,
    ) -> Anchors:  # fmt: skip
        """Those that the run would choose of clusters that are dealt at random."""
        items = {name: len(u["profile"]) for name, u in self._measure.users(candidates).items()}
        labels, count = assumed_clusters(options, len(items), seed)
        members = members_of([*items], [*items.values()], [*labels], options)
        note = f"assumed: {len(members)} anchors of candidates at random in {count} clusters"
        found = [
            models.Anchor(name=name, members=own, items=sum(map(items.get, own)), cluster=0)
            for name, own in members.items()
        ]
        return Anchors(
            table=self._file(Work("anchors", note=note), embedded, refitted), anchors=found,
            whole_clusters=0, asked=options.count, candidates=0, eligible=0, clusters=0, noise=0,
        )  # fmt: skip

    def meta_lora(
        self, options: TrainingOptions, anchors: Sequence[models.Anchor], candidates: File,
        questions: Questions, base: Base, seed: int, **_: object,
    ) -> models.MetaLoras:  # fmt: skip
        tokens = self._measure.tokens
        samples = [
            [*chain(*tokens("profile", questions, candidates, anchor.members))]
            for anchor in anchors
        ]
        seeds = [derive_seed(seed, "meta_lora", anchor.name) for anchor in anchors]
        checkpointing = base.gradient_checkpointing
        work = train(self._model, "meta-LoRAs", options, samples, seeds, checkpointing)
        work.disk = len(anchors) * self._adapter_bytes(options) + 22 * work.steps
        file = self._file(work)
        self._trained[file] = options
        loras = [
            MetaLora(anchor=one.name, members=one.members, adapter=file, training=UNTRAINED)
            for one in anchors
        ]
        return models.MetaLoras(loras=tuple(loras))

    def bank(self, loras: tuple[MetaLora, ...], chosen: Anchors, **_: object) -> Bank:
        options = self._trained[loras[0].adapter]
        disk = TABLE + 4 * len(loras) * self._model.lora(options).width
        file = self._file(Work("meta-LoRAs", disk=disk), loras, chosen)
        return Bank(file=file, members=loras, rank=options.rank, scale=1.0)

    def fusion(
        self, options: FusionOptions, embedded: models.Embedded, bank: Bank, asked: Asked | None,
        **_: object,
    ) -> models.Recipes:  # fmt: skip
        anchors, users = len(bank.members), embedded.users
        each = min(options.top_m, anchors)
        made_of: list[Record] = [embedded, bank]
        if asked:
            samples = [*chain(*self._measure.tokens("profile", asked.questions, asked.users))]
            # One anchor's LoRA at a time, as it is.
            alone = replace(self._below(bank, each=1, how=options.merge), anchors=1)
            times = min(options.shortlist or anchors, anchors)
            work = likelihoods(self._model, "evidence", [samples], alone, times=times)
            work.users, work.disk = users, TABLE + users * (ROW + 8 * anchors)
            made_of.append(self._file(work))
        recipe = ROW + each * 40
        work = Work("fusion", users=users, disk=TABLE + users * recipe, per_user=recipe)
        return models.Recipes(
            table=self._file(work, *made_of), users=users, anchors_per_user=each,
            without_similar_anchor=0,
        )  # fmt: skip

    def answers(
        self, method: MethodRef, training: TrainingOptions | None, how: HowAnswered, users: File,
        user_ids: tuple[str, ...], questions: Questions, base: Base, merged: Merged | None,
        seed: int, **_: object,
    ) -> models.Answers:  # fmt: skip
        model, name, below = self._model, method.name, NOTHING
        if merged:
            for work in chain(*(self._behind[file] for file in files_of(merged))):
                work.method = work.method or name
            below = self._below(merged.bank, merged.recipes.anchors_per_user, merged.how)
        if training:
            seeds = [derive_seed(seed, "stacking", user_id) for user_id in user_ids]
            samples = self._measure.tokens("profile", questions, users, user_ids)
            checkpointing = base.gradient_checkpointing
            work = train(model, "training", training, samples, seeds, checkpointing, below)
            work.method, work.per_user = name, 4 * model.lora(training).width
            work.disk = TABLE + len(user_ids) * (work.per_user + 2 * ROW)
            self._file(work)
        task = questions.task
        choose = how.answer == "likelihood" and task.labels
        kind: Kind = "choices" if choose else "queries"
        samples = self._measure.tokens(kind, questions, users, user_ids)
        if choose:
            work = likelihoods(model, "scoring", samples, below, training)
        else:
            work = answer(model, "scoring", samples, task.max_new_tokens, below, training)
        work.method, by_id = name, self._measure.users(users)
        # Predictions twice as tables, and in LaMP's own format; what each user took.
        queries = [query for user_id in user_ids for query in by_id[user_id]["query"]]
        work.disk = 4 * TABLE + len(user_ids) * ROW + sum(60 + 3 * len(q["gold"]) for q in queries)
        file = self._file(work)
        return models.Answers(users=user_ids, predictions=file, work=file)

    def compare(
        self, users: models.Prepared, answered: Sequence[Answered], **_: object
    ) -> models.Compared:
        """A plan is made of all work since the last one."""
        counts = {role: len(self._measure.users(users.side(role))) for role in ROLES}
        kept = sum(self._measure.kept.values())
        self._works.append(Work("tokens kept", users=sum(counts.values()), disk=kept))
        self.plans.append(TaskPlan(CELL.get(), counts, self._works, self._measure.notes))
        self._works, self._measure.kept, self._measure.notes = [], {}, []
        names = tuple(one.method for one in answered)
        return models.Compared(groups=0, queries=0, methods=names, intervals={}, differences={})

    def _file(self, work: Work, *made_of: Record | Sequence[Record] | None) -> File:
        """The name of a file that nobody writes: for what work is behind it."""
        file = File(uri=f"plan/{len(self._behind)}", sha256="")
        self._behind[file] = [*chain(*(self._behind[one] for one in files_of(*made_of))), work]
        self._works.append(work)
        return file

    def _below(self, bank: Bank, each: int, how: str) -> Below:
        shapes = self._model.lora(self._trained[bank.members[0].adapter])
        return Below(shapes, len(bank.members), each, how)

    def _adapter_bytes(self, options: TrainingOptions) -> int:
        """A PEFT folder and its record: weights, and their names."""
        shapes = self._model.lora(options)
        return 4 * shapes.width + sum(3 * len(name) + 220 for name in shapes.sizes) + 800 + TABLE
