"""A shared bank, and of the user nothing but the weights on it, trained on the user's items.

The idea of LINEUP (arXiv 2610.02353): the weights of the recipe are learned (tasks/lora/mixture.py)
from those of the evidence on; nothing is stacked. `fusion.weights=learned` gives them to `mta`.
"""

from tasks.methods.method import Method

METHOD = Method(
    "factors",
    order=36,
    settings={"fusion": {"weights": "learned", "order": "right", "merge": "exact"}},
    merged=True,
    default=False,
)
