"""Where jobs run, and how far they are.

`runner` chooses: threads, processes or Ray (`ray_runner`), by what the `machine` has. `slots` is the
limit of jobs that run a model at once, `progress` shows how far work is.
"""
