"""The LaMP benchmark: task definitions, file formats, authors, prompts, metrics, synthetic users.

Knows polars and numpy; knows nothing of torch, Prefect or MLflow, nor of `tasks.lora`.
"""
