"""The base model, weighed by how often the user gave each label: personal without training."""

from tasks.methods.method import LIKELIHOOD, Method

METHOD = Method("base_prior", order=5, label_prior=True, settings=LIKELIHOOD, default=False)
