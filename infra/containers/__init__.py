"""What runs inside the containers of `infra/compose.yaml` and `infra/kubernetes/`."""
