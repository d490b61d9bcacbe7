"""The shipped catalogue of common CPU types: `catalogue.toml`, in the schema of every host.

Its facts were distilled from public CPUID dumps by `docs/make_catalogue.py`; each entry names
its source. A catalogue entry has no kernel: say ``NAME@RELEASE``.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from xfast.hosts.description import read_toml
from xfast.hosts.model import Host

FILE = Path(__file__).with_name("catalogue.toml")


@cache
def catalogue() -> dict[str, Host]:
    """Return {name: Host}, read from the package's file at the first call."""
    return {host.name: host for host in read_toml(FILE.read_text("utf-8"), FILE.name)}
