"""`RunConfig` is what was asked; `TaskConfig` and `MethodConfig` of it are what stages see."""
