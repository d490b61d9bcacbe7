"""Named CPU models of QEMU and libvirt: what each promises a guest, and the names of features.

Where libvirt is installed, its own CPU map is asked first; `models.toml` answers for the rest.

*Source*: libvirt src/cpu_map; QEMU target/i386/cpu.c builtin_x86_defs, feature_word_info (names);
x86-64 psABI table 3.1 (the models named after its levels, as Proxmox VE has them).
"""

from __future__ import annotations

import re
import tomllib
from functools import cache
from itertools import accumulate
from operator import or_
from pathlib import Path
from typing import NamedTuple

from xfast.errors import FormatError
from xfast.hosts.xml import elements
from xfast.xsave.cpuid import FEATURES, PSABI_LEVELS

FILE = Path(__file__).with_name("models.toml")
MAP = Path("/usr/share/libvirt/cpu_map")

QEMU_NAMES: dict[str, str] = {
    "apx_f": "apxf",
    "avx512_bitalg": "avx512bitalg",
    "avx512_vbmi2": "avx512vbmi2",
    "avx512_vnni": "avx512vnni",
    "ibt": "cet-ibt",
    "sse4_1": "sse4.1",
    "sse4_2": "sse4.2",
    "tsxldtrk": "tsx-ldtrk",
    "user_shstk": "cet-ss",
}
"""QEMU's names, where they are not the kernel's with a hyphen for each underscore."""

_ALIASES = {
    "pclmuldq": "pclmulqdq",
    "sse3": "pni",
    "sse4-1": "sse4_1",
    "sse4-2": "sse4_2",
    "xd": "nx",
    "i64": "lm",
    "lzcnt": "abm",
    "ffxsr": "fxsr_opt",
    "ds-cpl": "ds_cpl",
}
"""Other names that libvirt, QEMU and VMMs of their kind have for features."""

_KERNEL_NAMES = {
    **{name: name for name in FEATURES},
    **{name.replace("_", "-"): name for name in FEATURES},
    **{theirs: name for name, theirs in QEMU_NAMES.items()},
    **_ALIASES,
}

_VENDORS = {"Intel": "GenuineIntel", "AMD": "AuthenticAMD", "Hygon": "HygonGenuine"}
"""libvirt's names of vendors. *Source*: libvirt src/cpu_map/x86_vendors.xml."""


class Model(NamedTuple):
    """A named CPU model.

    `signatures` are the (family, model) of the CPUs that it stands for. `features` are what
    libvirt means by the name: its documents list what a guest has more or less. `qemu` is what
    QEMU's own definition has more (``+name``) or less (``-name``).
    """

    name: str
    vendor: str | None
    signatures: tuple[tuple[int, int], ...]
    features: frozenset[str]
    source: str
    qemu: str = ""

    @property
    def given(self) -> frozenset[str]:
        """What QEMU gives a guest with ``-cpu NAME``."""
        words = self.qemu.split()
        more = {word[1:] for word in words if word[0] == "+"}
        return self.features.union(more) - {word[1:] for word in words if word[0] == "-"}


def kernel_name(feature: str) -> str | None:
    """Return /proc/cpuinfo's name of a feature of QEMU or libvirt; None for one not in FEATURES."""
    return _KERNEL_NAMES.get(feature)


def qemu_name(feature: str) -> str:
    """Return QEMU's name of a feature of /proc/cpuinfo."""
    return QEMU_NAMES.get(feature, feature.replace("_", "-"))


def vendor_text(name: str | None) -> str | None:
    """Return CPUID's vendor text for libvirt's name of a vendor; others stay as they are."""
    return _VENDORS.get(name or "", name)


def read_map(folder: Path, source: str) -> dict[str, Model]:
    """Return the x86 models of a libvirt CPU map, {name: Model}, of the files that read.

    A ``<model>`` in a ``<model>`` hands its features down.
    """
    models: dict[str, Model] = {}
    for path in sorted(folder.glob("x86_*.xml")):
        try:
            found = elements(path.read_text("utf-8", "replace"), str(path))
            for model in _models_in(found, models, source):
                models[model.name] = model
        except (OSError, FormatError):
            continue
    return models


