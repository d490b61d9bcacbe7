"""The rules, and a verdict for each pair of snapshot and host."""
