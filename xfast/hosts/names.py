"""Hosts by name: the catalogue, QEMU's and libvirt's models, CPUs as sold, cloud instance types.

All but the catalogue's names stand for what such a machine is taken to be, and their facts are
marked ``assumed``.

*Source*: Intel's and AMD's numbering of Xeon and EPYC. The instance types are common knowledge and
have not been checked row by row: the page to check a row against is named in it.
"""

from __future__ import annotations

import difflib
import re
from functools import lru_cache
from typing import NamedTuple

from xfast.hosts.baseline import common
from xfast.hosts.catalogue import catalogue
from xfast.hosts.derive import from_features
from xfast.hosts.model import Host
from xfast.hosts.models import model_named, models

NAME_LIMIT = 200
"""No name is longer than this (characters)."""

CPUS: tuple[tuple[str, str], ...] = (
    (r"e5-\d{4}[a-z]* v4|e7-\d{4}[a-z]* v4|d-15\d\d", "intel-broadwell"),
    (r"e[57]-\d{4}[a-z]* v3", "intel-haswell"),
    (r"e[57]-\d{4}[a-z]* v2", "intel-ivybridge"),
    (r"e5-\d{4}[a-z]*", "intel-sandybridge"),
    (r"[xel]56\d\d|e7-\d{4}", "intel-westmere"),
    (r"[xelw]55\d\d|[xel]75\d\d", "intel-nehalem"),
    (r"69\d\dp(?:-[a-z]+)?|6[57]\d\dp", "intel-graniterapids"),
    (r"(?:platinum|gold|silver|bronze|max) [3-9]5\d\d[a-z+]*", "intel-emeraldrapids"),
    (r"(?:platinum|gold|silver|bronze|max) [3-9]4\d\d[a-z+]*", "intel-sapphirerapids"),
    (r"(?:platinum|gold) [568]3\d\d(?:h|hl)", "intel-cooperlake"),
    (r"(?:platinum|gold|silver) [458]3\d\d[a-z]*|gold 63\d\d[a-z]*", "intel-icelake-server"),
    (r"(?:platinum|gold|silver|bronze) [3-9]2\d\d[a-z]*", "intel-cascadelake"),
    (r"(?:platinum|gold|silver|bronze) [3-8]1\d\d[a-z]*", "intel-skylake-server"),
    (r"epyc 7[0-9a-z]{2}1p?", "amd-naples"),
    (r"epyc 7[0-9a-z]{2}2p?|epyc 7[bv]12", "amd-rome"),
    (r"epyc 7[0-9a-z]{2}3[pvx]?|epyc 7[bcjr]13", "amd-milan"),
    (r"epyc [89][0-9a-z]{2}4[pfxsn]*|epyc 9[brv]14", "amd-genoa"),
    (r"epyc 9[0-9a-z]{2}5[pfn]*|epyc 9[brv]45", "amd-turin"),
)
"""A CPU's name as sold, in lower case, and the catalogue's entry for its generation; first wins.

Of Xeon Scalable the second digit is the generation; of EPYC it is the last one.
"""


class Instance(NamedTuple):
    """Types of cloud instance, and the catalogue's entries of the CPUs that they may run on.

    `source` is the provider's page to compare with.
    """

    pattern: str
    cpus: tuple[str, ...]
    source: str


AWS = "docs.aws.amazon.com/ec2/latest/instancetypes"
GCP = "cloud.google.com/compute/docs/cpu-platforms"
AZURE = "learn.microsoft.com/azure/virtual-machines/sizes/overview"
_SKX, _CLX, _ICX = "intel-skylake-server", "intel-cascadelake", "intel-icelake-server"
_SPR, _EMR, _GNR = "intel-sapphirerapids", "intel-emeraldrapids", "intel-graniterapids"

