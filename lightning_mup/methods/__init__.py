"""Optimizers, one declaration a file; a new file here (or an entry point ``lightning_mup.methods``) is found by name."""
