"""The frozen base model, the same for everybody."""

from tasks.methods.method import Method

METHOD = Method("base", order=0)
