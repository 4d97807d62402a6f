"""A finished run, loaded: it gives new users their recipes and LoRAs, in memory.

    personaliser = Personaliser(read_run("last").cells[0])
    item = {"id": "1", "text": "Two friends ...", "answer": "comedy"}
    (personal,) = personaliser([{"user_id": "u1", "profile": [item]}])

It does what the run did for its few-shot users (tasks/embed.py, fusion.py, stacking.py), by the
same functions and settings. Nothing is written, and nothing is read once it is loaded, but for
users that were in the run.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from tasks.embed import by_user, embedder, embedding_of, measured
from tasks.errors import InputError
from tasks.export import about
from tasks.fusion import bank_vectors, learn, vector_evidence, weighed_anchors
from tasks.lora.adapters import Lora
from tasks.lora.bank import stack
from tasks.lora.batches import Encoded
from tasks.lora.merge import MergedUsers, add_to_model
from tasks.lora.targets import AnyModel
from tasks.method.weights import Floats, shortlists
from tasks.method.whitening import unit_rows
from tasks.methods import METHODS, MethodName
from tasks.model import Model
from tasks.recipes import Merger, Recipe, recipes_of
from tasks.results.models import Training
from tasks.results.run import Cell
from tasks.running.slots import gpu_slot
from tasks.stacking import Adapted, seeds_of
from tasks.text.loading import load
from tasks.text.questions import User, content, setting_of
from tasks.text.tokens import samples_of
from tasks.users import users_of


@dataclass(frozen=True)
class Personal:
    """One user's recipe, the LoRA merged by it, and the user's own on top, if it was trained.

    failed: the loss of the stacked one stopped being finite. A user without items has none of them.
    """

    user_id: str
    recipe: Recipe | None = None
    merged: Lora | None = None
    stacked: Lora | None = None
    failed: bool = False

    @property
    def loras(self) -> list[Lora]:
        """What is added to the base model."""
        return [one for one in (self.merged, self.stacked) if one]


@contextmanager
def folded(model: AnyModel, lora: Lora) -> Iterator[None]:
    """The model with a LoRA in its weights; at the end these are the very ones from before."""
    weights = [model.get_submodule(name).weight for name in lora.layers]
    before = [one.detach().clone() for one in weights]
    try:
        add_to_model(model, lora)
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)


class Personaliser:
    """The base model, bank and embeddings of one cell of a run, for a method that merges.

    Used by one thread. Raises InputError where the run's files are gone, or the method makes its
    LoRAs in another way.
    """

    def __init__(self, cell: Cell, method: MethodName = "mta") -> None:
        merging = cell.merging(method)
        if merging is None:
            raise InputError(
                f"--method {method}: merges no LoRA by a recipe, so it has nothing for a new user; "
                "take mta"
            )
        if not METHODS[method].for_new_users:
            raise InputError(
                f"--method {method}: makes its LoRAs in a way that new users do not have; take mta"
            )
        self.cell, self.config = cell, cell.config.method(method)
        setting = setting_of(cell.config, self.config, cell.users, cell.base)
        self.model = Model(setting, load(cell.base, setting.compute))
        # A registered bank has no few-shot users.
        self.run = Merger(merging.merged, None if cell.users.few_shot_ids else {})
        bank = self.run.bank
        self.bank = replace(bank, layers=bank.to(self.model.base.device).layers)
        self.embedding = embedding_of(self.config, cell.users.task, setting.questions, cell.base)
        self._vectors_of = embedder(self.embedding, setting.compute)
        sides, self._place = measured(merging.embedded)
        ids, candidates = sides["anchor"]
        self.about = about(cell, method)
        self._known = frozenset(cell.users.few_shot_ids)
        points = self._place(candidates)
        self._anchors = bank_vectors(merging.merged.bank, ids, unit_rows(points))
        self._both = vector_evidence(
            self.config.fusion, merging.embedded, merging.merged.bank, ids, points, setting.seed
        )

    def __call__(self, users: Sequence[User], train: bool = True) -> list[Personal]:
        """The users' recipes and LoRAs, made at once, each as if alone.

        users: records with `user_id` and `profile`, a list of {id, text, answer}. train: the users'
        own LoRAs, too. Raises InputError where a user's weights are no mixture, or memory ends.
        """
        made = {str(user["user_id"]): Personal(str(user["user_id"])) for user in users}
        some = [user for user in users if user["profile"]]
        if some:
            with gpu_slot():
                made |= {one.user_id: one for one in self._personal(some, train)}
        return list(made.values())

    def adapted(self, personal: Personal) -> Adapted:
        """The LoRAs of one user, as the engine applies them when it answers."""
        if personal.recipe is None:
            return Adapted([], [])
        merger = Merger(self.run.merged, {personal.user_id: personal.recipe})
        stacked = stack([personal.user_id], [personal.stacked]) if personal.stacked else None
        return Adapted([], [], merger, stacked)

    def nothing(self) -> Lora:
        """A LoRA that adds nothing to the base model: of a user without a history."""
        layers = self.bank.one(0).layers.items()
        return Lora({name: (0 * a[:1], 0 * b[:, :1]) for name, (a, b) in layers}, 1.0)

    def _personal(self, users: Sequence[User], train: bool) -> list[Personal]:
        names, model = [str(user["user_id"]) for user in users], self.model
        setting = model.setting
        samples = [samples_of(setting.questions, model.base, "profile", user) for user in users]
        recipes = self._recipes(users, names, samples)
        merged = self._merged(recipes)
        parts = merged.parts(range(len(names))).to(torch.device("cpu"))
        trained: Sequence[tuple[Lora | None, Training]] = [(None, Training())] * len(names)
        if train and (options := self.config.training):
            below: MergedUsers | None = merged
            with ExitStack() as alone:
                in_full = model.base.model.dtype == torch.float32
                # In the weights it costs nothing; beside them its rank of m * r a tenth of a step.
                if len(names) == 1 and setting.base.engine == "grouped" and in_full:
                    alone.enter_context(folded(model.base.model, parts.one(0)))
                    below = None
                trained = model.train(options, samples, seeds_of(setting, names), below)
        return [
            Personal(name, recipe, parts.one(number), lora, how.failed)
            for number, (name, recipe, (lora, how)) in enumerate(
                zip(names, recipes, trained, strict=True)
            )
        ]

    def _merged(self, recipes: Sequence[Recipe]) -> MergedUsers:
        chosen = [(one.anchors, one.weights) for one in recipes]
        return MergedUsers(self.bank, chosen, self.run.merged.how, self.model.base.device)

    def _recipes(
        self, users: Sequence[User], names: list[str], samples: list[list[Encoded]]
    ) -> list[Recipe]:
        """Each user's recipe; the run's own of a few-shot user whose history did not change."""
        fusion = self.config.fusion
        items = samples if self.embedding.signed else [*map(self.embedding.texts, users)]
        vectors = [np.asarray(one.mean(0)) for one in by_user(self._vectors_of, items)]
        # In float32, as tables keep them.
        points = self._place(np.stack(vectors).astype(np.float32).astype(np.float64))
        directions = unit_rows(points)
        evidence: Floats | None = None
        if fusion.by_evidence:
            asked = shortlists(directions @ self._anchors.T, fusion.shortlist).tolist()
            evidence = self.model.log_likelihoods(self.bank, samples, asked)
            if self._both:
                evidence = self._both(evidence, points, [*map(len, samples)])
        chosen = weighed_anchors(fusion, names, directions, self._anchors, evidence)
        recipes = recipes_of(self.run.merged.bank.names, chosen)
        if fusion.weights == "learned":
            now = replace(self.model, started=time.perf_counter())
            recipes = learn(now, fusion.learned, self._merged(recipes), samples, recipes)
        ids = self._known.intersection(names)
        before = {
            user["user_id"]: content(user["profile"])
            for user in (users_of(self.cell.users.few_shot, ids) if ids else ())
        }
        return [
            # The company of other users may have moved the last digit of evidence.
            self.run.recipes[name] if before.get(name) == content(user["profile"]) else recipe
            for name, user, recipe in zip(names, users, recipes, strict=True)
        ]
