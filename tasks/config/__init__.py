"""The configuration: options (options.py), presets, and three types in a row.

`RunConfig` is what was asked (run.py), `TaskConfig` one LaMP task under one seed, `MethodConfig`
what one method sees of it (task.py). Only the last two reach the stages.
"""
