"""OPPU, one PEFT per user (Tan et al. 2024, arXiv 2402.04401): a LoRA trained from scratch."""

from tasks.methods.method import Method

METHOD = Method("oppu", order=20, trained="oppu")
