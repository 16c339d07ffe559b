"""Parametrizations, one file each; a new file here (or an entry point ``lightning_mup.rules``) is found by name."""
