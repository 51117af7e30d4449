"""Backends: faster arithmetic for the decoder."""
