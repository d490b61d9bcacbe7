"""A guest that computes in x87, SSE and AVX registers and checks itself: its own firmware.

It counts in an integer register, in ST(0), in XMM0 and in the four lanes of YMM2 at once, and
compares them all after each step, FCW and MXCSR as well. `WRONG` in its memory is 0 as long as no
register ever held anything else than it should; `COUNT` tells that it runs.

It writes to 64 pages in turn, so that a migration has something to send again. INVLPG is there for
QEMU 7.2 under TCG, which else loses now and then that a page was written to.
"""

import re
import shutil
import subprocess
import time

import pytest
from qemu_machine import Machine

DEVICES = ("-vga", "std", *("-device", "virtio-net-pci") * 3, *("-device", "virtio-scsi-pci") * 2)
"""So that the description is larger than a pipe, which is when the source always goes on."""

WRONG, COUNT = 0x9000, 0x9004

SOURCE = """
.globl _start
_start:
.code16
begin:
    cli
    lgdtl %cs:table - _start
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    ljmpl $8, $protected
.code32
protected:
    movw $16, %ax
    movw %ax, %ds
    movw %ax, %ss
    movl $0x7000, %esp
    movl %cr0, %eax
    andl $~0xc, %eax
    orl $2, %eax
    movl %eax, %cr0
    movl %cr4, %eax
    orl $0x40600, %eax
    movl %eax, %cr4
    xorl %ecx, %ecx
    xgetbv
    orl $7, %eax
    xsetbv
    movl $0, 0x9000
    movl $0, 0x9004
    fninit
    fldcw control
    ldmxcsr status
    fld1
    fldz
    movsd one, %xmm1
    xorps %xmm0, %xmm0
    vbroadcastsd one, %ymm3
    vxorpd %ymm2, %ymm2, %ymm2
again:
    incl 0x9004
    movl 0x9004, %eax
    andl $63, %eax
    shll $12, %eax
    incl 0x100000(%eax)
    invlpg 0x100000(%eax)
    invlpg 0x9000
    fadd %st(1), %st
    addsd %xmm1, %xmm0
    vaddpd %ymm3, %ymm2, %ymm2
    fildl 0x9004
    fcomip %st(1), %st
    jne wrong
    fstl 0x9010
    movsd %xmm0, 0x9018
    vmovupd %ymm2, 0x9020
    fnstcw 0x9040
    stmxcsr 0x9044
    movw control, %ax
    cmpw %ax, 0x9040
    jne wrong
    movl 0x9044, %eax
    andl $~0x3f, %eax
    cmpl %eax, status
    jne wrong
    movl 0x9010, %eax
    movl 0x9014, %edx
    movl $0x9018, %esi
lanes:
    cmpl %eax, (%esi)
    jne wrong
    cmpl %edx, 4(%esi)
    jne wrong
    addl $8, %esi
    cmpl $0x9040, %esi
    jne lanes
    jmp again
wrong:
    movl $1, 0x9000
    jmp again
    .p2align 3
table:
    .word 23
    .long gdt
gdt:
    .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
one:
    .double 1.0
status:
    .long 0x9f80
control:
    .word 0x27f
    .org 0xfff0
.code16
    ljmp $0xf000, $begin - _start
    .org 0x10000
"""


def firmware(folder):
    """Assemble the guest; return the path of the image."""
    for program in ("as", "ld"):
        if not shutil.which(program):
            pytest.skip(f"{program} (binutils) is not here")
    image = folder / "firmware"
    (folder / "guest.s").write_text(SOURCE)
    for command in (
        ["as", "--32", "-o", folder / "guest.o", folder / "guest.s"],
        ["ld", "-m", "elf_i386", "--oformat", "binary", "-Ttext", "0xf0000", "-o", image,
         folder / "guest.o"],
    ):  # fmt: skip
        subprocess.run(command, check=True)
    assert image.stat().st_size == 1 << 16
    return image


def state(machine):
    """Return what the guest says of itself: whether a value was wrong, and how far it counted."""
    text = machine.monitor(f"xp /2wx {WRONG:#x}")
    return tuple(int(word, 16) for word in re.findall(r"0x(\w{8})", text))


def counts(machine, beyond=-1):
    """Wait until the guest counts on from `beyond`; return how far it is."""
    for _ in range(1000):
        wrong, count = state(machine)
        assert not wrong
        if count > beyond:
            return count
        time.sleep(0.02)
    raise AssertionError(f"the guest stands still at {count}")


def booted(guest):
    """Return a QEMU whose guest has begun to count."""
    machine = Machine(*guest).__enter__()
    machine.run("cont")
    counts(machine, 1000)
    return machine
