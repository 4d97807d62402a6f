"""What each stage costs: a planner that stands in for the stages (tasks/stand_in.py)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from types import SimpleNamespace
from typing import Any

from humanize import metric

from tasks.embed import WHITENED
from tasks.lamp.folders import ROLES
from tasks.lora.answer import on_one_prompt
from tasks.lora.cost import widths_of
from tasks.lora.grouped import Shapes
from tasks.lora.merge import KEPT_BYTES
from tasks.method.clusters import members_of
from tasks.methods import METHODS
from tasks.own_bank import as_member, read_adapters
from tasks.plan.lengths import Lengths, Measure, assumed_clusters, blank
from tasks.plan.model import NOT_LOADED, UNSEEN, PlannedModel
from tasks.plan.work import TaskPlan, Work, adapter_bytes, likelihoods, passes, train
from tasks.prepare import each_user
from tasks.record import File, Result, key_of
from tasks.results import models
from tasks.results.stage import CELL
from tasks.task_adapt import KINDS, chosen_items
from tasks.text.tokens import by_question

# Bytes of a row in a table, about.
ROW = 100


class Planner:
    """Stands in for the stages of one LaMP task under one seed, with its curve.

    Each method has the name of a stage, and is given that stage's arguments by their names; it
    notes what the stage costs, and gives a result whose files are names only. `compare` ends a
    plan, which is then in `plans`.
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
        if stage := getattr(self, name, None):
            return lambda **arguments: stage(SimpleNamespace(**arguments))
        # A stage of a method's own (`Method.fit`, `bank`, `recipes`).
        self._note(f"{name}: its work is not known and not counted")
        return lambda **given: given.get("before", Result())

    def given_model(self, _: Any) -> models.Base:
        self._add("base model", Work(users=1, memory=self._model.weights))
        return NOT_LOADED

    def tiny_model(self, given: Any) -> models.Base:
        """A whole model trained on some of the users' samples.

        6 FLOPs per parameter and token, with the weights' own gradients (Kaplan et al. 2020).
        """
        model, tiny = self._model, given.tiny
        work = passes(model, self._measure.tokens("profile", given.lessons.questions, given.users))
        work.steps, work.memory = tiny.steps, 4 * model.weights
        work.tokens = work.tokens * tiny.steps * tiny.batch_size // max(1, work.items)
        work.flops = 6 * model.parameters * work.tokens
        work.seconds = model.seconds(work.flops)
        self._add("base model", work, disk=4 * model.parameters)
        return NOT_LOADED

    def task_adapt(self, given: Any) -> models.Base:
        options, measure = given.options, self._measure
        kinds = KINDS[options.train_on]
        found = (measure.tokens(kind, given.questions, given.users) for kind in kinds)
        samples = [*chain(*chain(*found))]
        chosen = [samples[place] for place in chosen_items(options, len(samples), given.seed)]
        work = train(self._model, options, [chosen])
        work.users = len(measure.users(given.users))
        self._add("task adaptation", work, disk=adapter_bytes(self._model.lora(options)))
        base: models.Base = given.base
        return base

    def embed(self, given: Any) -> models.Embedded:
        """Users who are embedded already, for another method or point, cost nothing."""
        model, measure, method = self._model, self._measure, given.method
        self._start = len(self._works)
        counts = {table: len(measure.users(table)) for table in given.population.values()}
        self._candidates = counts[given.population["anchor"]]
        keys = {key_of(method, table): table for table in counts}
        new = [table for key, table in keys.items() if key not in self._embedded]
        self._embedded |= keys.keys()
        whitening, width, work = 0, 0, Work()
        if questions := method.questions:
            at_input = method.options.embedding == "input_signature"
            samples = [own for table in new for own in measure.tokens("profile", questions, table)]
            vocabulary, hidden = model.base.model.get_output_embeddings().weight.shape
            width = min(method.options.signature_vocabulary, vocabulary)
            width *= min(method.options.signature_hidden, hidden)
            first = next(table for table, count in counts.items() if count)
            if at_input and first in new:
                # Whitening asks the first users again.
                samples += measure.tokens("profile", questions, first)[:WHITENED]
                whitening = 4 * width**2
            work = passes(model, samples, backward=at_input)
        elif method.encoder:
            self._note(f"embedding: the work of {method.encoder.model} is small and not counted")
        else:
            users = chain(*map(each_user, new))
            texts = chain(*map(method.texts, users))
            ids = [
                model.base.tokenizer(one, split_special_tokens=True)["input_ids"] for one in texts
            ]
            states = [blank(min(model.base.max_tokens, len(one)), 0) for one in ids]
            width, work = widths_of(model.base.model).hidden, passes(model, [states])
        work.users = sum(counts[table] for table in new)
        disk = whitening + sum(counts.values()) * (4 * width + ROW)
        return models.Embedded(
            table=self._add("embedding", work, disk=disk), centred=False,
            users=counts[given.population["few_shot"]], dimensions=width,
        )  # fmt: skip

    def clusters(self, given: Any) -> models.Clusters:
        labels = assumed_clusters(given.options, self._candidates, given.seed)
        if given.options.refits and given.options.train_on != "user":
            rounds = given.options.refits
            self._note(f"refit: {rounds} rounds of {len({*labels})} clusters, the most")
        return models.Clusters(clusters=tuple(labels))

    def refit(self, given: Any) -> models.Clusters:
        """Clusters' LoRAs are trained on every second item, and each is asked for all the others.

        Everybody moves, so that there are all rounds.
        """
        model, training, labels = self._model, given.training, given.before.clusters
        samples = self._measure.tokens("profile", given.setting.questions, given.candidates)
        shown: list[Lengths] = [[] for _ in {*labels}]
        for label, own in zip(labels, samples, strict=True):
            shown[label] += own[0::2]
        work, width = train(model, training, shown), model.lora(training).width
        work += likelihoods(self._model, [own[1::2] for own in samples], width, len(shown))
        # All rounds are of the same users.
        first = given.number == 0
        work.users, work.items = first * len(samples), first * sum(map(len, samples))
        self._add("refit", work, disk=4 * len(shown) * width)
        return models.Clusters(clusters=labels, moved=len(labels))

    def anchors(self, given: Any) -> models.Anchors:
        """Those that the run would choose of clusters that are dealt at random."""
        users, labels = self._measure.users(given.candidates), [*given.clusters.clusters]
        items = {user_id: user.items for user_id, user in users.items()}
        members = members_of([*items], [*items.values()], labels, given.options)
        count = len({*labels})
        self._note(f"anchors: {len(members)} of candidates at random in {count} clusters (assumed)")
        found = tuple(
            models.Anchor(name=name, members=own, items=sum(map(items.__getitem__, own)), cluster=0)
            for name, own in members.items()
        )
        return models.Anchors(
            table=self._add("anchors", Work()), anchors=found, whole_clusters=0,
            asked=given.options.count, candidates=0, eligible=0, clusters=0, noise=0,
        )  # fmt: skip

    def meta_lora(self, given: Any) -> models.MetaLoras:
        options, questions, anchors = given.options, given.setting.questions, given.anchors
        samples = [
            [*chain(*self._measure.tokens("profile", questions, given.candidates, one.members))]
            for one in anchors
        ]
        work = train(self._model, options, samples)
        disk = len(anchors) * adapter_bytes(self._model.lora(options)) + 22 * work.steps
        file = self._add("meta-LoRAs", work, disk=disk)
        self._numbers[file] = self._model.lora(options).width
        training = models.Training()
        loras = (
            models.MetaLora(anchor=one.name, members=one.members, adapter=file, training=training)
            for one in anchors
        )
        return models.MetaLoras(loras=tuple(loras))

    def bank(self, given: Any) -> models.Bank:
        disk = 4 * len(given.loras) * self._numbers[given.loras[0].adapter]
        return models.Bank(file=self._add("meta-LoRAs", Work(), disk=disk), members=given.loras)

    def own_bank(self, given: Any) -> models.Bank:
        """The adapters are read: what is refused is refused now."""
        loras = read_adapters(given.adapters, self._model.base.model)
        own = [Shapes(one.sizes, one.rank) for one in loras.values()]
        sizes = dict(chain(*(one.sizes.items() for one in own)))
        widest = Shapes(sizes, max(one.rank for one in own)).width
        disk = 4 * (sum(one.width for one in own) + len(own) * widest)
        file = self._add("adapters", Work(users=len(own)), disk=disk)
        self._numbers[file] = widest
        return models.Bank(file=file, members=tuple(as_member(name, file) for name in loras))

    def evidence(self, given: Any) -> models.Evidence:
        anchors, users = given.bank.members, given.embedded.users
        samples = self._measure.tokens("profile", given.setting.questions, given.users)
        times = min(given.shortlist or len(anchors), len(anchors))
        work = likelihoods(self._model, samples, self._numbers[anchors[0].adapter], times)
        work.users, disk = users, users * (ROW + 8 * len(anchors))
        return models.Evidence(table=self._add("evidence", work, disk=disk))

    def fusion(self, given: Any) -> models.Recipes:
        users, each = given.embedded.users, min(given.options.top_m, len(given.bank.members))
        file = self._add("fusion", Work(users=users), disk=users * (ROW + each * 40))
        self._behind[file] = self._works[self._start :]
        return models.Recipes(
            table=file, users=users, anchors_per_user=each, without_similar_anchor=0
        )

    def learned_weights(self, given: Any) -> models.Recipes:
        """Steps of all items of all users, over merged LoRAs whose weights have gradients."""
        before: models.Recipes = given.merged.recipes
        bank, steps = given.merged.bank, given.options.steps
        samples = self._measure.tokens("profile", given.setting.questions, given.users)
        below = self._numbers[bank.members[0].adapter] * before.anchors_per_user
        work = passes(self._model, samples, below, times=steps, backward=True)
        work.steps = steps * len(samples)
        disk = before.users * (2 * ROW + before.anchors_per_user * 50)
        file = self._add("learned weights", work, disk=disk)
        self._behind[file] = self._works[self._start :]
        return before.model_copy(update={"table": file})

    def answers(self, given: Any) -> models.Answers:
        model, tokens, how, merged = self._model, self._measure.tokens, given.how, given.merged
        questions, table, ids = given.setting.questions, given.users, given.user_ids
        own = model.lora(how.training).width if how.training else 0
        below = beside = 0
        if merged:
            for work in self._behind.pop(merged.recipes.table, ()):
                work.method = how.method
            width = self._numbers[merged.bank.members[0].adapter]
            below = width * (merged.recipes.anchors_per_user if merged.how == "exact" else 1)
            kept = 4 * below * len(ids)
            beside = 4 * width * len(merged.bank.members)
            beside += kept if kept <= KEPT_BYTES or merged.how == "svd" else 0
        if how.training:
            samples = tokens("profile", questions, table, ids)
            work = train(model, how.training, samples, below, beside)
            self._add("training", work, how.method, disk=len(ids) * (4 * own + 2 * ROW))
        labels = 0 if how.answer == "generate" else len(questions.task.labels)
        if METHODS[how.method].about:
            self._note(f"{how.method}: the text about each user is not counted")
        if METHODS[how.method].answer:
            work = Work(users=len(ids))
        elif labels:
            found = tokens("choices", questions, table, ids)
            samples = [[*map(on_one_prompt, by_question(mine, labels))] for mine in found]
            work = passes(model, samples, below, own, beside)
        else:
            # All questions at once, and the most tokens there may be: each reads all weights.
            new, found = questions.task.max_new_tokens, tokens("queries", questions, table, ids)
            samples = [[blank(len(one.prompt), new) for one in mine] for mine in found]
            work = passes(model, samples, below, own, beside)
            work.seconds += new * model.weights / (model.machine.bandwidth_tb * 1e12)
        users = self._measure.users(table)
        asked = [users[user_id] for user_id in ids]
        # Predictions twice as tables, and in LaMP's own format; each label's likelihood; what each
        # user took.
        each = ROW + 8 * labels
        disk = len(ids) * ROW + sum(each * one.queries + 3 * one.gold for one in asked)
        file = self._add("scoring", work, how.method, disk)
        return models.Answers(users=ids, predictions=file, work=file)

    def compare(self, given: Any) -> models.Compared:
        """A plan is made of all work since the last one."""
        model, measure = self._model, self._measure
        counts = {role: len(measure.users(given.users.side(role))) for role in ROLES}
        self._add("tokens kept", Work(users=sum(counts.values())), disk=measure.kept)
        most = max(work.memory for work in self._works)
        if model.gpu and most > model.machine.memory_gb * 1e9:
            self._note(
                f"{metric(most, 'B')} is more than the machine has (plan.memory_gb): lower "
                "stacking.users_per_job or anchors.per_job"
            )
        notes = [*dict.fromkeys(measure.notes)]
        self.plans.append(TaskPlan(CELL.get(), counts, self._works, notes))
        self._works, measure.kept = [], 0
        measure.notes.clear()
        return models.Compared(groups=0, queries=0, methods=(), intervals={}, differences={})

    def _add(self, stage: str, work: Work, method: str = "", disk: int = 0) -> File:
        """Note the work; the name of a file that nobody writes."""
        work.stage, work.method, work.disk = stage, method, disk
        self._works.append(work)
        return File(uri=f"plan/{len(self.plans)}/{len(self._works)}", sha256="")
