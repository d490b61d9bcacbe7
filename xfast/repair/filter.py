"""A QEMU stream repaired on its way from one descriptor to another: a migration in flight.

Memory passes as it comes. The devices are held back until the description, which QEMU writes
last, tells where the vCPUs are. Two machines must never run, and one always has to:

- The source counts a migration as done when its last byte is in the pipe. So the verdict falls
  while the pipe can't hold what is still missing: the pipe is made as small as it gets, and the
  last bytes are read when the state is known to be safe. Whatever goes wrong before that breaks
  the pipe, and the VM goes on running where it is.
- The destination starts the VM at the EOF record. So that record passes only when the source has
  closed its end. If the source waits for the destination's answer instead (a return path), the
  two of them settle it, and nothing is waited for.

*Source*: QEMU migration/migration.c migration_completion(); migration/savevm.c
qemu_loadvm_state(); pipe(7), "Pipe capacity"; fcntl(2), F_SETPIPE_SZ.
"""

from __future__ import annotations

import fcntl
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xfast.engine.pipe import pass_memory, read_and_narrow, write_all
from xfast.errors import FormatError, PolicyError
from xfast.hosts.model import Host
from xfast.judge.verdict import Policy, Verdict
from xfast.repair.plan import Plan, plan_fix
from xfast.snapshots.bytes.source import Watch
from xfast.snapshots.model import Snapshot, Vcpu
from xfast.snapshots.qemu.cpu import INTEL
from xfast.snapshots.qemu.forward import CHUNK, Flow, bare_end
from xfast.snapshots.qemu.plans import Sections
from xfast.snapshots.qemu.reader import from_sections, splices
from xfast.snapshots.qemu.stream import find_cpus

SMALLEST_PIPE = 4096
DESCRIBED = b"\x06"
"""What follows the EOF record where a description does."""

SLACK = 4096
"""How much more than the pipe holds is still to come when the verdict falls (bytes)."""


@dataclass(frozen=True)
class Wanted:
    """What a filter is to do with the state that comes by: the parameters of `plan_fix`.

    Parameters
    ----------
    host : Host
    drop, even_if_live, policy
        As in `xfast.repair.plan.plan_fix`.
    change : bool
        Repair the state; else only judge it.
    refuse : bool
        End before the last byte if the host would refuse the state.
    """

    host: Host
    drop: Sequence[str] = ()
    even_if_live: bool = False
    policy: Policy | str = "xstate"
    change: bool = True
    refuse: bool = True


