"""The real instructions of the CPU that runs the tests, and the model beside them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from xfast.engine import hw
from xfast.xsave import area
from xfast.xsave.features import (
    AVX,
    BY_NAME,
    PKRU,
    PKRU_NR,
    SSE,
    X87,
    XCOMP_BV_COMPACTED,
    XFEATURE_MASK_AVX512,
    XFEATURE_MASK_FPSSE,
    names_of,
)
from xfast.xsave.layout import from_leaf_d

HERE = Path(__file__).parents[1]
IMAGES = os.environ.get("XFAST_HW_IMAGES", "3000")
"""Random images for the differential test; the full run is XFAST_HW_IMAGES=1000000."""

needs_hardware = pytest.mark.skipif(
    not hw.available(), reason="this machine has no XSAVE, or its kernel does not enable it"
)
OPMASK, ZMM_HI256 = (BY_NAME[name].bit for name in ("opmask", "zmm_hi256"))
ALL = (1 << 64) - 1
SIGSEGV, SIGILL = 11, 4


def leaf_d():
    return from_leaf_d({nr: hw.cpuid(0xD, nr) for nr in range(64)})[0]


def areas(n):
    return area.empty(n, max(hw.cpuid(0xD)[1], 4096))


def image(xstate_bv):
    """Return an area of non-zero bytes with canonical x87 values and this XSTATE_BV."""
    memory = areas(1)[0]
    memory[:] = 0x5A
    memory[512:576] = memory[:32] = 0
    memory[:2], memory[24:26] = (0x7F, 3), (0x80, 0x1F)
    memory[512] = xstate_bv
    return memory


@needs_hardware
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("seed", "options"), [("1", ["--amx"]), ("2", [])])
def test_random_images_give_the_same_on_model_and_cpu(seed, options):
    command = [sys.executable, HERE / "helpers" / "differential.py", IMAGES, seed, *options]
    path = os.pathsep.join([str(HERE), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


CHANGES = {"set_xmm15": SSE, "set_ymm15": SSE | AVX | ZMM_HI256, "set_k7": OPMASK, "fldz": X87}
"""What an instruction between restore and save modifies (masks), as far as the CPU has it."""


@needs_hardware
@pytest.mark.parametrize("change", [None, *CHANGES])
def test_xsaveopt_writes_at_least_what_was_modified(change):
    # Intel SDM vol. 1 section 13.9: what is unmodified may be left out, and is on the CPUs seen.
    own = hw.xgetbv(0) & (XFEATURE_MASK_FPSSE | AVX | XFEATURE_MASK_AVX512)
    if not hw.cpuid(0xD, 1)[0] & 1:
        pytest.skip("this CPU has no XSAVEOPT (CPUID leaf 0xD.1 EAX bit 0)")
    needed = {"set_ymm15": AVX, "set_k7": OPMASK}.get(change, 0)
    if needed & ~own:
        pytest.skip(f"XCR0 lacks {names_of(needed)}")
    written = CHANGES.get(change, 0) & own
    ends = {0: (32, 160), 1: (160, 416)}
    ends |= {s.nr: (s.offset, s.offset + s.size) for s in leaf_d().slots if own >> s.nr & 1}
    memory = image(own)
    steps = [
        ("xrstor64", memory, own),
        ("fill", memory[:512], 0xCC),
        ("fill", memory[576:], 0xCC),
        ("xsaveopt64", memory, own),
    ]
    if change:
        steps.insert(3, (change, None, 0))
    hw.run(steps)
    seen = sum(1 << nr for nr, (start, end) in ends.items() if (memory[start:end] != 0xCC).any())
    assert seen & written == written
    assert memory[512] == own
    assert (memory[24:28] == (0x80, 0x1F, 0, 0)).all()


def needs_pku():
    if not hw.xgetbv(0) & PKRU or not hw.cpuid(7)[2] >> 4 & 1:
        pytest.skip("this machine has no PKRU (XCR0 bit 9, CPUID leaf 7 ECX bit 4)")


@needs_hardware
@pytest.mark.parametrize("compacted", [False, True])
def test_pkru_is_loaded_and_saved_and_the_callers_comes_back(compacted):
    needs_pku()
    before, memory, after = areas(1)[0], areas(1)[0], areas(1)[0]
    at = leaf_d().slot(PKRU_NR).offset
    if compacted:
        at = 576
        memory[520:528].view("<u8")[0] = XCOMP_BV_COMPACTED | PKRU
    memory[512:520].view("<u8")[0] = PKRU
    memory[at : at + 4].view("<u4")[0] = 0x5555_5550
    hw.run([("xsave64", before, PKRU)])
    saved = leaf_d().slot(PKRU_NR).offset
    hw.run([("xrstor64", memory, PKRU), ("xsave64", after, PKRU)])
    assert after[saved : saved + 4].view("<u4")[0] == 0x5555_5550
    hw.run([("set_pkru", None, 0x5555_5503), ("xsave64", after, PKRU)])
    assert after[saved : saved + 4].view("<u4")[0] == 0x5555_5500
    hw.run([("xsave64", after, PKRU)])
    assert (after == before).all()


@needs_hardware
def test_a_pkru_that_forbids_the_callers_memory_is_not_loaded():
    needs_pku()
    memory, after = areas(1)[0], areas(1)[0]
    at = leaf_d().slot(PKRU_NR).offset
    memory[512:520].view("<u8")[0] = PKRU
    memory[at : at + 4].view("<u4")[0] = 0x5555_5553
    results = hw.run([("xrstor64", memory, PKRU), ("xsave64", after, PKRU)])
    assert [result[0] for result in results] == [0, 0]
    assert not after[at] & 3


@needs_hardware
def test_pkru_can_not_be_set_where_there_is_none():
    if hw.xgetbv(0) & PKRU and hw.cpuid(7)[2] >> 4 & 1:
        pytest.skip("this machine has PKRU")
    with pytest.raises(ValueError, match=r"steps\[0\]: "):
        hw.run([("set_pkru", None, 0)])


@needs_hardware
def test_fldcw_raises_where_an_exception_is_pending_and_the_process_goes_on():
    memory, control = image(1), np.frombuffer(b"\x7f\x03", np.uint8).copy()
    memory[:4] = (0x7E, 3, 1, 0)
    results = hw.run([("xrstor64", memory, 1), ("fldcw", control, 0)])
    assert results[1][:2] == (8, 16)  # SIGFPE, #MF


@needs_hardware
@pytest.mark.parametrize("op", ["xsave64", "xrstor64", "xsave", "xrstor"])
def test_a_misaligned_operand_is_a_fault_and_not_the_end(op):
    memory = areas(2).base.reshape(-1)
    (fault,) = hw.run([(op, memory[8:], 7)])
    assert fault[:2] == (SIGSEGV, 13)


@needs_hardware
def test_a_fault_does_not_keep_later_steps_from_running():
    bad, good = image(7), areas(1)[0]
    bad[520] = 1
    results = hw.run([("xrstor64", bad, 7), ("xsave64", good, 7)])
    assert [result[0] for result in results] == [SIGSEGV, 0]
    assert good[28:32].any()  # MXCSR_MASK, which every save with SSE writes


@needs_hardware
def test_the_callers_registers_come_back():
    before, after = areas(1)[0], areas(1)[0]
    user = 3
    hw.run([("xsave64", before, user)])
    other = image(7)
    other[:2], other[24:26] = (0x40, 0), (0xA0, 0x7F)  # x87 unmasked, SSE rounding to zero
    hw.run([("xrstor64", other, 7), ("set_xmm15", None, 0), ("fldz", None, 0)])
    hw.run([("xsave64", after, user)])
    assert (before[[0, 1, 24, 25, 26, 27]] == after[[0, 1, 24, 25, 26, 27]]).all()
    assert np.longdouble(1) / np.longdouble(3) * 3 == 1
    assert 1.0 / 3.0 == 0.3333333333333333


@needs_hardware
def test_other_faults_still_reach_the_handler_that_was_there():
    program = (
        "import ctypes, numpy as np\n"
        "from xfast.engine import hw\n"
        "memory = np.zeros(16384, np.uint8)\n"
        "misaligned = memory[65 - memory.ctypes.data % 64:]\n"
        "assert hw.run([('xrstor64', misaligned, 7)])[0][0] == 11\n"
        "ctypes.string_at(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -SIGSEGV
    assert "Fatal Python error: Segmentation fault" in done.stderr


@needs_hardware
def test_time_grows_with_the_rounds():
    memory = areas(1)[0]
    steps = [("xsave64", memory, 3)]
    assert 0 < hw.time(steps, 10) < hw.time(steps, 100_000)


@needs_hardware
@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([("xsaves64", None, 0)], "steps.0.: expected one of xsave64.*got 'xsaves64'"),
        (
            [("xsave64", np.zeros(575, np.uint8), 0)],
            "expected an area of .* bytes, got 575",
        ),
        ([("xsave64", np.zeros(99999, np.int8), 0)], "steps.0.: expected a contiguous"),
        ([("xsave64", np.zeros(99999, np.uint8)[::2], 0)], "steps.0.: expected a contiguous"),
        ([("fldz", None, 0)] * 17, "steps: expected at most 16, got 17"),
    ],
)
def test_bad_steps_are_refused_before_anything_runs(steps, message):
    with pytest.raises(ValueError, match=message):
        hw.run(steps)


def test_the_header_compiles_for_other_architectures():
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler here")
    header = Path(hw.__file__).with_name("hw.h")
    source = f'#include "{header}"\nint main(void) {{ return xfast_hw_available(); }}\n'
    command = [compiler, "-U__linux__", "-Wall", "-Wno-unused-function", "-Werror"]
    done = subprocess.run(
        [*command, "-fsyntax-only", "-x", "c", "-"],
        input=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
