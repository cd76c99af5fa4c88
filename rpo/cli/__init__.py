"""The `rpo` command."""
