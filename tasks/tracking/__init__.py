"""The run in MLflow: what is logged (`runs`), kept until MLflow took it (`spool`, `replay`)."""
