"""Subcommands beyond those that manage models."""
