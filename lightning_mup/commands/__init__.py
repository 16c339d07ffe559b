"""Commands of ``lightning-mup``, one file each."""
