"""MTA, weighed by how often the user gave each label: what LoRAs know beside these counts."""

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
