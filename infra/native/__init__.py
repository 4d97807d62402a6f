"""PostgreSQL and an S3-compatible server, started natively: what `infra/compose.yaml` has in
containers, for machines that have none."""
