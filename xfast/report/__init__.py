"""Answers as text, JSON, CSV and Parquet."""
