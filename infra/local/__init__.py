"""The local stack: a Prefect server, an MLflow server and one worker on this machine."""
