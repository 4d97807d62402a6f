"""The frozen base model, the same for everybody."""

from tasks.methods.method import Method


class BaseModel(Method):
    name = "base"
    order = 0


METHOD = BaseModel()
