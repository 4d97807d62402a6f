"""MTA without its last step: only the LoRA that is merged from the bank (arXiv 2511.20072)."""

from tasks.methods.method import Method

METHOD = Method("merge_only", order=30, merged=True)
