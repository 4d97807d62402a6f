"""Which stages a run of one LaMP task has, and what each costs (flows/lamp_task.py runs them)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from tasks.config import RunConfig, derive_seed
from tasks.embedding import CHUNK, OWN_MODEL, SIGNATURES, roles_of
from tasks.lamp.definitions import get_task
from tasks.lora.cost import Flops, Loras, Pass
from tasks.lora.grouped import Shapes
from tasks.lora.passes import blank, signature_passes
from tasks.lora.signature import STATE_POSITIONS
from tasks.methods import METHODS, MethodName, bank_kind
from tasks.plan.anchors import assumed_anchors, assumed_clusters
from tasks.plan.lengths import Lengths, Measure
from tasks.plan.model import ENCODER_TOKENS, Planned, encoder_size
from tasks.plan.work import (
    Below,
    Work,
    added,
    answer,
    compute_seconds,
    forward_bytes,
    likelihoods,
    sign,
    tokens,
    train,
)
from tasks.prepare import ROLES, users_of
from tasks.stacking import training_of
from tasks.store.artifacts import Store
from tasks.task_adapt import KINDS, chosen_items
from tasks.whitening import WHITENED

# Bytes of a piece's record.json and of its tables' own headers, about.
RECORD, ROW = 1500, 100


@dataclass(frozen=True)
class TaskPlan:
    """What one LaMP task takes: its stages in order, and what was assumed of it."""

    title: str
    users: dict[str, int]
    anchors: int
    works: list[Work]
    notes: list[str]


def plan_task(
    options: RunConfig,
    lamp_task: str,
    prepared: dict[str, Any],
    where: Store,
    planned: Planned,
    items: int | None = None,
) -> TaskPlan:
    """The plan of one LaMP task from its prepared users.

    items: only what is done again for few-shot users that have so many items (`items_curve`).
    """
    planner = _Planner(options, lamp_task, prepared, where, planned, items is not None)
    works = [work for work in planner.works() if work.users]
    kept = planner.measure.kept_bytes
    works.append(Work("tokens kept", disk=kept, users=sum(map(len, planner.users.values()))))
    title = lamp_task if items is None else f"{lamp_task}, {items} items"
    users = {role: len(own) for role, own in planner.users.items()}
    most = max(work.memory for work in works)
    if planned.gpu and most > planned.machine.memory_gb * 1e9:
        planner.notes.append(
            f"{most / 1e9:.3g} GB is more than the machine has (plan.memory_gb): lower "
            "stacking.users_per_job or anchors.per_job, or set base.gradient_checkpointing"
        )
    notes = list(dict.fromkeys([*planner.measure.notes, *planner.notes]))
    return TaskPlan(title, users, planner.anchors, works, notes)


class _Planner:
    def __init__(
        self,
        options: RunConfig,
        lamp_task: str,
        prepared: dict[str, Any],
        where: Store,
        planned: Planned,
        again: bool,
    ) -> None:
        self.options, self.lamp_task, self.planned, self.again = options, lamp_task, planned, again
        self.users = {role: users_of(where, prepared, role) for role in ROLES}
        self.measure = Measure(options, lamp_task, prepared["value"]["instruction"], planned)
        self.notes: list[str] = []
        self.anchors = 0

    def works(self) -> Iterator[Work]:
        if not self.again:
            yield self._base()
            if self.options.base.task_adapt.enabled:
                yield self._task_adapt()
        banks: list[tuple[dict[str, Any], Below]] = []
        embedded: list[dict[str, Any]] = []
        for method in self.options.methods:
            own = self.options.for_method(method)
            below = None
            if METHODS[method].merged:
                kind = bank_kind(own.model_dump(mode="json"))
                below = next((known for other, known in banks if other == kind), None)
                if below is None:
                    how = own.anchors.model_dump(include={"embedding", "text_model"})
                    if how not in embedded:
                        embedded.append(how)
                        yield self._embedding(own, method)
                    works, below = self._bank(own, method)
                    banks.append((kind, below))
                    yield from works
            if METHODS[method].trained:
                yield self._own(own, method, below)
            # Fewer items change nothing for a method that looks at none.
            if not self.again or METHODS[method] != METHODS["base"] or own.prompt.history_items:
                yield self._scoring(own, method, below)

    def _base(self) -> Work:
        tiny = self.options.base.tiny
        done = Work("base model", users=len(self.users["base"]), memory=self.planned.weights)
        if self.options.base.model != "tiny":
            return replace(done, users=1)
        lengths = self.measure.profiles(self.users["base"], 0)
        done.items, done.steps = sum(map(len, lengths)), tiny.steps
        mean = sum(map(tokens, lengths)) / max(1, done.items)
        done.tokens = int(tiny.steps * tiny.batch_size * mean)
        # Kaplan et al. 2020: six FLOPs per parameter and token, with the weights' own gradients.
        done.flops = 6 * self.planned.shape.parameters * done.tokens
        done.memory = 4 * self.planned.weights
        done.seconds = compute_seconds(self.planned, done.flops)
        done.disk = 4 * self.planned.shape.parameters
        return done

    def _task_adapt(self) -> Work:
        how, history = self.options.base.task_adapt, self.options.prompt.history_items
        kinds = {"golds": self.measure.golds, "profile": self.measure.profiles}
        found = [
            one
            for kind in KINDS[how.train_on]
            for own in kinds[kind](self.users["base"], history)
            for one in own
        ]
        chosen = [found[i] for i in chosen_items(self.options, len(found))]
        seeds = [derive_seed(self.options.seed, "task_adapt")]
        job = ([chosen], seeds)
        checkpointing = self.options.base.gradient_checkpointing
        done = train(self.planned, "task adaptation", "", how, [job], checkpointing)
        done.disk = _adapter_bytes(self.planned.lora(how), done.steps)
        return replace(done, users=len(self.users["base"]))

    def _embedding(self, own: RunConfig, method: MethodName) -> Work:
        roles = ("few_shot",) if self.again else roles_of(own)
        users = [user for role in roles for user in self.users[role]]
        anchors = own.anchors
        if anchors.embedding in SIGNATURES:
            sizes = (anchors.signature_vocabulary, anchors.signature_hidden)
            history = own.prompt.history_items
            lengths = [one for r in roles for one in self.measure.profiles(self.users[r], history)]
            at_input = anchors.embedding == "input_signature"
            done = sign(self.planned, lengths, CHUNK, *sizes, at_input)
            width = min(sizes[0], self.planned.shape.head[1])
            width *= min(sizes[1], self.planned.shape.head[0])
            if at_input and not self.again:
                # Whitening asks the first users again, all of one role; it has the eigenvectors of
                # their scatter.
                count = next((len(self.users[role]) for role in roles if self.users[role]), 0)
                first = lengths[: min(count, WHITENED)]
                teachers = sign(self.planned, first, CHUNK, *sizes, at_input)
                done = replace(added(done, teachers), users=done.users)
                done.memory = max(done.memory, self.planned.weights + 3 * 8 * width**2)
                done.disk += 4 * width**2
        else:
            is_own = anchors.text_model == OWN_MODEL
            most = self.planned.max_tokens if is_own else ENCODER_TOKENS
            texts = self.measure.texts(users, most, is_own)
            flat = [one for own_texts in texts for one in own_texts]
            done = Work("embedding", users=len(users), items=len(flat), tokens=sum(flat))
            width = self.planned.shape.hidden
            if is_own:
                passes = self._states(flat)
                done.flops = sum(map(Flops(self.planned.shape, Loras()).forward, passes))
                needed = max(forward_bytes(self.planned, one) for one in passes)
                done.memory = self.planned.weights + needed
            else:
                done.flops = 2 * encoder_size(own, self.notes) * done.tokens
            done.seconds = compute_seconds(self.planned, done.flops)
        done.disk += RECORD + done.users * (4 * width + ROW)
        return replace(done, method=method)

    def _states(self, lengths: list[int]) -> list[Pass]:
        """The passes of the base model's own states: no output embedding."""
        texts = [blank(length, 0) for length in lengths]
        return [replace(one, labels=0) for one in signature_passes(texts, STATE_POSITIONS)]

    def _bank(self, own: RunConfig, method: MethodName) -> tuple[list[Work], Below]:
        shapes = self.planned.lora(own.meta_lora)
        anchors, note = assumed_anchors(
            own, {user["user_id"]: len(user["profile"]) for user in self.users["anchor"]}
        )
        count = len(anchors)
        each = min(own.fusion.top_m, count)
        below = Below(shapes.sizes, shapes.rank, count, each, own.fusion.merge)
        works = []
        if not self.again:
            self.anchors = max(self.anchors, count)
            self.notes.append(f"{method}: assumed: {note}")
            if own.anchors.refits and own.anchors.train_on != "user":
                works.append(self._refit(own, method, shapes))
            works.append(self._meta_loras(own, method, anchors, shapes))
        if own.fusion.weights == "evidence":
            works.append(self._evidence(own, method, below))
        few = len(self.users["few_shot"])
        recipe = ROW + each * 40
        fused = Work("fusion", method, users=few, disk=RECORD + few * recipe, per_user=recipe)
        return [*works, fused], below

    def _refit(self, own: RunConfig, method: MethodName, shapes: Shapes) -> Work:
        """All rounds that there may be: the clusters' LoRAs are trained on every second item of
        all candidates, and each is asked for the other items."""
        anchors, candidates = own.anchors, self.users["anchor"]
        found = self.measure.profiles(candidates, own.prompt.history_items)
        by_id = {user["user_id"]: one for user, one in zip(candidates, found, strict=True)}
        clusters = assumed_clusters(own, list(by_id))
        self.notes.append(
            f"{method}: refit: {anchors.refits} rounds of {len(clusters)} clusters, the most"
        )
        shown = [[one for name in each for one in by_id[name][0::2]] for each in clusters]
        held_out = [one for each in found for one in each[1::2]]
        how = own.meta_lora.model_copy(update={"epochs": anchors.refit_epochs})
        seeds = [
            [derive_seed(own.seed, "refit", str(number), str(k)) for k in range(len(clusters))]
            for number in range(anchors.refits)
        ]
        jobs = [(shown, each) for each in seeds]
        done = train(self.planned, "refit", method, how, jobs, own.base.gradient_checkpointing)
        alone = Below(shapes.sizes, shapes.rank, 1, 1, own.fusion.merge)
        times = anchors.refits * len(clusters)
        done = added(done, likelihoods(self.planned, "refit", [held_out], alone, times))
        bank = 4 * len(clusters) * shapes.width
        disk = anchors.refits * (bank + RECORD + 4 * len(candidates))
        return replace(done, users=len(candidates), items=sum(map(len, found)), disk=disk)

    def _meta_loras(
        self, own: RunConfig, method: MethodName, anchors: list[list[str]], shapes: Shapes
    ) -> Work:
        by_id = {user["user_id"]: user for user in self.users["anchor"]}
        wanted = list(dict.fromkeys(name for members in anchors for name in members))
        history = own.prompt.history_items
        found = self.measure.profiles([by_id[name] for name in wanted], history)
        lengths = dict(zip(wanted, found, strict=True))
        samples = [[one for name in members for one in lengths[name]] for members in anchors]
        seeds = [derive_seed(own.seed, "meta_lora", members[0]) for members in anchors]
        checkpointing = own.base.gradient_checkpointing
        jobs = _jobs(samples, seeds, own.anchors.per_job)
        done = train(self.planned, "meta-LoRAs", method, own.meta_lora, jobs, checkpointing)
        adapters = len(anchors) * _adapter_bytes(shapes, 0) + 22 * done.steps
        # Once as adapters, once as the bank.
        done.disk = adapters + 4 * len(anchors) * shapes.width + RECORD
        return done

    def _evidence(self, own: RunConfig, method: MethodName, below: Below) -> Work:
        lengths = self.measure.profiles(self.users["few_shot"], own.prompt.history_items)
        asked = min(own.fusion.shortlist or below.anchors, below.anchors)
        flat = [one for user in lengths for one in user]
        # One anchor's LoRA at a time, as it is.
        alone = replace(below, anchors=1, each=1)
        done = likelihoods(self.planned, "evidence", [flat], alone, asked)
        few = len(lengths)
        disk = RECORD + few * (ROW + 8 * below.anchors)
        return replace(done, method=method, users=few, disk=disk)

    def _own(self, own: RunConfig, method: MethodName, below: Below | None) -> Work:
        how = training_of(own, method)
        few = self.users["few_shot"]
        lengths = self.measure.profiles(few, own.prompt.history_items)
        seeds = [derive_seed(own.seed, "stacking", user["user_id"]) for user in few]
        jobs = _jobs(lengths, seeds, own.stacking.users_per_job)
        checkpointing = own.base.gradient_checkpointing
        done = train(self.planned, "training", method, how, jobs, checkpointing, below)
        done.per_user = 4 * self.planned.lora(how).width
        done.disk = len(jobs) * RECORD + len(few) * (done.per_user + 2 * ROW)
        return done

    def _scoring(self, own: RunConfig, method: MethodName, below: Below | None) -> Work:
        task, few, history = (
            get_task(self.lamp_task),
            self.users["few_shot"],
            own.prompt.history_items,
        )
        how = training_of(own, method) if METHODS[method].trained else None
        seeds = [0] * len(few)
        size = own.stacking.users_per_job
        if own.scoring.answer == "likelihood" and task.labels:
            jobs = _jobs(self.measure.choices(few, history), seeds, size)
            parts = [likelihoods(self.planned, "", job, below, 1, how) for job, _ in jobs]
            done = reduce(added, parts)
        else:
            jobs = _jobs(self.measure.queries(few, history), seeds, size)
            asked = [job for job, _ in jobs]
            done = answer(self.planned, asked, task.max_new_tokens, below, how)
        queries = [query for user in few for query in user["query"]]
        # Predictions twice as tables, and in LaMP's own format.
        disk = (len(jobs) + 2) * RECORD + len(few) * ROW
        disk += sum(60 + 3 * len(query["gold"]) for query in queries)
        return replace(done, stage="scoring", method=method, users=len(few), disk=disk)


def _jobs(
    samples: Sequence[Lengths], seeds: Sequence[int], size: int
) -> list[tuple[Sequence[Lengths], Sequence[int]]]:
    """Users in jobs of `size`."""
    starts = range(0, len(samples), size)
    return [(samples[start : start + size], seeds[start : start + size]) for start in starts]


def _adapter_bytes(shapes: Shapes, steps: int) -> int:
    """A PEFT folder and its record: weights, their names (three times), a loss per step."""
    names = sum(3 * len(name) + 220 for name in shapes.sizes)
    return 4 * shapes.width + names + 800 + RECORD + 22 * steps
