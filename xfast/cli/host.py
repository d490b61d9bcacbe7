"""`xfast host show|dump|baseline`: descriptions of hosts for people, files and VMMs."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xfast.errors import XfastError
from xfast.hosts import resolve, resolve_all
from xfast.hosts.baseline import common, firecracker_template, qemu_cpu
from xfast.hosts.catalogue import catalogue
from xfast.hosts.description import SCHEMA, to_json
from xfast.hosts.model import Host
from xfast.xsave.cpuid import psabi_level
from xfast.xsave.features import AVX, XFEATURE_MASK_FPSSE, bits, name_of, names_of
from xfast.xsave.layout import recognise

SPEC_HELP = "HOST[+TEMPLATE][@KERNEL]: a catalogue name, a file, or 'this'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``xfast host``."""
    actions = parser.add_subparsers(dest="action", required=True)
    show = actions.add_parser("show", help="print hosts; without any, the catalogue")
    show.add_argument("spec", nargs="*", help=SPEC_HELP)
    show.add_argument("--json", action="store_true", help="print the descriptions as JSON")
    dump = actions.add_parser("dump", help="describe the running machine as JSON")
    dump.add_argument("-o", "--output", type=Path, help="write to this file, not to stdout")
    baseline = actions.add_parser("baseline", help="print what all hosts of a pool have")
    baseline.add_argument("spec", nargs="+", help=SPEC_HELP)
    formats = baseline.add_mutually_exclusive_group()
    formats.add_argument(
        "--format",
        choices=["table", "json", "qemu", "firecracker"],
        default="table",
        help="qemu: the -cpu argument alone; firecracker: a custom CPU template",
    )
    formats.add_argument(
        "--json", dest="format", action="store_const", const="json", help="--format json"
    )


def run(args: argparse.Namespace) -> int:
    """Run ``xfast host``; return the exit code."""
    answer = {"show": _show, "dump": _dump, "baseline": _baseline}[args.action](args)
    if args.action == "dump" and args.output:
        args.output.write_text(answer, encoding="utf-8")
    else:
        sys.stdout.write(answer)
    return 0


def _show(args: argparse.Namespace) -> str:
    hosts = [host for spec in args.spec for host in resolve_all(spec)]
    hosts = hosts or list(catalogue().values())
    if args.json:
        return to_json(hosts)
    if len(hosts) == 1:
        return _lines(details(hosts[0]))
    return _lines([("host", "layout", "guests may have", "kernel"), *map(summary, hosts)])


def _dump(_: argparse.Namespace) -> str:
    host = resolve("this")
    return to_json([host.replace(name=platform.node() or host.name, source="xfast host dump")])


def _baseline(args: argparse.Namespace) -> str:
    hosts = [host for spec in args.spec for host in resolve_all(spec)]
    if args.format == "firecracker":
        return json.dumps(firecracker_template(hosts), indent=2) + "\n"
    facts = baseline(hosts)
    if args.format == "json":
        return json.dumps({"schema": SCHEMA, "baseline": facts}, indent=1) + "\n"
    if args.format == "qemu":
        if facts["qemu_cpu"] is None:
            raise XfastError("host baseline: the features of some host are not known")
        return f"{facts['qemu_cpu']}\n"
    return _lines(
        [
            ("hosts", _words(facts["hosts"])),
            ("XCR0", facts["xcr0"] or UNKNOWN),
            ("components", _words(facts["components"])),
            ("elsewhere", _words(facts["moved"])),
            ("psABI", facts["psabi"] or UNKNOWN),
            ("features", _words(facts["features"])),
            ("QEMU", f"-cpu {facts['qemu_cpu']}" if facts["qemu_cpu"] else UNKNOWN),
        ]
    )


UNKNOWN = "unknown"


def _words(words: list[str] | None) -> str:
    return UNKNOWN if words is None else " ".join(words) or "none"


def baseline(hosts: Sequence[Host]) -> dict[str, Any]:
    """Return what a pool has in common, as plain values; None where a host leaves it open.

    ``moved`` names the components that all hosts have, but not all at the same place: raw areas
    that hold one must be converted between them.
    """
    level = common(hosts)
    open_fields = ("xcr0", "components", "moved", "features", "psabi", "qemu_cpu")
    answer: dict[str, Any] = {"hosts": [host.name for host in hosts]}
    answer |= dict.fromkeys((*open_fields, "firecracker_template"))
    if level.kvm_xcr0 is not None:
        answer["xcr0"] = hex(level.kvm_xcr0)
        answer["components"] = [name_of(nr) for nr in bits(level.kvm_xcr0)]
        if level.layout is not None:
            answer["moved"] = [name_of(nr) for nr in bits(level.kvm_xcr0 & ~level.layout.mask)]
    if level.features is not None:
        answer["features"] = sorted(level.features)
        answer["psabi"] = psabi_level(level.features)
        answer["qemu_cpu"] = qemu_cpu(level.features)
        if level.kvm_xcr0 is not None:
            answer["firecracker_template"] = firecracker_template(hosts)
    return answer


def summary(host: Host) -> tuple[str, ...]:
    """Return one row of a table of hosts."""
    kernel = host.kernel.release or "given" if host.kernel else UNKNOWN
    return host.name, _layout(host), _mask(host.kvm_xcr0), kernel


def details(host: Host) -> list[tuple[str, ...]]:
    """Return what is known of one host: rows of field, value, and how it is known."""
    kernel = host.kernel
    rows = {
        "vendor": host.vendor,
        "layout": _layout(host),
        "xcr0": _mask(host.xcr0),
        "xss": _mask(host.xss),
        "kvm_xcr0": _mask(host.kvm_xcr0),
        "guest_permission": _mask(host.guest_permission),
        "xsave2_size": host.xsave2_size,
        "mxcsr_mask": None if host.mxcsr_mask is None else hex(host.mxcsr_mask),
        "xsave": " ".join(sorted(host.xsave)),
        "kernel": kernel and " ".join((kernel.release, *sorted(kernel.names))).strip(),
        "features": host.features and " ".join(sorted(host.features)),
    }
    lines = [("name", host.name, ""), ("source", host.source or UNKNOWN, "")]
    for field, value in rows.items():
        shown = str(value) if value not in (None, "") else UNKNOWN
        lines.append((field, shown, host.provenance.get(field, "")))
    return [(field, f"{value}  [{how}]" if how else value) for field, value, how in lines]


def _layout(host: Host) -> str:
    if host.layout is None:
        return UNKNOWN
    if not host.layout.mask & ~(XFEATURE_MASK_FPSSE | AVX):
        return "as all CPUs"
    return recognise(host.layout) or "its own: " + " ".join(
        f"{name_of(s.nr)}@{s.offset}+{s.size}" for s in host.layout.slots if s.offset
    )


def _mask(mask: int | None) -> str:
    return UNKNOWN if mask is None else f"{mask:#x} {names_of(mask)}"


def _lines(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned columns, two blanks between them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = 0
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "".join(f"{line.rstrip()}\n" for line in padded)
