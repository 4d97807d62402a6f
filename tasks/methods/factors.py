"""A shared bank, and per user only the weights on it, trained on the user's items.

The idea of LINEUP (arXiv 2610.02353): the recipe's weights are trained (tasks/lora/mixture.py),
starting from those by the evidence. Nothing is stacked. `fusion.weights=learned` has `mta` stack on
such weights.
"""

from tasks.methods.method import Method

METHOD = Method(
    "factors",
    order=36,
    settings={"fusion": {"weights": "learned", "order": "right", "merge": "exact"}},
    merged=True,
    default=False,
)
