"""A plan in a plain PyTorch loop, without a Trainer."""
