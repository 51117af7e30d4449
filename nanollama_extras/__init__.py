"""What plugs into nanollama.py: one folder for each seam, one module for each feature."""
