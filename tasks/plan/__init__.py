"""What a run would take, before it is paid for: `dry_run` (docs/method.md, Dry run).

`model` is what can be known of the model without its weights, `lengths` the data in tokens, `work`
the costs of one stage, `stages` which stages there are, `text` how it is told.
"""
