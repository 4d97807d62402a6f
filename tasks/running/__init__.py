"""Where jobs run, what happens when one fails, and how far they are.

`runner` chooses: threads, processes or Ray (`ray_runner`), by what the `machine` has.
`faults` says which errors pass, `progress` shows how far work is.
"""
