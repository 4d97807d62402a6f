"""MTA's last step alone: the tiny LoRA, trained on the bare base model."""

from tasks.methods.method import Method

METHOD = Method("stack_only", order=40, trained="stacking")
