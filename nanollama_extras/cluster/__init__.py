"""Engines on several machines, with Ray."""
