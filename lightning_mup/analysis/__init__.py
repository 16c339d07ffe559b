"""Measurements as plain tables: coordinate checks, and the pictures of them."""
