"""The sentences of findings, in one table: first what happens, then why.

`say` fills in the values. ``{what}`` is a component and what it holds: "pkru (value 0x0)".
"""

from __future__ import annotations

SENTENCES = {
    # LEAK
    "leak": "{what} is in XSTATE_BV, and the guest's {source} allows {may:#x} only",
    "leak, unknown guest": "{what} is in XSTATE_BV: bit 9 with value 0 is the signature of Linux "
    "5.16's leak",
    "leak, signature": " (bit 9 with value 0 is the signature of Linux 5.16's leak)",
    "leak, host lacks it": "KVM_SET_XSAVE fails with EINVAL: {leak}, and the host lacks it",
    "leak, kernel refuses": "KVM_SET_XSAVE fails with EINVAL: {leak}, and this kernel, with "
    "ad856280ddea, refuses what the guest may not have",
    "leak, qemu": ". QEMU 7.2 reports the restore as done and loses x87, SSE, AVX and XCR0; later "
    "QEMU exits",
    "leak, doubtful": "KVM_SET_XSAVE may fail with EINVAL: {leak}. Kernels from ad856280ddea "
    "(5.17) until 8647c52e9504 (6.6) refuse it unless the guest's CPUID has it, others accept it; "
    "{missing} is not known",
    "leak, kept": "The host accepts it and hands it on with the next KVM_GET_XSAVE: {leak}",
    "leak, trimmed": "The host accepts it and drops it at the next KVM_GET_XSAVE{unless}: {leak}",
    # HOST-MISSING
    "host unknown": "Nothing can be said for certain: which components this host can give is not "
    "known. Describe it with its CPUID leaf 0xD",
    "host lacks it": "KVM_SET_XSAVE fails with EINVAL: {what} is in the area, and the host lacks "
    "it",
    "process, host lacks it": "The process can't get {what} back: it is in the area, and the host "
    "lacks it",
    "process, host lacks init": "Nothing is lost, although the host lacks {what}, which is in the "
    "area",
    "promised": "Nothing is lost yet: the guest's CPUID promises {name}, which the host lacks, and "
    "it is not in use",
    "process was told": "The process may meet SIGILL: the machine that it was started on has "
    "{name}, by which programs choose their instructions once, and the host lacks it",
    # XCR0
    "xcr0": "KVM_SET_XCRS fails with EINVAL: the guest's XCR0 is {xcr0:#x}, and {whose} allows "
    "{allowed:#x} ({fault})",
    "cr4": "KVM_SET_SREGS fails with EINVAL, before any other call: the guest's CR4 has {bit}, and "
    "the host lacks {lacks}",
    "half of AMX": "The guest may fault when it sets XCR0: its CPUID announces {has} without "
    "{lacks}, as Linux 5.17 to 6.3 offer AMX to a VMM without permission for tile data",
    # SIZE
    "cut": "{name} can't be restored: XSTATE_BV names it, and its data would lie past the area's "
    "{size} bytes",
    "room unknown": "The area needs {need} bytes: KVM_CAP_XSAVE2 of the host must report at least "
    "that",
    "no room": "KVM_SET_XSAVE can't take the area: it needs {need} bytes, and the host's "
    "KVM_CAP_XSAVE2 reports {room}",
    "buffers": "The process may write past the end of its buffers: it was told of XSAVE areas of "
    "{here} bytes, and the target writes {there}",
    # LAYOUT
    "layout unknown": "Nothing can be said for certain: the layout of the {whose} is not known "
    "({note}); --layout names it",
    "place unknown": "Nothing can be said for certain: where {names} lies in the area is not known "
    "({note}); --layout names it",
    "place unknown on the host": "Nothing can be said for certain: the host's description does not "
    "say where {names} lies",
    "moved": "KVM_SET_XSAVE would take other bytes for {what}, without an error: it lies at {here} "
    "and the target reads it at {there}",
    # FORMAT
    "xcomp": "KVM_SET_XSAVE fails with EINVAL: XCOMP_BV is {xcomp:#x}{compacted}, and kernels from "
    "5.16 refuse all but the standard format",
    "xcomp, misread": "KVM_SET_XSAVE takes other bytes for the components, without an error: "
    "XCOMP_BV is {xcomp:#x}{compacted}, and this kernel, older than 5.16, reads the standard "
    "format only",
    "xcomp, ignored": "This kernel, older than 5.16, ignores it: XCOMP_BV is {xcomp:#x}",
    "xcomp, doubtful": "KVM_SET_XSAVE may fail with EINVAL: XCOMP_BV is {xcomp:#x}{compacted}, and "
    "kernels from 5.16 refuse that",
    "reserved": "KVM_SET_XSAVE fails with EINVAL: reserved bytes of the XSAVE header (528 to 575) "
    "are not zero, which kernels from 5.16 refuse",
    "reserved, doubtful": "KVM_SET_XSAVE may fail with EINVAL: reserved bytes of the XSAVE header "
    "(528 to 575) are not zero, which kernels from 5.16 refuse",
    "reserved, ignored": "This kernel, older than 5.16, ignores it: reserved bytes of the XSAVE "
    "header (528 to 575) are not zero",
    # INUSE
    "stale": "Whoever restores the area gives {name} its init value, and the other data that lie "
    "there are lost: XSTATE_BV says that they are not {name}'s",
    "two copies": "The file's fpu object wins, as the two differ in {fields}: a "
    "restore runs KVM_SET_FPU after KVM_SET_XSAVE. MXCSR is the XSAVE area's, as KVM_SET_FPU "
    "leaves it alone",
    "idle": "A host without {name} needs only its bit cleared: it is in XSTATE_BV and holds "
    "{holds}",
    # XFD
    "xfd panics": "The host panics when it runs the guest: {what} is in XSTATE_BV while IA32_XFD "
    "disables it, XRSTOR takes #NM, and this kernel lacks b45f72177594",
    "xfd, doubtful": "The host may panic when it runs the guest: {what} is in XSTATE_BV while "
    "IA32_XFD disables it, XRSTOR takes #NM, and a kernel without b45f72177594 panics",
    "xfd cleared": "The host clears the bit: {what} is in XSTATE_BV while IA32_XFD disables it, "
    "and this kernel has b45f72177594",
    # XSS
    "supervisor": "KVM_SET_XSAVE fails with EINVAL: XSTATE_BV names supervisor state ({names})",
    "xss": "KVM_SET_MSRS can't set IA32_XSS: the guest's has {names}, which the host can't give it",
    "xss absent": "The guest's own XRSTORS may fault after the restore: its CPUID has supervisor "
    "components ({names}), and the file holds no IA32_XSS (MSR 0xda0)",
    # PERM
    "ask for tiles": "KVM_SET_CPUID2 fails with EPERM unless the VMM asks first: AMX tile data "
    "need ARCH_REQ_XCOMP_GUEST_PERM",
    "no tiles": "KVM_SET_CPUID2 fails with EPERM: the guest has AMX tile data, and the host's "
    "kernel can't grant them to guests",
    # KERNEL
    "kernel refuses": "KVM_SET_XSAVE fails with EINVAL: {what} is in the area, and this kernel "
    "refuses what the guest's CPUID does not have",
    "kernel may refuse": "KVM_SET_XSAVE may fail with EINVAL: kernels from ad856280ddea (5.17) "
    "until {until} refuse {name} where the guest's CPUID lacks it",
    # MXCSR
    "mxcsr": "KVM_SET_XSAVE fails with EINVAL: MXCSR {mxcsr:#x} has bits {foreign:#x} outside the "
    "host's MXCSR_MASK{mode}",
    "mxcsr, doubtful": "KVM_SET_XSAVE may fail with EINVAL: MXCSR {mxcsr:#x} has bits {foreign:#x} "
    "outside the host's MXCSR_MASK{mode}",
    # ISA
    "instructions": "Programs may meet SIGILL: the guest's CPUID has instructions that the host "
    "lacks ({names})",
    "process instructions": "The process may meet SIGILL: the machine that it was started on has "
    "instructions that the host lacks ({names})",
    # PARTIAL
    "partial": "The answer may not be about all of it: {doubt}",
}


def say(sentence: str, **values: object) -> str:
    """Return one of SENTENCES, with `values` filled in."""
    return SENTENCES[sentence].format(**values)
