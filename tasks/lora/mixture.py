"""The weights of users' merged LoRAs, trained on the users' own items: m numbers per user.

The recipe's weights v [m] of a user are the prior, y are the user's answers. The weights w minimise

    -log p(y | base + merged(w)) + penalty / 2 |w - v|^2

summed over answer tokens. They are the most probable weights, if weights are normal around v with
variance 1 / penalty. They are free numbers: a negative one takes an anchor's LoRA away, and a sum
above 1 adds more than a mean. The gradient goes through the merge (`MergedUsers.weighed`); with an
exact merge it is scale * <dL/dW, B_i A_i>, summed over layers.
"""

import torch

from tasks.lora.base import Base
from tasks.lora.batches import PerUser
from tasks.lora.group_train import Gradients, default_positions
from tasks.lora.grouped import Layers
from tasks.lora.merge import MergedUsers
from tasks.lora.train import Outcome


def train_weights(
    base: Base,
    layers: Layers,
    merged: MergedUsers,
    samples: PerUser,
    *,
    steps: int,
    learning_rate: float,
    penalty: float,
    positions: int | None = None,
) -> Outcome:
    """Train all users' weights at once, from those of `merged`, each as if alone.

    layers: the grouped layers of `base.model`. Each step is one of Adam (Kingma & Ba 2015), with
    all the items. Returns the weights as `flat` [U, m] (float64). A user without items, or whose
    weights stop being finite (`failed`), keeps those of `merged`.
    """
    start = merged.weights
    flat, todo = start.clone(), {u: [*of_user] for u, of_user in enumerate(samples) if of_user}
    labels = [sum(len(sample.answer) for sample in of_user) for of_user in samples]
    counts = start.new_tensor(labels)[:, None]
    outcome = Outcome(flat, [[] for _ in samples], [0] * len(samples))
    most = positions or default_positions(base)
    gradients = Gradients(base, layers, merged.weighed, None, most, outcome)
    adam = torch.optim.Adam([flat], lr=learning_rate)
    grad = torch.zeros_like(flat)
    base.model.train(base.model.is_gradient_checkpointing)
    try:
        for _ in range(steps):
            losses = gradients.fill(grad, flat, todo).tolist()
            for user in todo:
                outcome.losses[user].append(losses[user])
            # `fill` gives the gradient of the mean over answer tokens, not of the sum.
            flat.grad = counts * grad + penalty * (flat - start)
            adam.step()
    finally:
        base.model.eval()
    finite = torch.isfinite(flat).all(1)
    outcome.failed = torch.nonzero(~finite).flatten().tolist()
    flat[~finite] = start[~finite]
    return outcome
