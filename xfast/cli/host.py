"""`xfast host show|dump|baseline|layout`: hosts for people, files and VMMs."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from xfast.cli.arguments import OK, UNJUDGED, epilog, hosts_of
from xfast.errors import XfastError, escape
from xfast.hosts import resolve
from xfast.hosts.baseline import common, firecracker_template, qemu_cpu
from xfast.hosts.catalogue import catalogue
from xfast.hosts.description import SCHEMA, to_json
from xfast.hosts.lint import warnings
from xfast.hosts.model import Host
from xfast.hosts.models import largest, models
from xfast.report.tally import Tally, counted
from xfast.store.staged import write_text
from xfast.xsave.cpuid import psabi_level
from xfast.xsave.features import (
    AVX,
    SUPERVISOR_MASK,
    XFEATURE_MASK_FPSSE,
    bits,
    name_of,
    names_of,
    parse_component,
)
from xfast.xsave.layout import PRESETS, Layout, recognise

if TYPE_CHECKING:
    from xfast.fleet.pool import Pool

SPEC_HELP = "HOST[+TEMPLATE][@KERNEL]: a name, a file, a directory of files, or 'this'"

EXAMPLES = {
    "show": ("xfast host show amd-milan@6.12", "xfast host show"),
    "dump": ("xfast host dump -o node7.json", "ssh node7 xfast host dump > node7.json"),
    "layout": ("xfast host layout 0x2e7", "xfast host layout avx+pkru --host amd-milan"),
    "baseline": (
        "xfast host baseline amd-milan amd-genoa",
        "xfast host baseline fleet.toml --format qemu",
        "xfast host baseline amd-milan amd-genoa --snapshots results/",
    ),
}
"""Commands that work, for each action's help."""

KINDS = """\
files read as hosts: what `xfast host dump` prints, in JSON or TOML; cpuid and
cpuid -r; an InstLatx64 dump; struct kvm_cpuid2; /proc/cpuinfo or lscpu, and
lscpu -J; a kernel's boot log; libvirt's XML (capabilities, domcapabilities,
dumpxml); QMP query-cpu-model-expansion; a Firecracker fingerprint; VBox.log;
xe host-cpu-info; CRIU's cpuinfo.img; any snapshot (the machine that wrote it).
names: xfast host show lists the catalogue; CPU models of QEMU and libvirt,
CPUs (Xeon Platinum 8259CL) and cloud instances (m5.metal) are known as well."""
"""What HOST can be, in the help of `show`; the tests hold it against the table of readers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``xfast host``."""
    parser.epilog = epilog(*EXAMPLES["show"][:1], *EXAMPLES["dump"][:1], *EXAMPLES["baseline"][:1])
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, help_text: str) -> argparse.ArgumentParser:
        return actions.add_parser(
            name,
            help=help_text,
            description=help_text[0].upper() + help_text[1:] + ".",
            epilog=epilog(*EXAMPLES[name], kinds=KINDS if name == "show" else ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    show = action("show", "print what is known of hosts; without any, list the catalogue")
    show.add_argument("spec", nargs="*", metavar="HOST", help=SPEC_HELP)
    show.add_argument("--json", action="store_true", help="print the descriptions as JSON")
    dump = action("dump", "describe the running machine as JSON")
    dump.add_argument("-o", "--output", metavar="FILE", help="new file (default: standard output)")
    layout = action("layout", "print where components lie, and which of them makes the size")
    layout.add_argument(
        "xcr0", metavar="MASK", help="XCR0, XCR0|XSS, or names: 0x2e7, '0x600e7|0x1800', avx+pkru"
    )
    layout.add_argument(
        "--host", metavar="HOST", help="on this host (default: in every known layout)"
    )
    baseline = action("baseline", "print what all hosts of a pool have in common")
    baseline.add_argument("spec", nargs="+", metavar="HOST", help=SPEC_HELP)
    formats = baseline.add_mutually_exclusive_group()
    formats.add_argument(
        "--format",
        choices=["table", "json", "qemu", "firecracker"],
        default="table",
        help="table for people (default), json, the -cpu argument alone (qemu), or a custom CPU "
        "template (firecracker)",
    )
    formats.add_argument(
        "--json", dest="format", action="store_const", const="json", help="same as --format json"
    )
    baseline.add_argument(
        "--snapshots",
        metavar="RESULTS",
        help="what xfast scan wrote for these hosts: say which snapshots stand in the pool's way",
    )


def run(args: argparse.Namespace) -> int:
    """Run ``xfast host``; return the exit code."""
    tally = Tally()
    actions = {"show": _show, "dump": _dump, "baseline": _baseline, "layout": _layout_of_mask}
    answer = actions[args.action](args, tally)
    if args.action == "dump" and args.output:
        write_text(args.output, answer)
    else:
        sys.stdout.write(answer)
    return UNJUDGED if tally.problems else OK


def _show(args: argparse.Namespace, tally: Tally) -> str:
    hosts = hosts_of(args.spec, tally)
    if args.spec and not hosts:
        raise XfastError(f"host show: expected a description in {args.spec[0]}, got none")
    hosts = hosts or list(catalogue().values())
    if args.json:
        return to_json(hosts)
    if len(hosts) == 1:
        return _lines(details(hosts[0]))
    return _lines([("host", "layout", "guests may have", "kernel"), *map(summary, hosts)])


def _dump(_: argparse.Namespace, __: Tally) -> str:
    host = resolve("this")
    return to_json([host.replace(name=platform.node() or host.name, source="xfast host dump")])


def _baseline(args: argparse.Namespace, tally: Tally) -> str:
    hosts = hosts_of(args.spec, tally)
    if tally.problems or not hosts:  # a pool without one of its hosts would promise too much
        raise XfastError("host baseline: expected every host of the pool to read, see above")
    if args.snapshots and args.format not in ("table", "json"):
        raise XfastError(f"--snapshots: expected --format table or json, got {args.format}")
    if args.format == "firecracker":
        return json.dumps(firecracker_template(hosts), indent=2) + "\n"
    facts = baseline(hosts)
    pool = None
    if args.snapshots:
        from xfast.fleet.pool import hold_against

        pool = hold_against(args.snapshots, [escape(host.name) for host in hosts])
        facts["snapshots"] = pool.as_json()
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
            ("named", _named(facts)),
            ("QEMU", f"-cpu {facts['qemu_cpu']}" if facts["qemu_cpu"] else UNKNOWN),
            *(_in_the_way(pool) if pool else ()),
        ]
    )


