"""The rule table: every reason for which a restore is refused or unsafe, and what it rests on.

Codes are stable: scripts key on them, and people paste them into ``xfast explain``.
"""

from __future__ import annotations

from typing import NamedTuple

SEVERITIES = ("note", "risky", "blocks")
"""How much a finding weighs, lightest first."""

FIXES = ("safe", "lossy", "none")
"""What ``xfast fix`` can do about a finding: nothing lost; live data lost; nothing."""


MENDS = ("drop", "move", "clean", "trim", "")
"""How ``xfast fix`` mends a finding: it drops the component, moves it to the target's place,
cleans the header, or drops tiles and cuts the area to what the target takes; or not at all."""


CALLS = ("KVM_SET_CPUID2", "KVM_SET_SREGS", "KVM_SET_XSAVE", "KVM_SET_XCRS", "KVM_SET_MSRS")
"""The calls of KVM that carry extended state, in the order in which VMMs make them.

*Source*: `xfast.judge.vmm`.
"""


class Rule(NamedTuple):
    """One rule: what it says, why it exists, the source, and what programs do about it.

    `call` is the call of KVM that refuses what a finding that blocks is about, empty where none
    does; `mends` is one of MENDS, and `mends_notes` says that ``xfast fix`` mends even what is
    only a note.
    """

    code: str
    title: str
    text: str
    ref: str
    next: str
    call: str = ""
    mends: str = ""
    mends_notes: bool = False

    @property
    def refuses_set(self) -> bool:
        """Whether KVM_SET_XSAVE itself refuses the area."""
        return self.call == "KVM_SET_XSAVE"


