"""What all users share, then groups on top of it, then the user: three steps of LoRAs.

The idea of PROPER (arXiv 2503.01303). One LoRA is trained on the base users' items (its population
level), over it one for each group of anchor candidates, and over a mixture of these the user's own,
by `stacking`. Groups are the anchors' clusters. PROPER learns a router to its groups; here a user's
groups are weighed as anchors are (`fusion`), so a member of the bank is both LoRAs of a group, and

    sum_k w_k (population + group_k) = population + sum_k w_k group_k        where weights sum to 1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from tasks.config.options import TrainingOptions
from tasks.errors import InputError, label
from tasks.methods.method import Method
from tasks.record import File
from tasks.results.models import Bank, MetaLora, Setting
from tasks.results.stage import stage

if TYPE_CHECKING:
    from tasks.config.task import MethodConfig
    from tasks.lora.adapters import Lora
    from tasks.lora.base import Base
    from tasks.lora.tokens import Samples
    from tasks.results.models import Anchors, Prepared, Training

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "peft")
# Of the base users' items, so many are drawn for what all share.
ITEMS = 1000
POPULATION = "population"


@stage(version=2, libraries=LIBRARIES, uses_model=True)
def experts(
    options: TrainingOptions,
    items: int,
    before: Bank,
    base_users: File,
    candidates: File,
    setting: Setting,
) -> Bank:
    """The bank whose members are the population's LoRA and a group's, as one.

    before: the bank of the same groups. items: drawn of the base users'. Raises InputError where
    they have none, or a training diverges.
    """
    from tasks.lora.bank import stack, write_bank
    from tasks.lora.merge import concatenate
    from tasks.lora.tokens import joined
    from tasks.prepare import users_of
    from tasks.results.store import store
    from tasks.running.slots import gpu_slot
    from tasks.text.loading import load
    from tasks.text.tokens import tokens_of

    names = [name for member in before.members for name in member.members]
    with gpu_slot():
        loaded = load(setting.base, setting.compute)
        everybody = users_of(base_users)
        users = {user["user_id"]: user for user in users_of(candidates, names)}
        tokens = partial(tokens_of, setting.questions, setting.base, loaded, "profile")
        shared = joined(tokens(everybody))
        own = dict(zip(names, tokens([users[name] for name in names]), strict=True))
        groups = [joined(own[name] for name in member.members) for member in before.members]
        if not len(shared):
            raise InputError("group_experts: there are no base users' items for what all share")
        drawn = _drawn(shared, items, setting.seed)
        (population,), _ = _trained(loaded, options, [drawn], [POPULATION], setting)
        anchors = [member.anchor for member in before.members]
        made, how = _trained(loaded, options, groups, anchors, setting, population)
    loras = [concatenate(population, lora) for lora in made]
    with store().new("experts") as folder:
        write_bank(folder.path / "bank.safetensors", stack(anchors, loras))
        (folder.path / "members.json").write_text(json.dumps(names, ensure_ascii=False))
    members = tuple(
        member.model_copy(
            update={"adapter": _kept(member, lora, setting.base.model), "training": training}
        )
        for member, lora, training in zip(before.members, loras, how, strict=True)
    )
    return Bank(file=folder.file("bank.safetensors"), members=members)


def _kept(member: MetaLora, lora: Lora, model: str) -> File:
    """A member's adapter in a folder of its own, with whose it is, as a meta-LoRA has it."""
    from tasks.meta_lora import write_member
    from tasks.results.store import store

    about = {"anchor": member.anchor, "members": member.members}
    with store().new("experts") as folder:
        write_member(folder.path, about, lora, model)
    return folder.file("adapter")


def _drawn(samples: Samples, items: int, seed: int) -> Samples:
    """So many of the samples, by the seed, or all of them, in their order."""
    import torch

    from tasks.config.task import derive_seed

    generator = torch.Generator().manual_seed(derive_seed(seed, POPULATION))
    order = torch.randperm(len(samples), generator=generator)[:items].sort().values
    return samples.chosen(order.tolist())


def _trained(
    base: Base,
    options: TrainingOptions,
    samples: Sequence[Samples],
    names: Sequence[str],
    setting: Setting,
    below: Lora | None = None,
) -> tuple[list[Lora], list[Training]]:
    """A LoRA for each, over the one below if any; all at once, each as if alone."""
    from tasks.config.task import derive_seed
    from tasks.lora.bank import stack
    from tasks.lora.merge import MergedUsers
    from tasks.training import train_loras, trainings

    seeds = [derive_seed(setting.seed, "experts", name) for name in names]
    merged = None
    if below:
        one = stack([POPULATION], [below])
        merged = MergedUsers(one, [([POPULATION], [1.0])] * len(names), "exact", base.device)
    engine = setting.base.engine
    loras, outcome = train_loras(base, options, samples, seeds, merged, engine=engine)
    if outcome.failed:
        raise InputError(
            f"group_experts: {label(names[outcome.failed[0]])}: the loss was not finite; lower "
            "meta_lora.learning_rate"
        )
    return loras, trainings(outcome, samples)


def bank(
    config: MethodConfig, users: Prepared, _chosen: Anchors, usual: Bank, setting: Setting
) -> Bank:
    """The bank of the usual one's groups, over what all share. Raises InputError: see `experts`."""
    made = experts(config.meta_lora, ITEMS, usual, users.base, users.anchor, setting)
    # Not in the stage's result: it shows all users, and goes with each that is forgotten.
    return made.model_copy(update={"map": usual.map})


METHOD = Method(
    "group_experts", order=52, merged=True, trained="stacking", bank=bank, default=False
)
