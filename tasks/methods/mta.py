"""Merge-then-Adapt (arXiv 2511.20072): a LoRA merged from the bank, a tiny one stacked on it."""

from tasks.methods.method import Method

METHOD = Method("mta", order=50, merged=True, trained="stacking")
