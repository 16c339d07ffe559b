"""Weight-decay policies, one file each; a new file here, or an entry point of this name, is found by itself."""
