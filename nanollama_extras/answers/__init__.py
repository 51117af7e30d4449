"""What an answer may be beyond thoughts and text."""
