"""What each stage costs: a planner that stands in for the stages (tasks/stand_in.py)."""

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

from humanize import metric

from tasks.bank import GivenAdapter, read_adapters
from tasks.base_model import KINDS, Lessons, chosen_items
from tasks.config.options import (
    AnchorOptions,
    FusionOptions,
    LearnedOptions,
    TaskAdaptOptions,
    TinyModelOptions,
    TrainingOptions,
)
from tasks.embed import Embedding
from tasks.lamp.folders import ROLES
from tasks.lora.answer import on_one_prompt
from tasks.lora.grouped import Shapes
from tasks.lora.merge import KEPT_BYTES
from tasks.method.clusters import members_of
from tasks.methods import METHODS
from tasks.plan import cost
from tasks.plan.cost import Measure, TaskPlan, Work
from tasks.plan.model import NOT_LOADED, UNSEEN, PlannedModel
from tasks.record import File, Result, key_of
from tasks.results import models
from tasks.results.stage import CELL
from tasks.stacking import HowAnswered
from tasks.text.tokens import by_question

# Bytes of a row in a table, about.
ROW = 100


class Planner:
    """Stands in for the stages of one LaMP task under one seed, with its curve.

    Each method is named as a stage and takes of its arguments those that cost. It notes the cost,
    and gives a result whose files are names only. `compare` ends a plan; `plans` has it then.
    """

    def __init__(self, model: PlannedModel) -> None:
        self.plans: list[TaskPlan] = []
        self._model, self._measure = model, Measure(model)
        self._note = self._measure.notes.append
        self._works: list[Work] = []
        # Numbers of the LoRA in a file; the users' tables that are embedded, and how.
        self._numbers: dict[File, int] = {}
        self._embedded: set[str] = set()
        # The work behind recipes, which is the first method's that asks for it.
        self._behind: dict[File, list[Work]] = {}
        self._start = self._candidates = 0

    def __call__(self, name: str) -> Callable[..., Any] | None:
        if name == "prepare" or name in UNSEEN:
            return UNSEEN.get(name)
        stage: Callable[..., Any] | None = getattr(self, name, None)
        if stage:
            return stage
        # A stage of a method's own (`Method.fit`, `bank`, `recipes`).
        self._note(f"{name}: its work is not known and not counted")
        return lambda **arguments: arguments.get("before", Result())

    def given_model(self, **_: object) -> models.Base:
        self._add("base model", Work(users=1, memory=self._model.weights))
        return NOT_LOADED

    def tiny_model(
        self, tiny: TinyModelOptions, lessons: Lessons, users: File, **_: object
    ) -> models.Base:
        """A whole model trained on some of the users' samples.

        6 FLOPs per parameter and token, with the weights' own gradients (Kaplan et al. 2020).
        """
        model = self._model
        work = cost.passes(model, self._measure.tokens("profile", lessons.questions, users))
        work.steps, work.memory = tiny.steps, 4 * model.weights
        work.tokens = work.tokens * tiny.steps * tiny.batch_size // max(1, work.items)
        work.flops = 6 * model.parameters * work.tokens
        work.seconds = model.seconds(work.flops)
        self._add("base model", work, disk=4 * model.parameters)
        return NOT_LOADED

    def task_adapt(
        self, options: TaskAdaptOptions, questions: models.Questions, users: File,
        base: models.Base, seed: int, **_: object,
    ) -> models.Base:  # fmt: skip
        measure = self._measure
        by_kind = (measure.tokens(kind, questions, users) for kind in KINDS[options.train_on])
        samples = [*chain(*chain(*by_kind))]
        chosen = [samples[place] for place in chosen_items(options, len(samples), seed)]
        work = cost.train(self._model, options, [chosen])
        work.users = len(measure.users(users))
        self._add("task adaptation", work, disk=cost.adapter_bytes(self._model.lora(options)))
        return base

    def embed(
        self, method: Embedding, population: Mapping[str, File], **_: object
    ) -> models.Embedded:
        """Users who are embedded already, for another method or point, cost nothing."""
        measure, self._start = self._measure, len(self._works)
        counts = {table: len(measure.users(table)) for table in population.values()}
        self._candidates = counts[population["anchor"]]
        keys = {key_of(method, table): table for table in counts}
        new = [table for key, table in keys.items() if key not in self._embedded]
        self._embedded |= keys.keys()
        work, width = cost.embedding(measure, method, counts, new)
        file = self._add("embedding", work, disk=sum(counts.values()) * (4 * width + ROW))
        users = counts[population["few_shot"]]
        return models.Embedded(table=file, centred=False, users=users, dimensions=width)

    def clusters(self, options: AnchorOptions, seed: int, **_: object) -> models.Clusters:
        labels = cost.assumed_clusters(options, self._candidates, seed)
        return models.Clusters(clusters=tuple(labels))

    def anchors(
        self, options: AnchorOptions, candidates: File, clusters: models.Clusters, **_: object
    ) -> models.Anchors:
        """Those that the run would choose of clusters that are dealt at random."""
        users, labels = self._measure.users(candidates), [*clusters.clusters]
        items = {user_id: user.items for user_id, user in users.items()}
        members, count = members_of([*items], [*items.values()], labels, options), len({*labels})
        self._note(f"anchors: {len(members)} of candidates at random in {count} clusters (assumed)")
        chosen = tuple(
            models.Anchor(name=name, members=ids, items=sum(map(items.__getitem__, ids)), cluster=0)
            for name, ids in members.items()
        )
        return models.Anchors(
            table=self._add("anchors", Work()), anchors=chosen, whole_clusters=0,
            asked=options.count, candidates=0, eligible=0, clusters=0, noise=0,
        )  # fmt: skip

    def meta_lora(
        self, options: TrainingOptions, anchors: tuple[models.Anchor, ...], candidates: File,
        setting: models.Setting,
    ) -> models.MetaLoras:  # fmt: skip
        tokens, questions = self._measure.tokens, setting.questions
        samples = [
            [*chain(*tokens("profile", questions, candidates, one.members))] for one in anchors
        ]
        work = cost.train(self._model, options, samples)
        disk = len(anchors) * cost.adapter_bytes(self._model.lora(options)) + 22 * work.steps
        file = self._add("meta-LoRAs", work, disk=disk)
        self._numbers[file] = self._model.lora(options).width
        loras = (
            models.MetaLora(
                anchor=one.name, members=one.members, adapter=file, training=models.Training()
            )
            for one in anchors
        )
        return models.MetaLoras(loras=tuple(loras))

    def bank(self, loras: tuple[models.MetaLora, ...], **_: object) -> models.Bank:
        disk = 4 * len(loras) * self._numbers[loras[0].adapter]
        return models.Bank(file=self._add("meta-LoRAs", Work(), disk=disk), members=loras)

    def own_bank(self, adapters: tuple[GivenAdapter, ...], **_: object) -> models.Bank:
        """The adapters are read: what is refused is refused now."""
        loras = read_adapters(adapters, self._model.base.model)
        shapes = [Shapes(one.sizes, one.rank) for one in loras.values()]
        sizes = dict(chain(*(one.sizes.items() for one in shapes)))
        widest = Shapes(sizes, max(one.rank for one in shapes)).width
        disk = 4 * (sum(one.width for one in shapes) + len(shapes) * widest)
        file = self._add("adapters", Work(users=len(shapes)), disk=disk)
        self._numbers[file] = widest
        members = (
            models.MetaLora(anchor=name, members=(), adapter=file, training=models.Training())
            for name in loras
        )
        return models.Bank(file=file, members=tuple(members))

    def evidence(
        self, shortlist: int | None, embedded: models.Embedded, bank: models.Bank, users: File,
        setting: models.Setting,
    ) -> models.Evidence:  # fmt: skip
        count = len(bank.members)
        samples = self._measure.tokens("profile", setting.questions, users)
        width = self._numbers[bank.members[0].adapter]
        work = cost.likelihoods(self._model, samples, width, min(shortlist or count, count))
        work.users = embedded.users
        disk = embedded.users * (ROW + 8 * count)
        return models.Evidence(table=self._add("evidence", work, disk=disk))

    def fusion(
        self, options: FusionOptions, embedded: models.Embedded, bank: models.Bank, **_: object
    ) -> models.Recipes:
        users, each = embedded.users, min(options.top_m, len(bank.members))
        file = self._add("fusion", Work(users=users), disk=users * (ROW + each * 40))
        self._behind[file] = self._works[self._start :]
        return models.Recipes(
            table=file, users=users, anchors_per_user=each, without_similar_anchor=0
        )

    def learned_weights(
        self, options: LearnedOptions, merged: models.Merged, users: File, setting: models.Setting
    ) -> models.Recipes:
        """Steps of all items of all users, over merged LoRAs whose weights have gradients."""
        before, each = merged.recipes, merged.recipes.anchors_per_user
        samples = self._measure.tokens("profile", setting.questions, users)
        below = self._numbers[merged.bank.members[0].adapter] * each
        work = cost.passes(self._model, samples, below, times=options.steps, backward=True)
        work.steps = options.steps * len(samples)
        file = self._add("learned weights", work, disk=before.users * (2 * ROW + each * 50))
        self._behind[file] = self._works[self._start :]
        return before.model_copy(update={"table": file})

    def answers(
        self, how: HowAnswered, users: File, user_ids: tuple[str, ...],
        merged: models.Merged | None, setting: models.Setting, **_: object,
    ) -> models.Answers:  # fmt: skip
        model, tokens, questions = self._model, self._measure.tokens, setting.questions
        stacked = model.lora(how.training).width if how.training else 0
        below = beside = 0
        if merged:
            for work in self._behind.pop(merged.recipes.table, ()):
                work.method = how.method
            width = self._numbers[merged.bank.members[0].adapter]
            below = width * (merged.recipes.anchors_per_user if merged.how == "exact" else 1)
            kept = 4 * below * len(user_ids)
            beside = 4 * width * len(merged.bank.members)
            beside += kept if kept <= KEPT_BYTES or merged.how == "svd" else 0
        if how.training:
            samples = tokens("profile", questions, users, user_ids)
            work = cost.train(model, how.training, samples, below, beside)
            self._add("training", work, how.method, disk=len(user_ids) * (4 * stacked + 2 * ROW))
        labels = 0 if how.answer == "generate" else len(questions.task.labels)
        if METHODS[how.method].about:
            self._note(f"{how.method}: the text about each user is not counted")
        if METHODS[how.method].answer:
            work = Work(users=len(user_ids))
        elif labels:
            choices = tokens("choices", questions, users, user_ids)
            samples = [[*map(on_one_prompt, by_question(user, labels))] for user in choices]
            work = cost.passes(model, samples, below, stacked, beside)
        else:
            # All questions at once, and the most tokens there may be: each reads all weights.
            new = questions.task.max_new_tokens
            queries = tokens("queries", questions, users, user_ids)
            samples = [[cost.blank(len(one.prompt), new) for one in user] for user in queries]
            work = cost.passes(model, samples, below, stacked, beside)
            work.seconds += new * model.weights / (model.machine.bandwidth_tb * 1e12)
        asked = [self._measure.users(users)[user_id] for user_id in user_ids]
        # Predictions twice as tables, and in LaMP's own format; each label's likelihood; what each
        # user took.
        each = ROW + 8 * labels
        disk = len(asked) * ROW + sum(each * one.queries + 3 * one.gold for one in asked)
        file = self._add("scoring", work, how.method, disk)
        return models.Answers(users=user_ids, predictions=file, work=file)

    def compare(self, users: models.Prepared, **_: object) -> models.Compared:
        """A plan is made of all work since the last one."""
        measure = self._measure
        counts = {role: len(measure.users(users.side(role))) for role in ROLES}
        everybody = {user_id for role in ROLES for user_id in measure.users(users.side(role))}
        self._add("tokens kept", Work(users=len(everybody)), disk=sum(measure.kept.values()))
        most = max(work.memory for work in self._works)
        if self._model.gpu and most > self._model.machine.memory_gb * 1e9:
            self._note(
                f"{metric(most, 'B')} is more than the machine has (plan.memory_gb): lower "
                "stacking.users_per_job or anchors.per_job"
            )
        notes = dict.fromkeys(measure.notes)
        self.plans.append(TaskPlan(CELL.get(), counts, self._works, [*notes]))
        self._works = []
        measure.kept.clear()
        measure.notes.clear()
        return models.Compared(groups=0, queries=0, methods=(), intervals={}, differences={})

    def _add(self, stage: str, work: Work, method: str = "", disk: int = 0) -> File:
        """Note the work; the name of a file that nobody writes."""
        work.stage, work.method, work.disk = stage, method, work.disk + disk
        self._works.append(work)
        return File(uri=f"plan/{len(self.plans)}/{len(self._works)}", sha256="")
