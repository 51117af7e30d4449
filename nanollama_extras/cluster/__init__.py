"""A model in several processes or on several machines."""