class Filter:
    """One stream on its way.

    Parameters
    ----------
    source, target : int
        Descriptors: where it comes from, and where it goes.
    wanted : Wanted
    watch : callable, optional

    Attributes
    ----------
    plan : Plan or None
        What was changed, or would have to be; None until the verdict falls.
    """

    def __init__(
        self, source: int, target: int, wanted: Wanted, watch: Watch | None = None
    ) -> None:
        self.source = source
        self.target = target
        self.wanted = wanted
        self.watch = watch
        self.flow = Flow("-")
        self.plan: Plan | None = None
        self.end = 0
        self.passed = 0
        self.held = self.pipe_size = self._pipe_size()

    def run(self) -> Plan:
        """Pass the stream through; return the plan, with the verdict on what was passed.

        Raises
        ------
        FormatError
            If it is no stream, can't be understood, or is cut off.
        PolicyError
            If the state can't be made safe for the host.
        OSError
            If a pipe breaks.
        """
        warm_up(self.wanted)
        with self.flow.kept:
            self._pass_memory()
            self._hold_devices()
            return self._finish()

    def _pass_memory(self) -> None:
        view = memoryview(bytearray(CHUNK))
        have = 0
        while count := self._read(view[have:]):
            have += count
            done = self.flow.push(view[:have])
            write_all(self.target, view[:done])
            have -= done
            view[:have] = bytes(view[done : done + have])
            if self.flow.hold is not None or self.flow.walker.head:
                break
        if self.flow.hold is None:
            have = self._pump(view, have)
        self.passed = self.flow.kept.size
        self._keep(view[:have])

    def _pump(self, view: memoryview, have: int) -> int:
        """Pass what remains of memory; return how many bytes of `view` lie behind it."""
        walker, small = self.flow.walker, SMALLEST_PIPE if self.pipe_size else 0
        have, narrow = pass_memory(
            walker, self.source, self.target, view, have, small, self.pipe_size, self.watch
        )
        self.held = small if narrow else self.pipe_size
        if not walker.stopped:
            place = walker.position + have
            words = "expected devices, got the end of the stream"
            raise FormatError(self.flow.kept.path, place, words)
        self.flow.push(view[:0])
        return have

    def _hold_devices(self) -> None:
        """Gather what follows memory, up to the stream's end; judge it as soon as that can be."""
        view = memoryview(bytearray(CHUNK))
        while True:
            self._judge_early()
            if self.end and self.flow.kept.size >= self.end and self._is_over():
                return
            count = self._read(view)
            if not count:
                return
            self._keep(view[:count])

    def _is_over(self) -> bool:
        """Tell whether nothing is to be waited for behind the stream's last byte."""
        return self.flow.walker.return_path or self.flow.kept.size > self.end

    def _judge_early(self) -> None:
        """Judge the state and pass the devices, but for the EOF record, once that can be told."""
        hold = self.flow.hold
        if self.plan is not None or hold is None or self.flow.kept.size <= hold.devices:
            return
        found = hold.early(self.held + SLACK)
        if found is None:
            return
        self.end, sections, eof = found
        self._judge(sections)
        self._pass(eof)

    def _finish(self) -> Plan:
        """Look at the whole of it once more, and let the destination have the rest."""
        kept, hold = self.flow.kept, self.flow.hold
        assert hold is not None
        if self.plan is None:
            found = hold.whole()
            if found is not None:
                self.end, sections = found
            else:
                self.end = bare_end(kept, hold.devices)
                if kept.read(self.end, min(1, kept.size - self.end)) == DESCRIBED:
                    self.end = kept.size + 1  # cut off within the description
                sections = find_cpus(kept.view(0, min(self.end, kept.size)))
            self._require_all()
            self._judge(sections)
        self._require_all()
        self._pass(self.end)
        assert self.plan is not None
        return self.plan

    def _require_all(self) -> None:
        """Raise FormatError if the stream was cut off."""
        kept = self.flow.kept
        if kept.size < self.end:
            raise FormatError(
                kept.path,
                kept.runs(kept.size - 1, 1)[0][0],
                f"expected at least {self.end - kept.size} bytes more, got the end of the stream",
            )

    def _judge(self, sections: Sections) -> None:
        """Plan the repair and put it into what is kept.

        Raises
        ------
        PolicyError
            If the host would refuse the result, or that can't be told, or it is not what was
            planned.
        """
        wanted, kept = self.wanted, self.flow.kept
        snapshot = from_sections(kept, sections)
        plan = plan_fix(
            snapshot,
            wanted.host,
            drop=wanted.drop,
            even_if_live=wanted.even_if_live,
            policy=wanted.policy,
        )
        self.plan = plan
        verdict = plan.after if wanted.change else plan.before
        if wanted.refuse:
            _require_restorable(plan, verdict)
        if not wanted.change or not plan.areas:
            return
        for edit in splices(kept, snapshot, plan.areas):
            kept.replace(kept.place_of(edit.offset), edit.new)
        self._require_written(plan, from_sections(kept, sections))

    def _require_written(self, plan: Plan, found: Snapshot) -> None:
        for i, (vcpu, now) in enumerate(zip(plan.snapshot.vcpus, found.vcpus, strict=True)):
            area = plan.areas.get(i, vcpu.area)
            shared = min(len(area), len(now.area))
            same = np.array_equal(now.area[:shared], area[:shared])
            if not same or now.area[shared:].any() or area[shared:].any():
                raise PolicyError(f"-: vCPU {vcpu.index}: the stream can't hold the plan")

    def _keep(self, data: memoryview) -> None:
        self.flow.keep(data)
        if not self.wanted.refuse:
            self._pass(self.flow.kept.size)

    def _pass(self, end: int) -> None:
        """Write what is kept up to `end`, as far as it was not written yet."""
        end = min(end, self.flow.kept.size)
        while self.passed < end:
            size = min(CHUNK, end - self.passed)
            write_all(self.target, self.flow.kept.read(self.passed, size))
            self.passed += size

    def _read(self, view: memoryview) -> int:
        """Read what is there, and let the pipe hold as little as it can behind it.

        So its writer can't be done before the verdict. Where the writer was faster, the verdict
        needs that much more to come; a description of less than the pipe may then be too short.
        """
        if self.watch is not None:
            self.watch(self.source, self.flow.walker.position)
        if self.held == SMALLEST_PIPE:
            view = view[:SMALLEST_PIPE]
        small = SMALLEST_PIPE if self.pipe_size else 0
        count, narrow = read_and_narrow(self.source, view, small)
        self.held = small if narrow else self.pipe_size
        return count

    def _pipe_size(self) -> int:
        try:
            return fcntl.fcntl(self.source, fcntl.F_GETPIPE_SZ)
        except OSError:  # a file or a socket
            return 0


def warm_up(wanted: Wanted) -> None:
    """Plan for a vCPU of no one's, so that nothing is done for the first time when a VM waits."""
    vcpu = Vcpu(
        0, np.zeros(INTEL.standard_size(7), np.uint8), INTEL, "format", portable=True, xcr0=7
    )
    plan_fix(Snapshot("-", "qemu", "vm", "qemu-kvm", [vcpu]), wanted.host, policy=wanted.policy)


def _require_restorable(plan: Plan, verdict: Verdict) -> None:
    """Raise PolicyError unless the host is known to take the state."""
    if verdict is plan.after:
        plan.require_restorable()
    for finding in verdict.findings:
        if finding.severity == "blocks" or finding.open:
            blocks = finding.severity == "blocks"
            words = "would refuse it" if blocks else "can't be told to take it"
            raise PolicyError(
                f"{plan.snapshot.path}: {plan.host.name} {words}: vCPU {finding.vcpu}: "
                f"{finding.code}: {finding.why}"
            )