SHOWN = 3
"""How many names of snapshots a line has; the JSON has all."""


def _in_the_way(pool: Pool) -> Iterator[tuple[str, str]]:
    """Yield the rows that hold a scan's snapshots against the pool."""
    yield "snapshots", f"{pool.fit:,} of {pool.count:,} fit every host as they are"
    if pool.failed:
        yield "unjudged", f"{counted(pool.failed, 'input')} could not be judged"
    for one in pool.obstacles:
        more = len(one.names) - SHOWN
        names = ", ".join(one.names[:SHOWN]) + (f", and {more:,} more" if more > 0 else "")
        yield (
            one.remedy,
            f"{len(one.names):,} with {' '.join(one.causes)}, not for {' '.join(one.hosts)}: "
            f"{names}",
        )
    yield "then", _way_out(pool)


def _way_out(pool: Pool) -> str:
    """Return what makes the pool one, in a sentence."""
    fix, retire, unknown = (pool.held_by(word) for word in ("fix", "retire", "unknown"))
    steps = [f"fix {fix:,}"] if fix else []
    if retire:
        causes = sorted({c for one in pool.obstacles if one.remedy == "retire" for c in one.causes})
        steps.append(f"retire {' '.join(causes)} on {retire:,}")
    end = f"all but {unknown:,} unknown fit everywhere" if unknown else "all fit everywhere"
    answer = f"{' and '.join(steps)}, and {end}" if steps else end
    gains = {host: fit for host, fit in pool.without.items() if fit > pool.fit + fix}
    if gains and len(pool.hosts) > 1:
        host = max(gains, key=gains.__getitem__)
        answer += f"; without {host}, {gains[host]:,} of {pool.count:,} do"
    return answer


UNKNOWN = "unknown"


def _named(facts: dict[str, Any]) -> str:
    """Return the named model of a baseline, and what a guest with it goes without."""
    if facts["features"] is None:
        return UNKNOWN
    model = facts["qemu_model"]
    if model is None:
        return "none"
    without = set(facts["features"]) - models()[model].given
    return f"-cpu {model}" + (f"  (without {' '.join(sorted(without))})" if without else "")


def _layout_of_mask(args: argparse.Namespace, _: Tally) -> str:
    """Answer ``xfast host layout``."""
    mask = _parse_mask(args.xcr0)
    if args.host is not None:
        host = resolve(args.host)
        if host.layout is None:
            raise XfastError(f"host layout: {host.name} does not tell its layout")
        how = host.provenance.get("layout", "given")
        return _where(f"{host.name}, layout {how}", host.layout, mask)
    user = mask & ~SUPERVISOR_MASK
    known = {name: preset for name, preset in PRESETS.items() if not mask & ~preset.mask}
    if not known:
        raise XfastError(
            f"host layout: expected components that some CPU has together, got {names_of(user)}"
        )
    return "\n".join(_where(name, preset, mask) for name, preset in known.items())


