"""Transforms of stacks of updates, one file each: what optimizers are chained from."""
