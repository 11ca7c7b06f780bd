"""Experiments: one file each, `get_config()` returns a RunConfig."""
