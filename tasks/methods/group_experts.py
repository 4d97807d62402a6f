"""LoRAs in three steps: what all users share, on top of it groups, on top of these the user.

The idea of PROPER (arXiv 2503.01303). One LoRA is trained on the base users' items: the population.
On top of it each group of anchor candidates gets a LoRA. On a mixture of these the user's LoRA is
trained, by `stacking`. Groups are the anchors' clusters. PROPER learns a router to its groups; here
they are weighed as anchors are (`fusion`). So a member of the bank is the sum of population and
group, and with weights that sum to 1

    sum_k w_k (population + group_k) = population + sum_k w_k group_k
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tasks.bank import stored
from tasks.config.options import TrainingOptions
from tasks.errors import InputError, label
from tasks.methods.method import Method
from tasks.model import Made, Model, loaded_model
from tasks.record import File, derive_seed
from tasks.results.models import Anchors, Bank, Prepared, Setting
from tasks.results.stage import stage
from tasks.results.store import store
from tasks.text.loading import LIBRARIES
from tasks.users import users_in_order, users_of

if TYPE_CHECKING:
    from tasks.config.task import MethodConfig
    from tasks.lora.adapters import Lora
    from tasks.lora.tokens import Samples

# So many of the base users' items are drawn to train what all share.
ITEMS = 1000
POPULATION = "population"


@stage(version=3, libraries=LIBRARIES, uses_model=True)
def experts(
    options: TrainingOptions,
    items: int,
    before: Bank,
    base_users: File,
    candidates: File,
    setting: Setting,
) -> Bank:
    """The bank whose members are the sum of the population's LoRA and a group's.

    before: the usual bank of the same groups. items: how many are drawn of the base users'. Raises
    InputError if these have none, or a training diverges.
    """
    from tasks.lora.bank import stack, write_bank
    from tasks.lora.merge import concatenate
    from tasks.lora.tokens import joined

    anchors = before.names
    names = [name for member in before.members for name in member.members]
    with loaded_model(setting) as model:
        shared = joined(model.tokens("profile", users_of(base_users)))
        tokens = model.tokens("profile", users_in_order(candidates, names))
        by_name = dict(zip(names, tokens, strict=True))
        groups = [joined(by_name[name] for name in member.members) for member in before.members]
        if not len(shared):
            raise InputError("group_experts: there are no base users' items for what all share")
        drawn = _drawn(shared, items, setting.seed)
        ((population, _),) = _trained(model, options, [drawn], [POPULATION])
        made = _trained(model, options, groups, anchors, population)
    loras = [concatenate(population, lora) for lora, _ in made]
    with store().new("experts") as folder:
        write_bank(folder.path / "bank.safetensors", stack(anchors, loras))
        (folder.path / "members.json").write_text(json.dumps(names, ensure_ascii=False))
    members = tuple(
        stored("experts", member.anchor, member.members, (lora, how), setting.base)
        for member, lora, (_, how) in zip(before.members, loras, made, strict=True)
    )
    return Bank(file=folder.file("bank.safetensors"), members=members)


def _drawn(samples: Samples, items: int, seed: int) -> Samples:
    """At most `items` of the samples, drawn by the seed, in their order."""
    import torch

    generator = torch.Generator().manual_seed(derive_seed(seed, POPULATION))
    order = torch.randperm(len(samples), generator=generator)[:items].sort().values
    return samples.chosen(order.tolist())


def _trained(
    model: Model,
    options: TrainingOptions,
    samples: Sequence[Samples],
    names: Sequence[str],
    below: Lora | None = None,
) -> list[Made]:
    """A LoRA for each name's samples, over the one below if any; all at once, each as if alone."""
    from tasks.lora.bank import stack
    from tasks.lora.merge import MergedUsers

    seeds = [derive_seed(model.setting.seed, "experts", name) for name in names]
    merged = None
    if below:
        one, recipes = stack([POPULATION], [below]), [([POPULATION], [1.0])] * len(names)
        merged = MergedUsers(one, recipes, "exact", model.base.device)
    made = model.train(options, samples, seeds, merged)
    if failed := [name for name, (_, how) in zip(names, made, strict=True) if how.failed]:
        raise InputError(
            f"group_experts: {label(failed[0])}: the loss was not finite; lower "
            "meta_lora.learning_rate"
        )
    return made


def bank(
    config: MethodConfig, users: Prepared, _chosen: Anchors, usual: Bank, setting: Setting
) -> Bank:
    """The bank of the usual bank's groups. Raises InputError as `experts` does."""
    made = experts(config.meta_lora, ITEMS, usual, users.base, users.anchor, setting)
    # The map is not in the stage's result: it shows all users, so it goes when one is forgotten.
    return made.model_copy(update={"map": usual.map})


METHOD = Method(
    "group_experts", order=52, merged=True, trained="stacking", bank=bank, default=False
)
