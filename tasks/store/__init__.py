"""Where results are kept: the store, in a folder or at a URL, and what keeps it whole.

`artifacts` is the store; `pieces` what it holds; `claims` who makes what just now; `remote` the
store at a URL, by `storage`; `checkpoints` what trainings go on from; `files` and `processes` what
all of these are made of.
"""
