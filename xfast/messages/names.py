"""CPU features by what they mean for a restore: state, an instruction, speed, or not ours.

Names come in many spellings (``avx512-vbmi2``, ``avx512_vbmi2``, ``sse4.2``); `sort_names` knows
those of Linux, libvirt and QEMU.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from xfast.xsave.cpuid import FEATURES, XSAVE_FEATURES
from xfast.xsave.features import BY_NAME, COMPONENTS, SUPERVISOR_MASK, names_of

STATE = "state"
INSTRUCTION = "instruction"
SPEED = "speed"
FOREIGN = "foreign"
UNKNOWN = "unknown"

MEANINGS = {
    STATE: "brings state of its own",
    INSTRUCTION: "instructions without state: a program that uses them gets SIGILL",
    SPEED: "speed or monitoring only: blocks nothing",
    FOREIGN: "not extended state: MSRs, mitigations, TSC, virtualisation",
    UNKNOWN: "not known to xfast",
}
"""What each kind says to people."""

SPELLINGS = {
    "sse3": "pni", "pclmuldq": "pclmulqdq", "cmpxchg16b": "cx16", "cmpxchg8b": "cx8",
    "lzcnt": "abm", "shstk": "user_shstk", "cet_ss": "user_shstk", "cet_ibt": "ibt",
    "intel_amx": "amx_tile", "amx": "amx_tile", "apxf": "apx_f", "apx": "apx_f",
    "sha": "sha_ni", "avx512_ifma": "avx512ifma", "avx512_vbmi": "avx512vbmi",
    "fxsropt": "fxsr_opt", "ffxsr": "fxsr_opt", "i64": "lm", "xgetbv_ecx1": "xgetbv1",
    "avx512vpopcntdq": "avx512_vpopcntdq", "avx512vnni": "avx512_vnni",
    "avx512vbmi2": "avx512_vbmi2", "avx512bitalg": "avx512_bitalg", "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16", "avxvnni": "avx_vnni",
}  # fmt: skip
"""Other spellings of names in FEATURES."""

_SPEED = {
    "3dnowprefetch", "acpi", "amd_ppin", "aperfmperf", "arat", "arch_perfmon", "cat_l3",
    "cdp_l3", "cldemote", "clwb", "cmp_legacy", "constant_tsc", "cqm", "cr8legacy", "ds",
    "ds_cpl", "dtes64", "dts", "epb", "erms", "est", "extapic", "fsrc", "fsrcs", "fsrm", "fsrs",
    "fzrm", "ht", "hwp", "hypervisor", "ibs", "kvm_hint_dedicated", "lbrv", "mba", "monitor",
    "nonstop_tsc", "nopl", "osvw", "pbe", "pcid", "pcommit", "pdcm", "perfctr_core",
    "perfctr_nb", "perfmon", "perfmon_v2", "pln", "prefetchi", "prefetchiti", "prefetchw",
    "pts", "rdt_a", "rep_good", "skinit", "smx", "ss", "tm", "tm2", "topoext", "wdt",
    "xtopology", "xtpr",
}  # fmt: skip
"""Features that change speed, power or monitoring and that no program can fault upon.

