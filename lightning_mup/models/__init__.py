"""Models in torch alone: they know nothing of parametrizations, which read them by names and shapes."""
