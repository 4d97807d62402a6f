"""What a run would take, before it is paid for: `dry_run` (docs/method.md, Dry run).

`run` lets the flow run with a planner in place of the stages (`stages`). `model` is what can be
known of the model without its weights, `lengths` the data in tokens, `work` the costs of one piece
of work, `text` how it is told.
"""