def _parse_mask(text: str) -> int:
    """Return the mask that ``0x600e7|0x1800`` or ``avx+pkru`` stands for."""
    mask = 0
    for word in text.replace("|", "+").split("+"):
        word = word.strip()
        try:
            mask |= int(word, 0) if word[:1].isdigit() else 1 << parse_component(word)
        except ValueError:
            raise XfastError(
                f"host layout: expected a mask such as 0x2e7 or names such as avx+pkru, "
                f"got {word!r:.40}"
            ) from None
    if mask >> 63:
        raise XfastError(f"host layout: expected a mask below 2^63, got {mask:#x}")
    return mask


def _where(title: str, layout: Layout, mask: int) -> str:
    """Return where the components of `mask` lie in one layout, and what makes each size."""
    user, extended = mask & ~SUPERVISOR_MASK, mask & ~XFEATURE_MASK_FPSSE
    missing = extended & ~layout.mask
    if missing:
        raise XfastError(f"host layout: {title} has no {names_of(missing)}")
    compacted = layout.compacted_offsets(extended)
    rows: list[tuple[str, ...]] = [("component", "size", "standard", "compacted")]
    for nr in compacted:
        slot = layout.slot(nr)
        place = "-" if slot.supervisor else str(slot.offset)
        rows.append((f"  {nr} {name_of(nr)}", str(slot.size), place, str(compacted[nr])))
    standard_end = max(
        (slot for nr in bits(user & extended) if (slot := layout.slot(nr)).offset),
        key=lambda slot: slot.offset + slot.size, default=None,
    )  # fmt: skip
    last = f", by {name_of(standard_end.nr)}" if standard_end else ""
    also = f", by {name_of(max(compacted))}" if compacted else ""
    return f"{title}: {mask:#x} {names_of(mask)}\n" + _lines(rows) + _lines([
        ("standard", f"{layout.standard_size(user)} bytes{last}"),
        ("compacted", f"{layout.compacted_size(extended)} bytes{also}"),
    ])  # fmt: skip


def _words(words: list[str] | None) -> str:
    return UNKNOWN if words is None else " ".join(words) or "none"


def baseline(hosts: Sequence[Host]) -> dict[str, Any]:
    """Return what a pool has in common, as plain values; None where a host leaves it open.

    ``moved`` names the components that all hosts have, but not all at the same place: raw areas
    that hold one must be converted between them.
    """
    level = common(hosts)
    open_fields = ("xcr0", "components", "moved", "features", "psabi", "qemu_model", "qemu_cpu")
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
        model = largest(level.features, level.vendor)
        answer["qemu_model"] = model and model.name
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
        "x87_pointer_bits": host.x87_pointer_bits,
        "xsave": " ".join(sorted(host.xsave)),
        "kernel": kernel and " ".join((kernel.release, *sorted(kernel.names))).strip(),
        "features": host.features and " ".join(sorted(host.features)),
    }
    lines = [("name", host.name, ""), ("source", host.source or UNKNOWN, "")]
    for field, value in rows.items():
        shown = str(value) if value not in (None, "") else UNKNOWN
        lines.append((field, shown, host.provenance.get(field, "")))
    told: list[tuple[str, ...]] = [
        (field, f"{value}  [{how}]" if how else value) for field, value, how in lines
    ]
    told += [("note", note) for note in host.notes]
    told += [("warning", warning) for warning in warnings(host)]
    doubts: dict[str, list[str]] = {}
    for doubt in host.doubts:
        doubts.setdefault(doubt.remedy, []).append(f"{doubt.fact} is {doubt.how}")
    return told + [("uncertain", f"{', '.join(d)}: {r}") for r, d in doubts.items()]


def _layout(host: Host) -> str:
    if host.layout is None:
        return UNKNOWN
    lost = (host.xcr0 or 0) & ~host.layout.mask
    open_places = f"; place unknown: {names_of(lost)}" if lost else ""
    return _placed(host.layout) + open_places


def _placed(layout: Layout) -> str:
    if not layout.mask & ~(XFEATURE_MASK_FPSSE | AVX):
        return "as all CPUs"
    return recognise(layout) or "its own: " + " ".join(
        f"{name_of(s.nr)}@{s.offset}+{s.size}" for s in layout.slots if s.offset
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
