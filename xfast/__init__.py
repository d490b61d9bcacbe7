"""xfast."""
