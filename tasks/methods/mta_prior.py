"""MTA, and the labels of the user's items: what its LoRAs know beside how often each is given."""

from tasks.methods.method import LIKELIHOOD, Method

METHOD = Method(
    "mta_prior",
    order=55,
    merged=True,
    trained="stacking",
    label_prior=True,
    settings=LIKELIHOOD,
    default=False,
)
