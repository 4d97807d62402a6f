"""A small network from a user's embedding to the user's weights over the bank.

The idea of Profile-to-PEFT (arXiv 2510.16282). There the network gives the LoRA, here the recipe:

    w(x) = softmax(W x + b + U tanh(V x + c))        x the unit vector of a user

It is trained once, on the anchor candidates, to give the weights by the evidence of at most `items`
items. It minimises the mean over candidates of KL(weights by evidence | w), plus `decay` / 2 times
the sum of its squared numbers. A new user's items then need not run under each anchor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from tasks.config.options import FusionOptions
from tasks.embed import read_embeddings
from tasks.fusion import unit_vectors
from tasks.method.weights import by_evidence
from tasks.methods.method import WITHOUT_EVIDENCE, Method
from tasks.model import loaded_model
from tasks.recipes import TABLE, recipes_of, write_recipes
from tasks.record import File, Options, Result, derive_seed
from tasks.results.models import Bank, Embedded, Merged, Prepared, Recipes, Setting
from tasks.results.stage import stage
from tasks.results.store import store
from tasks.text.loading import LIBRARIES
from tasks.users import users_in_order

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.config.task import MethodConfig

FILE = "network.safetensors"
Weights = dict[str, "Tensor"]


class NetworkOptions(Options):
    """The network, and how it is trained. items: the most of a candidate in its evidence."""

    hidden: int = Field(64, ge=0)
    steps: int = Field(300, ge=0)
    learning_rate: float = Field(0.03, gt=0.0)
    decay: float = Field(1e-5, ge=0.0)
    items: int = Field(10, ge=1)
    temperature: float = Field(1.0, gt=0.0)


class Network(Result):
    """`file`: W [K, D], b [K], U [K, H], V [H, D], c [H]."""

    file: File


@stage(version=1, libraries=(*LIBRARIES, "numpy"), uses_model=True)
def network(
    options: NetworkOptions, embedded: Embedded, bank: Bank, candidates: File, setting: Setting
) -> Network:
    """The network, trained on the anchor candidates' embeddings and evidence."""
    import torch
    from safetensors.torch import save_file

    from tasks.lora.bank import read_bank

    ids, points = read_embeddings(embedded)["anchor"]
    users = users_in_order(candidates, ids)
    with loaded_model(setting) as model:
        few = [of_user[: options.items] for of_user in model.tokens("profile", users)]
        evidence = model.log_likelihoods(read_bank(store().path(bank.file)), few)
    wanted = torch.from_numpy(evidence / options.temperature).softmax(1)
    seed = derive_seed(setting.seed, "hypernetwork")
    made = fitted(torch.from_numpy(np.asarray(points, np.float64)), wanted, options, seed)
    with store().new("network") as folder:
        save_file(made, folder.path / FILE)
    return Network(file=folder.file(FILE))


def fitted(points: Tensor, wanted: Tensor, options: NetworkOptions, seed: int) -> Weights:
    """The network's numbers (float64): points [U, D], wanted [U, K], whose rows sum to 1.

    Each step of Adam takes all candidates. W, b and U begin at 0, so all weights begin equal.
    """
    import torch

    size, anchors = points.shape[1], wanted.shape[1]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(options.hidden, size + 1, generator=generator, dtype=torch.float64)
    numbers = {
        "W": points.new_zeros(anchors, size),
        "b": points.new_zeros(anchors),
        "U": points.new_zeros(anchors, options.hidden),
        "V": drawn[:, :size],
        "c": drawn[:, size],
    }
    numbers = {name: one.contiguous().requires_grad_() for name, one in numbers.items()}
    leaves = [*numbers.values()]
    adam = torch.optim.Adam(leaves, lr=options.learning_rate)
    with torch.enable_grad():
        for _ in range(options.steps):
            log_w = _logits(numbers, points).log_softmax(1)
            squares = sum((one**2).sum() for one in leaves)
            loss = -(wanted * log_w).sum(1).mean() + options.decay / 2 * squares
            adam.zero_grad()
            loss.backward()
            adam.step()
    return {name: one.detach() for name, one in numbers.items()}


def _logits(numbers: Weights, points: Tensor) -> Tensor:
    """The weights' logits [U, K] of points [U, D]."""
    hidden = (points @ numbers["V"].T + numbers["c"]).tanh()
    return points @ numbers["W"].T + numbers["b"] + hidden @ numbers["U"].T


@stage(version=1, libraries=("torch", "numpy", "polars"))
def predicted(
    top_m: int, network: Network, embedded: Embedded, bank: Bank, before: Recipes
) -> Recipes:
    """Every few-shot user's recipe: the `top_m` anchors with the largest weights by the network."""
    import torch
    from safetensors.torch import load_file

    ids, users, anchors = unit_vectors(embedded, bank)
    numbers = load_file(store().path(network.file))
    log_w = _logits(numbers, torch.from_numpy(np.asarray(users, np.float64))).log_softmax(1)
    # In six decimals: the last bits depend on who else is in the product.
    known = np.round(log_w.numpy(), 6)
    options = FusionOptions(top_m=top_m, weights="evidence", evidence_temperature=1.0)
    chosen = by_evidence(users @ anchors.T, known, options)
    with store().new("predicted") as folder:
        write_recipes(folder.path, ids, recipes_of(bank.names, chosen))
    update = {"table": folder.file(TABLE), "anchors_per_user": chosen[0].shape[1]}
    return before.model_copy(update=update)


def recipes(
    config: MethodConfig, users: Prepared, embedded: Embedded, merged: Merged, setting: Setting
) -> Recipes:
    """The recipes by the network, trained once for all users."""
    options = NetworkOptions()
    made = network(options, embedded, merged.bank, users.anchor, setting)
    return predicted(config.fusion.top_m, made, embedded, merged.bank, merged.recipes)


METHOD = Method(
    "hypernetwork", order=37, settings=WITHOUT_EVIDENCE, merged=True, recipes=recipes, default=False
)
