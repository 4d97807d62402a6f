"""A user out of the store, MLflow and Prefect: `mta forget --help`.

`user` does it and searches afterwards; `closure` says what of the store goes, `holding` whether a
file holds the user; `mlflow_records` and `prefect_records` are what these servers keep, `sources`
the files the user came from.
"""
