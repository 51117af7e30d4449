"""Checkpoint formats and vocabularies that are rarer than those of the core."""
