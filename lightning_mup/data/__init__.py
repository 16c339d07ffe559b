"""Token files, sources of text, and the data module that serves them in an order that can be resumed."""
