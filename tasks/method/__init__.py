"""The arithmetic of the method: arrays in, arrays out; no files, no models, no orchestrator."""
