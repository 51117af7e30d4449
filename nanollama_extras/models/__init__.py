"""What model families need beyond the core decoder."""