INSTANCES: tuple[Instance, ...] = (
    Instance(r"[cmr]3\..+|i2\..+", ("intel-ivybridge",), AWS),
    Instance(r"c4\..+|d2\..+", ("intel-haswell",), AWS),
    Instance(r"m4\..+", ("intel-haswell", "intel-broadwell"), AWS),
    Instance(r"r4\..+|i3\..+|t2\..+|x1e?\..+", ("intel-broadwell",), AWS),
    Instance(r"[cmr]5d?\..+|t3\..+|z1d\..+", (_SKX, _CLX), AWS),
    Instance(r"[cmr]5d?n\..+|i3en\..+|g4dn\..+|x2iezn\..+|m5zn\..+", (_CLX,), AWS),
    Instance(r"[cmrx](?:6i|2i)(?:d|n|dn|edn)?\..+|i4i\..+", (_ICX,), AWS),
    Instance(r"[cmr]7i(?:z|-flex)?\..+|i7i(?:e)?\..+", (_SPR,), AWS),
    Instance(r"[cmr]8i(?:d|n|-flex)?\..+", (_GNR,), AWS),
    Instance(r"[mr]5ad?\..+|t3a\..+", ("amd-naples",), AWS),
    Instance(r"c5ad?\..+|g4ad\..+", ("amd-rome",), AWS),
    Instance(r"[cmr]6a\..+", ("amd-milan",), AWS),
    Instance(r"[cmr]7a\..+", ("amd-genoa",), AWS),
    Instance(r"[cmr]8a\..+", ("amd-turin",), AWS),
    Instance(r"p3(?:dn)?\..+", ("intel-broadwell", _SKX), AWS),
    Instance(r"p4de?\..+", (_CLX,), AWS),
    Instance(r"g5\..+", ("amd-rome",), AWS),
    Instance(r"p5\..+|g6\..+|hpc6a\..+", ("amd-milan",), AWS),
    Instance(r"hpc6id\..+", (_ICX,), AWS),
    Instance(r"hpc7a\..+", ("amd-genoa",), AWS),
    Instance(r"u-\d+tb1\..+", (_SKX, _CLX), AWS),
    Instance(r"n1-.+", ("intel-sandybridge", "intel-haswell", "intel-broadwell", _SKX), GCP),
    Instance(r"e2-.+", ("intel-broadwell", _SKX, "amd-rome", "amd-milan"), GCP),
    Instance(r"c2-.+", (_CLX,), GCP),
    Instance(r"n2-.+", (_CLX, _ICX), GCP),
    Instance(r"n2d-.+", ("amd-rome", "amd-milan"), GCP),
    Instance(r"[ct]2d-.+", ("amd-milan",), GCP),
    Instance(r"c3-.+|h3-.+", (_SPR,), GCP),
    Instance(r"c3d-.+", ("amd-genoa",), GCP),
    Instance(r"c4-.+|n4-.+", (_EMR, _GNR), GCP),
    Instance(r"c4d-.+", ("amd-turin",), GCP),
    Instance(
        r"standard_[de]\d+s?_v3", ("intel-haswell", "intel-broadwell", _SKX, _CLX, _ICX), AZURE
    ),
    Instance(r"standard_f\d+s_v2", (_SKX, _CLX, _ICX), AZURE),
    Instance(r"standard_[de]\d+[ds]*_v4", (_ICX, _CLX), AZURE),
    Instance(r"standard_[de]\d+a[a-z]*_v4", ("amd-rome", "amd-milan"), AZURE),
    Instance(r"standard_[de]\d+[bdils]*_v5", (_ICX, _SPR, _EMR), AZURE),
    Instance(r"standard_[de]c?\d+a[a-z]*_v5", ("amd-milan", "amd-genoa"), AZURE),
    Instance(r"standard_[de]\d+[dils]*_v6", (_EMR,), AZURE),
    Instance(r"standard_[def]\d+a[a-z]*_v6", ("amd-genoa",), AZURE),
)  # fmt: skip
"""The first pattern that a name matches whole, in lower case."""


@lru_cache(maxsize=1024)
def named(name: str) -> Host | None:
    """Return the host that a name stands for, or None.

    Parameters
    ----------
    name : str
        A name of the catalogue, a model of QEMU or libvirt (``Skylake-Server-IBRS``), a CPU as
        sold (``Xeon Platinum 8259CL``), or a type of cloud instance (``m5.metal``).
    """
    if len(name) > NAME_LIMIT:
        return None
    return catalogue().get(name) or _of_model(name) or _of_cpu(name) or _of_instance(name)


def suggestions(name: str) -> list[str]:
    """Return the names that look most like `name`, best first; at most three."""
    known = {known.lower(): known for known in (*models(), *catalogue(), "this")}
    found = difflib.get_close_matches(name[:NAME_LIMIT].lower(), known, n=3, cutoff=0.6)
    return [known[close] for close in found]


def _of_model(name: str) -> Host | None:
    """Return a machine that gives exactly what a named model of QEMU or libvirt promises."""
    model = model_named(name)
    if model is None:
        return None
    family, number = model.signatures[0] if model.signatures else (None, None)
    host = from_features(
        model.given, name, model.source,
        vendor=model.vendor, family=family, model=number, how="assumed",
    )  # fmt: skip
    note = f"a machine that gives its guests what the CPU model {name} promises, and no more"
    return host.replace(notes=(note,), provenance=dict.fromkeys(host.provenance, "assumed"))


def _of_cpu(name: str) -> Host | None:
    """Return the catalogue's entry for the generation of a CPU as sold."""
    words = re.sub(r"\((?:r|tm)\)|\b(?:intel|amd|cpu|processor|xeon)\b|@.*", " ", name.lower())
    text = " ".join(words.split())
    for pattern, entry in CPUS:
        if re.match(rf"(?:{pattern})(?: |\Z)", text):
            return _assumed(name, (entry,), f"the generation of {name} by its number")
    return None


def _of_instance(name: str) -> Host | None:
    """Return what all CPUs have that a type of cloud instance may run on."""
    for pattern, cpus, source in INSTANCES:
        if re.fullmatch(pattern, name.lower()):
            return _assumed(name, cpus, f"table of instance types; compare {source}")
    return None


def _assumed(name: str, entries: tuple[str, ...], source: str) -> Host:
    """Return what the catalogue's `entries` have in common, under a name, all of it assumed."""
    hosts = [catalogue()[entry] for entry in entries]
    host = hosts[0] if len(hosts) == 1 else common(hosts)
    note = f"taken to be {' or '.join(entries)}, and to have what all of these have"
    if len(entries) == 1:
        note = f"taken to be {entries[0]}"
    return host.replace(
        name=name, source=source, notes=(note,),
        provenance=dict.fromkeys(host.provenance, "assumed"),
    )  # fmt: skip
