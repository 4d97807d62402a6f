"""A user out of the store, MLflow and Prefect: `python -m tasks.forget --help`.

`user` does it and searches afterwards; `pieces` says which pieces go, `holding` whether a file
holds the user; `records` are MLflow's and Prefect's, `sources` the files the user came from.
"""
