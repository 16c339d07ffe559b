"""A Hydra program of somebody else, for tests of sweeps and launchers."""
