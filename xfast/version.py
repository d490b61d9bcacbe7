"""The one place that has the version; the package's metadata is made from it."""

__version__ = "0.1.0"
"""The version of xfast, as in records and data sets that it writes."""
