"""PostgreSQL and an S3-compatible server without containers: what `infra/compose.yaml` has."""
