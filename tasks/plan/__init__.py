"""What a run would take, before it is paid for: `dry_run` (docs/method.md, Dry run)."""
