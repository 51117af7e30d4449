"""Dialects of the server beyond chat and text completions."""
