"""`xfast explain`: each text that people paste gets the right answer or none, never a wrong one."""

import csv
import io
import re

import pytest
from effort import at_most
from hypothesis import given
from hypothesis import strategies as st

from xfast.cli.main import main
from xfast.judge.rules import RULES
from xfast.kernels.behaviour import BEHAVIOURS
from xfast.messages.answer import LINES_ANSWERED, answer, answers
from xfast.messages.names import BRINGS_STATE, MEANINGS, sort_name
from xfast.messages.reading import in_parts, lines_with
from xfast.messages.table import ELSEWHERE, SCOPES, STATE, message_of, messages
from xfast.messages.values import SUPERVISOR_SETS, USER_SETS, masks_of_size
from xfast.snapshots.registry import FORMATS
from xfast.xsave.features import XFEATURE_MASK_FPSSE
from xfast.xsave.layout import PRESETS


@pytest.fixture
def run(capsys, monkeypatch):
    def call(*words, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        status = main(["explain", *words])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


LITERALS = [(m, literal) for m in messages() for literal in m.literals]


@pytest.mark.parametrize(("message", "literal"), LITERALS, ids=[text for _, text in LITERALS])
def test_each_text_finds_its_own_row(message, literal):
    assert message_of(literal.replace("*", "0")) is message


@pytest.mark.parametrize("message", messages(), ids=lambda m: m.literals[0])
def test_each_row_names_rules_and_commits_that_exist(message):
    assert message.scope in SCOPES
    assert set(message.codes) <= RULES.keys()
    assert message.text
    assert message.next
    assert bool(message.codes) == (message.scope != ELSEWHERE) or message.scope == "either"
    for commit, subject, release in re.findall(
        r'Linux kernel commit (\w+) \("(.*)"\) \(in v([\d.]+)\)', message.source
    ):
        known = [b for b in BEHAVIOURS.values() if b.commit == commit]
        for behaviour in known:
            assert behaviour.subject == subject
            assert behaviour.since[0].partition("-")[0] == release
        cited = [rule for rule in RULES.values() if commit in rule.ref]
        for rule in cited:
            assert subject in rule.ref
        assert known or cited


ANSWERS = {
    "qemu-kvm: Failed to set XSAVE: Invalid argument": (STATE, "LEAK"),
    "kvm: Putting registers after reset: Failed to set XSAVE: Invalid argument": (STATE, "LEAK"),
    "kvm: Putting registers after init: Failed to set XCRs: Invalid argument": (STATE, "XCR0"),
    "Failed to put registers after reset: Invalid argument": (STATE, "LEAK"),
    "qemu-system-riscv64: Failed to put registers after init: No such file": (ELSEWHERE, ""),
    "KVM_SET_SREGS: Invalid argument": ("either", "HOST-MISSING"),
    "error: failed to set MSR 0xda0 to 0x1800": (STATE, "XSS"),
    "unhandled wrmsr: 0x1c4 data 0x40000": (STATE, "XFD"),
    "error: failed to set MSR 0x48e to 0xfff9fffe04006172": (ELSEWHERE, ""),
    "ZMM_Hi256 offset 0x480 expected 0x380": (STATE, "LAYOUT"),
    "missing features: pku,vmx-ins-outs": (STATE, "HOST-MISSING"),
    "missing features: erms,vaes": (STATE, "ISA"),
    "missing features: pdcm,erms": (ELSEWHERE, ""),
    "Missing section footer for 0000:00:01.3/piix4_pm": (ELSEWHERE, ""),
    "No space left on device": (ELSEWHERE, ""),
    "qemu-system-x86_64: kvm_put_xsave failed: Invalid argument": (STATE, "LEAK"),
    "qemu-system-x86_64: Failed to get registers: Invalid argument": ("either", "SIZE"),
    "kvm_buf_set_msrs: Assertion `ret == cpu->kvm_msr_buf->nmsrs' failed.": (ELSEWHERE, ""),
    "Error -22 while loading VM state": ("either", "LEAK"),
    "Missing section footer for cpu": ("either", "HOST-MISSING"),
    "qemu-system-x86_64: Failed to load piix4_pm:apci": (ELSEWHERE, ""),
    "qemu-system-ppc64: Error -22 while loading VM state": (ELSEWHERE, ""),
    "unable to find CPU model 'SapphireRapids'": (ELSEWHERE, ""),
    "Failed to set KVM vcpu lapic: Invalid argument (os error 22)": (ELSEWHERE, ""),
    "SetVcpuEvents(Invalid argument (os error 22))": (ELSEWHERE, ""),
    "Failed to get KVM vcpu xcrs: Bad address (os error 14)": (STATE, "HOST-MISSING"),
    "Failed to set all KVM MSRs for this vCPU. Only a partial write was done.": ("either", "XSS"),
    "Detected faulty MSR 0x4b564d02 while setting MSRs": (ELSEWHERE, ""),
    "incompatible CPUID entry: leaf=0x80000008 (subleaf=0x0), register='EAX'": (ELSEWHERE, ""),
    "mshv: set_xsave: Invalid argument (os error 22)": (STATE, "HOST-MISSING"),
    "arch_prctl(ARCH_REQ_XCOMP_PERM, 18) = -1 EINVAL": (STATE, "PERM"),
    "CPUID.07H:EBX.intel-pt [bit 25] requested feature": (ELSEWHERE, ""),
    "missing features: shstk,ibt": (STATE, "XSS"),
    "missing features: arch-lbr,hwp": (ELSEWHERE, ""),
    "extra features: vmx-foo, missing features: pku": (STATE, "HOST-MISSING"),
    "x86/fpu: Both APX/MPX present in the CPU's xstate features: 0x18.": (STATE, "HOST-MISSING"),
    "WARNING: at arch/x86/kernel/fpu/xstate.c:1100 __raw_xsave_addr+0x6f": (STATE, "KERNEL"),
    "kvm_exit: reason XSETBV rip 0x1000": ("", "XCR0"),
    "HVM restore: failed to load entry 16/0 rc -95": (STATE, "XCR0"),
    "HVM restore: failed to load entry 3/0 rc -22": ("either", "XCR0"),
    "VERR_CPUM_INVALID_XSAVE_HDR": (STATE, "FORMAT"),
    "X86_CPUID_STEXT_FEATURE_ECX_PKU is not supported by the host but has already exposed to "
    "the guest": (STATE, "HOST-MISSING"),
    "Feature 'cpuid.avx2' was absent, but must be present.": (STATE, "ISA"),
    "cpu-feature.node.kubevirt.io/amx-tile=true": (STATE, "HOST-MISSING"),
    "missing features of this CPU are 400,0 = sse4a": (STATE, "ISA"),
    "CPU does not support x86-64-v3": (STATE, "ISA"),
    "Couldn't get extended state status: No such device.": (STATE, "SIZE"),
    "Truncated register 37 in remote 'g' packet": ("either", "LAYOUT"),
    "xsave area size 0x2b00 is larger than 0x1000": (STATE, "SIZE"),
    "CPU model 207 != 143": ("either", "ISA"),
    "snapshot made on Intel, restoring on AMD": ("", "LAYOUT"),
    "KVM needs Intel VT-x or AMD-V": ("", ""),
    "hvf: unable to set FPU": ("", ""),
    "compatibility check failed: [vaes gfni]": ("", "ISA"),
    "hello world": ("", ""),
    "Invalid argument (os error 22)": ("", "LEAK"),
    "the guest lost PKRU": ("", "LEAK"),
}


@pytest.mark.parametrize(("text", "expected"), ANSWERS.items(), ids=list(ANSWERS))
def test_a_text_is_answered_with_its_scope_and_likeliest_rule(text, expected):
    one = answer(text)
    assert (one.scope, (one.codes or ("",))[0]) == expected


def test_the_public_texts(shared):
    """Those of reports: exit code 0, and nothing but the unrelated stays without a rule."""
    path = shared / "cases" / "explain.tsv"
    if not path.exists():
        pytest.skip("../shared/cases is not here")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    nothing = {row["id"] for row in rows if not answer(row["text"]).codes}
    assert nothing <= {
        "almalinux-footer", "minishift-3210", "vmx-ignore", "nonsense", "sev", "qemu-3",
        "rizin-5242",
    }  # fmt: skip


def test_qemu_8_2_is_not_qemu_10(run):
    status, out, _ = run("qemu-system-x86_64: Failed to put registers after init: Invalid argument")
    assert status == 0
    assert "QEMU 8.2" in out
    assert "QEMU 10" not in out
    assert "7191f24c7fcf" in out
    for code in ("LEAK", "XCR0"):
        assert f"  {code} " in out


WRAPPED = (
    '{{"MESSAGE":"{}","_HOSTNAME":"n1"}}',
    '{{"log":"first\\n{}\\n","stream":"stderr"}}',
    "Nov 12 10:22:33 pve1 QEMU[123]: {}",
    "\x1b[31m{}\x1b[0m",
    "<message>{}</message>",
    "[ 1234.567890] {}",
)


@pytest.mark.parametrize("wrapping", WRAPPED)
@pytest.mark.parametrize(
    "text",
    [
        "qemu-kvm: Failed to set XSAVE: Invalid argument",
        "guest CPU doesn't match specification: missing features: pku,vaes,erms",
        "error: failed to set MSR 0xda0 to 0x1800",
    ],
)
def test_what_wraps_a_text_up_changes_no_answer(wrapping, text):
    plain, *_ = answers(text)
    found, *_ = answers(wrapping.format(text))
    assert (found.scope, found.codes, found.details) == (plain.scope, plain.codes, plain.details)


@pytest.mark.parametrize("quote", ["&apos;", "&#39;", "\u2019", "\\u0027", "''"])
def test_quotes_come_in_many_spellings(quote):
    one, *_ = answers(f"guest CPU doesn{quote}t match specification: missing features: pku")
    assert one.codes == ("HOST-MISSING", "XCR0")


def test_a_list_that_a_mail_broke_is_read_to_its_end():
    head = "operation failed: guest CPU doesn't match specification:"
    one, *_ = answers(f"{head}\nmissing features: pku,vaes\n")
    assert {"pku", "vaes"} <= set(re.findall(r"\w+", " ".join(one.details)))
    assert one.codes == ("HOST-MISSING", "XCR0", "ISA")


def test_a_list_without_names_is_not_announced():
    one = answer("NoSuitableNodesForHostModelMigration")
    assert "below" not in one.text
    assert "below" in answer("missing features: pku").text


def test_what_xfast_reads_is_not_said_to_be_unread():
    """A reader that came later made an answer wrong: Xen's images."""
    unread = " ".join(message.text + message.next for message in messages())
    named = re.findall(r"xfast does not read (\w+)", unread)
    assert set(named) == {"VirtualBox", "VMware", "Hyper"}
    assert not {name.lower() for name in named} & set(FORMATS)


def test_features_are_told_apart_name_by_name():
    kinds = {
        "pku": "state", "avx512f": "state", "amx-tile": "state", "xsaves": "state",
        "vaes": "instruction", "avx512-vbmi2": "instruction", "sse4.2": "instruction",
        "lzcnt": "instruction", "enqcmd": "instruction", "hwp": "speed", "erms": "speed",
        "pdcm": "speed", "vmx-ins-outs": "foreign", "invtsc": "foreign", "intel-pt": "foreign",
        "arch-lbr": "foreign", "md-clear": "foreign", "hv-time": "foreign", "flux": "unknown",
    }  # fmt: skip
    assert {name: sort_name(name).kind for name in kinds} == kinds
    assert set(kinds.values()) == MEANINGS.keys()
    for name, components in BRINGS_STATE.items():
        assert sort_name(name).components == components


def test_a_cpuid_register_with_two_values_names_what_is_lost():
    one = answer(
        "Detected incompatible CPUID entry: leaf=0x7 (subleaf=0x0), register='EBX', "
        "compatibility_check='BitwiseSubset', source VM feature='0xf1bf07a9', "
        "destination VM feature'0x219c07a9'."
    )
    state, instructions = one.details
    assert state.startswith("avx512f (opmask+zmm_hi256+hi16_zmm): ")
    assert instructions.startswith("avx512dq, avx512ifma, avx512cd, avx512bw, avx512vl: ")


@pytest.mark.parametrize("size", [10752, 10688, 2440, 2432, 832, 576])
def test_a_size_is_made_of_just_these_components(size):
    intel = PRESETS["intel"]
    expected = {
        user | supervisor
        for user in USER_SETS
        for supervisor in SUPERVISOR_SETS
        if intel.compacted_size((user | supervisor) & ~XFEATURE_MASK_FPSSE) == size
    }
    assert set(masks_of_size(size)) == expected
    assert expected


def test_a_size_that_leaf_0xd_contradicts_is_explained():
    one = answer("XSAVE consistency problem: size 10752 != kernel_size 10704")
    assert any("0x600e7 | 0x1800" in line for line in one.details)
    assert any("does not say that TILECFG is aligned" in line for line in one.details)


def test_a_log_is_read_and_the_lines_that_matter_are_picked(run):
    log = """
2026-01-01T10:00:00 starting up libvirt version: 10.0.0
qemu-system-x86_64: warning: TSC frequency mismatch between VM and host
qemu-kvm: Putting registers after init: Failed to set XSAVE: Invalid argument
qemu-kvm: load of migration failed: Invalid argument
2026-01-01T10:00:09 shutting down
"""
    status, out, _ = run("-", stdin=log)
    assert status == 0
    assert out.startswith("> qemu-kvm: Putting registers after init: Failed to set XSAVE")
    assert "TSC" not in out
    assert "starting up" not in out


@pytest.mark.parametrize("words", [["-"], [" "]])
def test_no_text_at_all_is_a_usage_error(run, words):
    assert run(*words)[0] == 2


def test_an_unknown_text_is_no_usage_error(run):
    status, out, _ = run("the flux capacitor")
    assert status == 0
    assert "no message known here" in out
    status, out, _ = run("the flux capacitor broke XCR0")
    assert "hint" in out
    assert "  XCR0 " in out


@pytest.mark.parametrize("commit", sorted({b.commit for b in BEHAVIOURS.values()}))
def test_every_commit_that_is_cited_can_be_explained(run, commit):
    status, out, _ = run(commit)
    assert status == 0
    assert commit[:12] in out


def test_escapes_do_not_reach_the_terminal(run):
    _, out, _ = run("-", stdin="\x1b[31mFailed to set XSAVE: Invalid argument\nsecond\n")
    assert "\x1b" not in out


def test_hostile_logs_cost_little():
    """A line that could make patterns walk back and forth, and one without end."""
    assert answers("a" * 1_000_000) == [answer("a" * 2000)]
    assert not answers("missing features " * 200_000)[0].line[2000:]


@pytest.mark.parametrize("word", ["unsupported", "xsave", "intel ", "f", "amx", "#gp"])
def test_a_line_of_nothing_but_a_patterns_own_words_costs_little(word):
    """Found by fuzzing: 64 KB of them took 7 s, as each pattern began anew at every word."""
    with at_most(0.1):
        answers(word * 2000)


def test_a_line_of_nothing_but_sizes_costs_little():
    """Each number of it was compared with the size of every mask, laid out anew."""
    with at_most(0.1):
        answers("xsave size " + " ".join(map(str, range(1000, 1390))))


def test_rules_without_words(run):
    _, out, _ = run()
    assert len(out.splitlines()) == len(RULES)
    _, out, _ = run("leak")
    assert "ad856280ddea" in out


def test_a_text_of_nothing_but_colours_has_no_answer():
    """Found by fuzzing: no line was left of it, and its lines were paired with one more."""
    assert answers("\x1b[31m") == []
    assert answers("\n \n") == []


def test_a_line_of_sources_values_and_targets_costs_little():
    """23 s once for 2,000 characters: each source was tried with each value and each target."""
    with at_most(0.1):
        answers("src" * 200 + "0x1 " * 150 + "dest" * 190)


def log_of(line):
    """Return a log of 1 MiB; `line`: a function of a number."""
    size = len(line(10_000)) + 1
    return "\n".join(line(number) for number in range((1 << 20) // size))


TEXTS = [literal for _, literal in LITERALS]
ORDINARY = (
    "2026-01-01T10:00:00.{0:03}+0000: {0}: info : virQEMUDriverConfigLoadFile:53 : Configuration",
    "[{0:5}.000123] pci 0000:00:02.0: BAR {0}: assigned [mem 0xfe000000-0xfe0fffff]",
    "[{0:5}.000456] kvm [{0}]: vcpu0, guest rIP: 0xffffffff8104 disabled perfctr wrmsr: 0xc2",
    "Nov 12 10:22:00 pve1 kernel: vmbr0: port {0}(tap{0}i0) entered forwarding state",
)


@pytest.mark.parametrize(
    ("line", "seconds"),
    [
        (lambda i: ORDINARY[i % 4].format(i), 1),
        (lambda i: f"{i} {TEXTS[i % len(TEXTS)]}", 2),
        (lambda i: f"missing features: pku, f{i}", 2),
        (lambda i: "pku" if i % 2 else f"missing features {i}", 2),
        (lambda i: f"regstate{i}", 2),
        (lambda i: f"{i} " + "vaes gfni avx512-vbmi2 " * 80, 2),
        (lambda i: f"{i} " + "setxsave " * 220, 2),
        (lambda i: f"{i} " + "spin" * 490, 2),
        (lambda i: f"xcr0 0x{i:x}", 2),
        (lambda i: chr(97 + i % 26), 2),
    ],
    ids=lambda value: value(1)[:30] if callable(value) else "",
)
def test_a_mebibyte_of_a_log_costs_little(line, seconds):
    """7.6 s once for an ordinary log: each of 300 patterns was tried in each line.

    A second is about half a second of today's machines; what is made to cost most takes two.
    """
    log = log_of(line)
    with at_most(seconds):
        answers(log)


def test_what_a_log_says_again_and_again_hides_nothing():
    """Of lines that are too many those are looked at that differ, whatever is in front of them."""
    same = [
        f"[{i}.1] kvm [{i}]: vcpu0 disabled perfctr wrmsr: 0xc2 data 0xffff" for i in range(9000)
    ]
    found = answers("\n".join([*same, "error: failed to set MSR 0xda0 to 0x1800"]))
    assert [one.codes for one in found] == [("XSS",)]
    assert not found.left_out


def test_lines_that_are_left_out_are_counted(run):
    log = "\n".join(f"missing features: pku, f{i}" for i in range(9000))
    status, _, err = run("-", stdin=log)
    assert status == 0
    assert f" {9000 - LINES_ANSWERED} more lines that may matter were not looked at\n" in err


@pytest.mark.parametrize("message", messages(), ids=lambda m: m.literals[0])
def test_no_pattern_goes_beyond_a_line(message):
    """They are searched in a log as a whole."""
    for pattern in message.patterns:
        for part in pattern:
            assert not re.search(r"\\[sDSW]|\[\^(?!\\d\\n)|[\^$](?!\\)|[A-Z]", part.pattern)


def test_a_match_in_several_parts_is_within_a_line():
    parts = in_parts("a.*b.*c")
    text = "a\nb c\na b\nc\nc b a\nxa-b-c\nab\nabc"
    assert [text[line:].split("\n")[0] for line, _ in lines_with(parts, text)] == ["xa-b-c", "abc"]
    assert [at for _, at in lines_with(parts, text)] == [text.index("a-b"), text.index("abc")]


@given(st.text("abc\n", max_size=30))
def test_a_pattern_in_parts_finds_what_the_pattern_finds(text):
    begins = [match.start() for match in re.finditer("^", text, re.MULTILINE)]
    slow = [at for at in begins if re.match(".*b.*(?:ca|ab).*c", text[at:])]
    assert [line for line, _ in lines_with(in_parts("b.*(?:ca|ab).*c"), text)] == slow
