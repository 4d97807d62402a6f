"""`RunConfig` is what a run was asked for; stages see its `TaskConfig` and `MethodConfig`."""
