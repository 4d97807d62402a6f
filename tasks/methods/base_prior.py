"""The base model, and the labels of the user's items: personal without training anything."""

from tasks.methods.method import LIKELIHOOD, Method

METHOD = Method("base_prior", order=5, label_prior=True, settings=LIKELIHOOD, default=False)
