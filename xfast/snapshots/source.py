"""Bytes of a file, each offset and length checked before use; compressed files read through."""