*Source*: Intel SDM vol. 2 CPUID, vol. 3 chapters 15 and 18; AMD APM vol. 3 appendix E.
"""

_FOREIGN = {
    "amd_no_ssb", "amd_psfd", "amd_ssbd", "amd_stibp", "apic", "arch_capabilities", "arch_lbr",
    "auto_ibrs", "avic", "bhi_ctrl", "bhi_no", "bus_lock_detect", "core_capability", "dca",
    "ddpd_u", "de", "decodeassists", "fb_clear", "fbsdp_no", "flush_l1d", "flushbyasid", "gds_no",
    "hle_no", "hybrid", "ibpb", "ibpb_brtype", "ibrs", "ibrs_all", "if_pschange_mc_no",
    "intel_psfd", "intel_pt", "invtsc", "ipred_ctrl", "ipt", "its_no", "l1d_flush", "la57",
    "la57_guest", "lbrv", "lfence_always_serializing", "mca", "mcdt_no", "mce", "md_clear",
    "mds_no", "msr", "mtrr", "no_nested_data_bp", "npt", "nrip_save", "nrips", "null_sel_clr_base",
    "nx", "overflow_recov", "pae", "pat", "pause_filter", "pbrsb_no", "pconfig", "pdpe1gb",
    "perfctr", "pfthreshold", "pge", "pks", "pschange_mc_no", "psdp_no", "pse", "pse36", "psn",
    "rdctl_no", "rfds_clear", "rfds_no", "rrsba_ctrl", "rsba", "rtm_always_abort", "sbdr_ssdp_no",
    "sbpb", "sev", "sev_es", "sev_snp", "sgx", "sgx1", "sgx2", "sgxlc", "skip_l1dfl_vmentry",
    "smap", "sme", "smep", "spec_ctrl", "split_lock_detect", "srso_no", "srso_user_kernel_no",
    "ssbd", "stibp", "stibp_always_on", "succor", "svm", "svm_lock", "svme_addr_chk", "taa_no",
    "tdx", "tme", "tsc", "tsc_adjust", "tsc_deadline", "tsc_deadline_timer", "tsc_scale",
    "tsx_ctrl", "tsx_force_abort", "tsx_ldtrk", "umip", "v_vmsave_vmload", "vgif", "virt_ssbd",
    "vmcb_clean", "vme", "vmx", "vnmi", "x2apic", "xsaveerptr_no",
}  # fmt: skip
"""Features that belong to MSRs, mitigations, timers or nested virtualisation."""

_FOREIGN_STARTS = ("vmx_", "svm_", "hv_", "kvm_", "kvmclock", "sgx_", "xen_", "cpuid_", "sev_")


CET = BY_NAME["cet_u"].bit | BY_NAME["cet_s"].bit
GUEST_MASK = ~SUPERVISOR_MASK | CET
"""The components that KVM keeps in a guest's XSAVE area. It gives Processor Trace, PASID, user
interrupts and LBR to guests by MSRs, if at all: KVM_SUPPORTED_XSS is 0x1800, from Linux 6.18 on."""

BRINGS_STATE = {
    component.flag: sum(other.bit for other in COMPONENTS if other.flag == component.flag)
    for component in COMPONENTS
    if component.flag and component.nr > 1 and component.bit & GUEST_MASK
} | {"ospke": BY_NAME["pkru"].bit, "ibt": CET}
"""The features that bring state components (mask); all others only work on them."""


class Sorted(NamedTuple):
    """A feature name and what it means: `kind` is a key of MEANINGS, `components` a mask."""

    name: str
    kind: str
    components: int


def spell(word: str) -> str:
    """Return a feature's name in this project's spelling, which is Linux's."""
    name = re.sub(r"[-.]", "_", word.strip().lower().lstrip("+"))
    name = SPELLINGS.get(name, name)
    if name not in FEATURES and name.replace("_", "") in FEATURES:
        return name.replace("_", "")
    return name


@lru_cache(1024)
def sort_name(word: str) -> Sorted:
    """Return what the feature that `word` names means for a restore."""
    name = spell(word)
    shown = word.strip()
    if name in BY_NAME and BY_NAME[name].bit & GUEST_MASK:
        return Sorted(shown, STATE, BY_NAME[name].bit)
    if name in _SPEED:
        return Sorted(shown, SPEED, 0)
    if name in _FOREIGN or name.startswith(_FOREIGN_STARTS):
        return Sorted(shown, FOREIGN, 0)
    if name in BRINGS_STATE:
        return Sorted(shown, STATE, BRINGS_STATE[name])
    if name in XSAVE_FEATURES:
        return Sorted(shown, STATE, 0)
    if name in FEATURES:
        return Sorted(shown, INSTRUCTION, 0)
    return Sorted(shown, UNKNOWN, 0)


def sort_names(words: Iterable[str]) -> dict[str, list[Sorted]]:
    """Return {kind: names} of a list of features, kinds in the order of MEANINGS."""
    found = [sort_name(word) for word in words if word.strip()]
    return {kind: rows for kind in MEANINGS if (rows := [one for one in found if one.kind == kind])}


def describe(groups: dict[str, list[Sorted]]) -> list[str]:
    """Return one line for each kind of feature in a list."""
    lines = []
    for kind, rows in groups.items():
        if kind == STATE:
            words = [
                f"{row.name} ({names_of(row.components)})"
                if row.components
                else f"{row.name} (XSAVE)"
                for row in rows
            ]
        else:
            words = [row.name for row in rows]
        lines.append(f"{', '.join(words)}: {MEANINGS[kind]}")
    return lines
