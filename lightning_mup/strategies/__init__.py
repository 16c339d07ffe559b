"""Strategies: how parametrization and preconditioning run across ranks; registered by name when this is imported."""