def _models_in(
    found: list[tuple[tuple[str, ...], dict[str, str]]], known: dict[str, Model], source: str
) -> list[Model]:
    """Return the models in one file of the map."""
    models: list[Model] = []
    for path, attributes in found:
        name = attributes.get("name", "")
        if path == ("cpus", "model"):
            models.append(Model(name, None, (), frozenset(), source))
        elif models and path[:2] == ("cpus", "model"):
            models[-1] = _extended(models[-1], path[2], attributes, known)
    return models


def _extended(model: Model, tag: str, attributes: dict[str, str], known: dict[str, Model]) -> Model:
    """Return a model with what one element of its definition says."""
    name = attributes.get("name", "")
    if tag == "vendor":
        return model._replace(vendor=vendor_text(name))
    if tag == "model" and name in known:
        return model._replace(features=model.features | known[name].features)
    if tag == "signature":
        numbers = [attributes.get(key, "") for key in ("family", "model")]
        if all(number.isdecimal() and len(number) < 5 for number in numbers):
            signature = int(numbers[0]), int(numbers[1])
            return model._replace(signatures=(*model.signatures, signature))
    feature = kernel_name(name) if tag == "feature" else None
    if feature and attributes.get("removed") != "yes":
        return model._replace(features=model.features | {feature})
    return model


def _psabi() -> dict[str, Model]:
    """Return the models named after psABI levels, and the one with AES between them."""
    levels = dict(zip(PSABI_LEVELS, accumulate(PSABI_LEVELS.values(), or_), strict=True))
    levels["x86-64-v2-AES"] = levels["x86-64-v2"] | {"aes"}
    source = "x86-64 psABI table 3.1"
    return {n: Model(n, None, (), f, source) for n, f in levels.items() if n != "x86-64"}


@cache
def models(folder: Path = MAP) -> dict[str, Model]:
    """Return every model known, {name: Model}: the table's, then those of the map in `folder`."""
    found = _psabi()
    for row in tomllib.loads(FILE.read_text("utf-8"))["models"]:
        signatures = tuple((family, model) for family, model in row.get("signatures", ()))
        features = frozenset(row["features"].split())
        found[row["name"]] = Model(
            row["name"], row.get("vendor"), signatures, features, row["source"], row.get("qemu", "")
        )
    installed = read_map(folder, "libvirt's cpu map")
    for name, model in installed.items():
        if name in found:  # which QEMU gives what is not libvirt's to say
            change = difference(model.features, found[name].given)
            installed[name] = model._replace(qemu=change)
    return found | installed


def difference(one: frozenset[str], two: frozenset[str]) -> str:
    """Return what makes features `one` into `two`: ``+more -less``."""
    return " ".join([*(f"+{f}" for f in sorted(two - one)), *(f"-{f}" for f in sorted(one - two))])


_VERSION = re.compile(r"(?<!64)-v\d{1,2}\Z")
"""QEMU's version of a model; x86-64-v3 is none."""


def model_named(name: str) -> Model | None:
    """Return the model called `name`, or None.

    A version that is not in the table (``EPYC-Milan-v9``) is the model itself: what QEMU's
    versions add or take away is mostly for mitigations. Its `source` says so.
    """
    known = models()
    found = known.get(name)
    base = _VERSION.sub("", name)
    if found is None and base in known:
        found = known[base]._replace(name=name, source=f"{known[base].source}, as {base}")
    return found


def largest(features: frozenset[str], vendor: str | None) -> Model | None:
    """Return the named model with the most features that is within `features`.

    What QEMU gives is what counts. A model of another vendor is no candidate; where `vendor` is
    None (a mixed pool), only those of no vendor are. Of equals, the one with the shortest name:
    its siblings differ in mitigations, which are not judged here.
    """
    fitting = [
        model
        for model in models().values()
        if model.given <= features
        and model.vendor in (None, vendor)
        and "lm" in model.given
        and not _VERSION.search(model.name)
    ]
    return max(fitting, key=lambda m: (len(m.given), -len(m.name), m.name), default=None)
