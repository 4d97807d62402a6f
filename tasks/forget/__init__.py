"""A user out of the store, MLflow and Prefect (`mta forget --help`); begin at `user.py`."""
