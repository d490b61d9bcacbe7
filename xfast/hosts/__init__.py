"""Hosts: where a snapshot may be restored, from files, names, or this machine."""

from __future__ import annotations

import os
from pathlib import Path

from xfast.errors import XfastError, printable
from xfast.hosts.model import Host
from xfast.kernels.behaviour import Behaviours, of_release

__all__ = ["Host", "expand", "load", "parse", "parse_kernel", "resolve", "resolve_all"]


def load(path: str | Path) -> list[Host]:
    """Return the hosts that a file describes; its kind is recognised by its content.

    A snapshot, a file or a directory, stands for the machine that wrote it.

    Raises
    ------
    FormatError
        If it is none of the kinds known, or damaged.
    XfastError
        If it is no regular file.
    OSError
        If it can't be read.
    """
    name = os.fspath(path)
    if not Path(name).is_file() and not is_snapshot_folder(name):
        raise XfastError(f"{name}: expected a host description, got no regular file")
    from xfast.hosts import readers

    return readers.load(name)


def is_snapshot_folder(path: str) -> bool:
    """Return whether a directory is one snapshot, and so tells of the machine that wrote it."""
    from xfast.hosts import snapshot

    return os.path.isdir(path) and snapshot.is_folder(path)


def parse(data: bytes, path: str = "host") -> list[Host]:
    """Return the hosts that `data` describes.

    Parameters
    ----------
    data : bytes
        Of any kind in `xfast.hosts.readers.READERS`; docs/hosts.md says what each tells.
    path : str
        For messages; the file's name without suffix is the host's name, unless the data has one.

    Raises
    ------
    FormatError
        If `data` is none of these, or damaged.
    """
    from xfast.hosts import readers

    return readers.parse(data, path)


def resolve_all(spec: str) -> list[Host]:
    """Return the hosts that a specification names.

    Parameters
    ----------
    spec : str
        ``BASE[+TEMPLATE][@KERNEL]``. BASE is ``this``, a file, or a name (of the catalogue, a
        CPU model, a CPU as sold, a cloud instance); TEMPLATE a Firecracker CPU template; KERNEL
        a release (``6.1.60``, assumed to behave as kernel.org's) or behaviour names, see
        `parse_kernel`. A file whose name has an ``@`` or ``+`` is found.

    Raises
    ------
    XfastError
        If there is no such host, or no such kernel; a FormatError if the file is bad.
    OSError
        If the file can't be read.
    """
    hosts = _find(spec)
    if hosts:
        return hosts
    base, at, kernel = spec.rpartition("@")
    hosts = _find(base) if at else []
    if not hosts:
        raise _no_such_host(spec, base if at else spec)
    behaviours = parse_kernel(kernel)
    return [host.with_kernel(behaviours).replace(name=f"{host.name}@{kernel}") for host in hosts]


def expand(spec: str) -> list[str]:
    """Return the specifications that one stands for: the files of a directory, else itself.

    ``DIRECTORY@KERNEL`` gives each of its descriptions that kernel. Hidden files and
    directories that are no snapshot are passed over.

    Raises
    ------
    OSError
        If the directory can't be read.
    """
    base, at, kernel = spec, "", ""
    if not Path(spec).is_dir():
        base, at, kernel = spec.rpartition("@")
    if not base or not Path(base).is_dir() or is_snapshot_folder(base):
        return [spec]
    entries = sorted(entry for entry in Path(base).iterdir() if not entry.name.startswith("."))
    files = (e for e in entries if not e.is_dir() or is_snapshot_folder(str(e)))
    return [f"{file}{at}{kernel}" for file in files]


def _no_such_host(spec: str, base: str) -> XfastError:
    """Return the error that says what a host may be, and what may have been meant."""
    from xfast.hosts.catalogue import catalogue
    from xfast.hosts.names import suggestions

    close = suggestions(base)
    if close:
        hint = f"did you mean {' or '.join(close)}?"
    else:
        hint = f"the catalogue has: {', '.join(catalogue())}"
    return XfastError(
        f"host: expected a file, a directory, 'this', or the name of a host, a CPU model, a CPU or "
        f"a cloud instance, got {spec!r:.80}; {hint}"
    )


def resolve(spec: str) -> Host:
    """Return the one host that a specification names; see `resolve_all`.

    Raises
    ------
    XfastError
        If there is no such host, or if the file describes several.
    """
    hosts = resolve_all(spec)
    if len(hosts) != 1:
        names = ", ".join(host.name for host in hosts)
        raise XfastError(f"host: expected one, got {len(hosts)} hosts in {spec} ({names})")
    return hosts[0]


def parse_kernel(text: str) -> Behaviours:
    """Return the kernel that `text` names.

    Parameters
    ----------
    text : str
        A release, behaviour names, or both, joined by commas: ``5.14,get-trims`` is 5.14 with
        one change back-ported.

    Raises
    ------
    XfastError
        If a word is neither.
    """
    words = text.split(",")
    releases = [word for word in words if word.removeprefix("v")[:1].isdigit()]
    try:
        if words == releases[:1]:
            return of_release(printable(text))
        names = frozenset(words) - frozenset(releases)
        return Behaviours(names.union(*(of_release(word).names for word in releases)))
    except ValueError as error:
        raise XfastError(
            f"kernel: expected a release such as 6.1.60, or behaviour names, got {text!r} ({error})"
        ) from None


def _find(spec: str) -> list[Host]:
    """Return the hosts that ``BASE[+TEMPLATE]`` names, or none."""
    hosts = _find_base(spec)
    base, plus, template = spec.rpartition("+")
    if hosts or not plus or not Path(template).is_file():
        return hosts
    from xfast.hosts.firecracker import apply_template

    return [apply_template(host, template) for host in _find_base(base)]


def _find_base(spec: str) -> list[Host]:
    """Return this machine, what a name stands for, or the hosts of a file."""
    if spec == "this":
        from xfast.hosts.this import this_host

        return [this_host()]
    from xfast.hosts.catalogue import catalogue

    if spec in catalogue():
        return [catalogue()[spec]]
    path = Path(spec)
    try:
        found = path.exists() and (not path.is_dir() or is_snapshot_folder(spec))
    except (OSError, ValueError):  # no file can have this name
        found = False
    if found:
        return load(path)
    from xfast.hosts.names import named

    host = named(spec)
    return [] if host is None else [host]
