"""Measurements as plain tables: coordinate checks, transfer of hyperparameters, and the pictures of them."""
