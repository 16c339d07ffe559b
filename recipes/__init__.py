"""Runnable stories: a script and its recorded result each."""
