"""Launch files for clusters, and what to expect of them."""