_TABLE = (
    Rule(
        "LEAK",
        "state that the guest may not have",
        "XSTATE_BV names a component that the guest's CPUID or XCR0 does not allow. Linux 5.16 "
        "let the host's PKRU into guests that have none: bit 9 set, value 0. Kernels from "
        "ad856280ddea until 8647c52e9504 refuse such an area with EINVAL, and so does every "
        "kernel on a CPU without the component; QEMU 7.2 ignores the error and runs the guest "
        "with its x87, SSE and AVX state lost.",
        'Linux kernel commit ad856280ddea ("x86/kvm/fpu: Limit guest user_xfeatures to '
        'supported bits of XCR0") (in v5.17)',
        "xfast fix clears the bit. A KVM_SET_XSAVE without the PKRU bit leaves the vCPU's PKRU "
        "as it was; it does not reset it.",
        call="KVM_SET_XSAVE",
        mends="drop",
        mends_notes=True,
    ),
    Rule(
        "HOST-MISSING",
        "a component that the target lacks",
        "The snapshot carries state of a component that the target's CPU or KVM does not have. "
        "KVM_SET_XSAVE refuses the area with EINVAL if the bit is set, whatever the data.",
        "Linux arch/x86/kvm/x86.c kvm_vcpu_ioctl_x86_set_xsave(); kvm_caps.supported_xcr0",
        "Choose a host that has the component. Where it holds only its init value, xfast fix "
        "clears the bit and nothing is lost.",
        call="KVM_SET_XSAVE",
        mends="drop",
        mends_notes=True,
    ),
    Rule(
        "XCR0",
        "the guest's XCR0 can't be set on the target",
        "The guest has enabled components (XCR0) that the target cannot give it, or in a "
        "combination that the CPU forbids: KVM_SET_XCRS answers EINVAL. Where the host has no PKU "
        "or no XSAVE at all, KVM_SET_SREGS comes first, and refuses CR4.PKE or CR4.OSXSAVE.",
        "Linux arch/x86/kvm/x86.c __kvm_set_xcr(); Intel SDM vol. 1 section 13.3",
        "Choose a host that has the components. The guest itself uses them; no edit of the file "
        "makes it forget them.",
        call="KVM_SET_XCRS",
    ),
    Rule(
        "SIZE",
        "an area larger, or smaller, than its consumer needs",
        "KVM_GET_XSAVE and KVM_SET_XSAVE move 4096 bytes; AMX needs 11008 and KVM_CAP_XSAVE2. An "
        "area cut at 4096 bytes announces components that it does not hold. A process keeps "
        "buffers of the size that CPUID told it at its start.",
        'Linux kernel commit be50b2065dfa ("kvm: x86: Add support for getting/setting expanded '
        'xstate buffer") (in v5.17)',
        "Restore where KVM_CAP_XSAVE2 reports enough; xfast fix trims tiles that are not live.",
        mends="trim",
    ),
    Rule(
        "LAYOUT",
        "same component, other offset",
        "The standard format puts components where the CPU's CPUID leaf 0xD says: AMD Zen 2 has "
        "PKRU at 832, Zen 3 at 2432, Intel at 2688. An area that moves between them verbatim is "
        "accepted and read at the wrong place.",
        "Intel SDM vol. 1 section 13.4.3; AMD APM vol. 2 section 11.5.2",
        "xfast fix moves the components to the target's places, and xfast convert to any. Where "
        "the file has the guest's own CPUID, the guest knows the old places: choose another host.",
        mends="move",
    ),
    Rule(
        "FORMAT",
        "compacted format or reserved header bytes",
        "KVM_SET_XSAVE takes the standard format only: XCOMP_BV and the 48 reserved bytes of "
        "the header must be zero.",
        "Linux arch/x86/kernel/fpu/xstate.c validate_user_xstate_header()",
        "xfast fix expands the area and cleans the header.",
        call="KVM_SET_XSAVE",
        mends="clean",
        mends_notes=True,
    ),
    Rule(
        "INUSE",
        "XSTATE_BV and the data disagree",
        "A clear bit says that the component has its init value, and whoever restores the area "
        "gives it that value: data that lie there are lost, or never were the component's. A "
        "set bit over init data asks the target for a component that nobody uses.",
        "Intel SDM vol. 1 sections 13.6 and 13.8",
        "If registers came up zero after a restore, ask who cleared XSTATE_BV.",
        mends="drop",
    ),
    Rule(
        "XFD",
        "a component is live while XFD disables it",
        "With XSTATE_BV[18] set and IA32_XFD[18] set, the host's XRSTOR takes #NM in the kernel: "
        "hosts without b45f72177594 panic.",
        'Linux kernel commit b45f72177594 ("x86/fpu: Clear XSTATE_BV[i] in guest XSAVE state '
        'whenever XFD[i]=1") (in v6.19)',
        "xfast fix clears the bit where the tiles hold nothing. Patched kernels discard live "
        "tiles, too; xfast fix does that only with --drop tiledata --even-if-live.",
        mends="drop",
        mends_notes=True,
    ),
    Rule(
        "XSS",
        "supervisor state without IA32_XSS",
        "The guest's CPUID or its area has supervisor components (CET, ...), and the file or "
        "the target lacks the IA32_XSS that goes with them.",
        "Linux arch/x86/kvm/x86.c kvm_set_msr_common() MSR_IA32_XSS",
        "Check that the VMM saves MSR 0xDA0, and that the target kernel is 6.18 or later.",
        call="KVM_SET_XSAVE",
        mends="drop",
    ),
    Rule(
        "PERM",
        "a dynamic component needs permission",
        "AMX tile data are enabled for a guest only after arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM, "
        "18), before the first vCPU; kernels before 5.17 can't grant it.",
        'Linux kernel commit 980fe2fddcff ("x86/fpu: Extend fpu_xstate_prctl() with guest '
        'permissions") (in v5.17)',
        "Let the VMM ask for the permission before it creates a vCPU.",
        call="KVM_SET_CPUID2",
    ),
    Rule(
        "KERNEL",
        "what the target kernel's KVM_SET_XSAVE does",
        "Kernels differ: to 5.15 SET takes what the host has; from ad856280ddea (5.17) only what "
        "the guest's CPUID has; from 8647c52e9504 (6.6) again what the host has, and GET trims. "
        "Distributions back-port, so a version alone proves nothing.",
        'Linux kernel commit 8647c52e9504 ("KVM: x86: Constrain guest-supported xfeatures only '
        'at KVM_GET_XSAVE{2}") (in v6.6)',
        "Name the kernel (--host NAME@6.6), or run xfast host dump on the host to probe it.",
        call="KVM_SET_XSAVE",
        mends="drop",
    ),
    Rule(
        "MXCSR",
        "reserved MXCSR bits",
        "MXCSR has bits that the target's MXCSR_MASK does not allow: KVM_SET_XSAVE answers "
        "EINVAL. Bit 17 (misaligned SSE) exists on AMD only.",
        "Linux arch/x86/kernel/fpu/xstate.c copy_uabi_to_xstate(); Intel SDM vol. 1 section 11.6.6",
        "Restore on a CPU of the same vendor.",
        call="KVM_SET_XSAVE",
    ),
    Rule(
        "ISA",
        "instructions without a component of their own",
        "The guest was told of instructions (CPUID) that the target lacks. No state is lost, but "
        "a program that looked once will meet SIGILL.",
        "Intel SDM vol. 2 CPUID",
        "Judge with --level isa to make it block, or mask the features before the first boot.",
    ),
    Rule(
        "PARTIAL",
        "vCPUs that may not have been read",
        "What the file says of its vCPUs or threads does not agree with those that were found in "
        "it: one is missing, or damaged, and nobody knows what it holds.",
        "the file itself",
        "Make the snapshot anew, or repair the file; xfast fix does not touch it.",
    ),
)

RULES: dict[str, Rule] = {rule.code: rule for rule in _TABLE}
