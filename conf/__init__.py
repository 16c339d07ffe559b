"""The Hydra configuration tree, shipped as ``lightning_mup.conf``."""
