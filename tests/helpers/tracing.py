"""A process that is stopped at its system calls: killed there, failed, or robbed of a directory.

`run` forks, and drives the child by ptrace(2). At every system call that matters a script is
asked what to do, so each moment at which the world can change under a program is tried, one by
one and without any timing. Linux on x86-64 only.

*Source*: ptrace(2); Linux arch/x86/entry/syscalls/syscall_64.tbl; sys/user.h.
"""

import contextlib
import ctypes
import os
import platform
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass

TRACEME, GETREGS, SETREGS, DETACH, SYSCALL = 0, 12, 13, 17, 24
SETOPTIONS, TRACESYSGOOD, EXITKILL = 0x4200, 1, 1 << 20

REGISTERS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx"),
    *("rsi", "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base"),
    *("ds", "es", "fs", "gs"),
)

CALLS = {
    "read": 0, "write": 1, "open": 2, "lseek": 8, "ioctl": 16, "pread64": 17, "pwrite64": 18,
    "fcntl": 72, "flock": 73, "fsync": 74, "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84,
    "link": 86, "unlink": 87, "fchmod": 91, "fchown": 93, "fsetxattr": 190, "getdents64": 217,
    "openat": 257, "mkdirat": 258, "newfstatat": 262, "unlinkat": 263, "renameat": 264,
    "linkat": 265, "symlinkat": 266, "utimensat": 280, "renameat2": 316, "copy_file_range": 326,
    "openat2": 437,
}  # fmt: skip
NAMES = {number: name for name, number in CALLS.items()}

CHANGING = frozenset(
    {"write", "ioctl", "pwrite64", "fsync", "ftruncate", "rename", "mkdir", "rmdir", "link"}
    | {"unlink", "fchmod", "fchown", "fsetxattr", "openat", "mkdirat", "unlinkat", "renameat"}
    | {"linkat", "symlinkat", "utimensat", "renameat2", "copy_file_range"}
)
"""The calls that change something; an openat counts where it creates a file."""

COUNT_REGISTER = {"read": "rdx", "write": "rdx", "pread64": "rdx", "pwrite64": "rdx",
                  "copy_file_range": "r8"}  # fmt: skip


class Registers(ctypes.Structure):
    """struct user_regs_struct."""

    _fields_ = tuple((name, ctypes.c_ulonglong) for name in REGISTERS)


@dataclass(frozen=True)
class Kill:
    """End the process by SIGKILL: before the call, or with half of its bytes written."""

    half: bool = False


@dataclass(frozen=True)
class Fail:
    """Let the call fail, and do nothing."""

    errno: int


@dataclass(frozen=True)
class Shorten:
    """Let the call move half of the bytes it was asked for."""


@dataclass(frozen=True)
class Interrupt:
    """Let the call be made, and SIGINT come meanwhile: somebody presses Ctrl-C."""


@dataclass(frozen=True)
class Release:
    """Let the process go on, and look no further."""


Action = Kill | Fail | Shorten | Interrupt | Release | None
Script = Callable[[int, str], Action]
"""Number of the call that matters, from 0, and its name -> what to do."""


@dataclass(frozen=True)
class Ended:
    """How a process ended: its wait status, and how many calls that matter it made."""

    status: int
    calls: int


_libc = ctypes.CDLL(None, use_errno=True)


def works() -> bool:
    """Tell whether processes can be traced here."""
    if platform.machine() != "x86_64":
        return False
    return run(lambda: 0, lambda number, name: None).status == 0


def _ptrace(request: int, pid: int, data: object = None) -> None:
    if _libc.ptrace(request, pid, None, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def run(work: Callable[[], int], script: Script, calls: frozenset[str] = CHANGING) -> Ended:
    """Run `work` in a child; `script` decides at each of the `calls`."""
    pid = os.fork()
    if not pid:
        try:
            _libc.ptrace(TRACEME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(work())
        except BaseException:  # no caller of the parent's may see it
            traceback.print_exc()
        finally:
            os._exit(99)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSTOPPED(status):
        return Ended(status, -1)
    _ptrace(SETOPTIONS, pid, ctypes.c_void_p(TRACESYSGOOD | EXITKILL))
    return _drive(pid, script, calls)


def _drive(pid: int, script: Script, calls: frozenset[str]) -> Ended:
    number, entering, forward = 0, True, 0
    pending: Action = None
    while True:
        with contextlib.suppress(ProcessLookupError):  # killed, and not yet waited for
            _ptrace(SYSCALL, pid, ctypes.c_void_p(forward))
        _, status = os.waitpid(pid, 0)
        forward = 0
        if not os.WIFSTOPPED(status):
            return Ended(status, number)
        if os.WSTOPSIG(status) != signal.SIGTRAP | 0x80:
            forward = os.WSTOPSIG(status)
            continue
        registers = Registers()
        if entering:
            _ptrace(GETREGS, pid, ctypes.byref(registers))
            name = NAMES.get(registers.orig_rax, "")
            if name in calls and _matters(name, registers, calls):
                pending = script(number, name)
                number += 1
                if isinstance(pending, Release):
                    _ptrace(DETACH, pid)
                    return Ended(os.waitpid(pid, 0)[1], number)
                _begin(pid, pending, name, registers)
        elif pending is not None:
            _ptrace(GETREGS, pid, ctypes.byref(registers))
            if isinstance(pending, Kill):
                os.kill(pid, signal.SIGKILL)
            elif isinstance(pending, Fail):
                registers.rax = (1 << 64) - pending.errno
                _ptrace(SETREGS, pid, ctypes.byref(registers))
            pending = None
        entering = not entering


def _matters(name: str, registers: Registers, calls: frozenset[str]) -> bool:
    if name == "openat" and calls is CHANGING:
        return bool(registers.rdx & os.O_CREAT)
    if name in ("write", "pwrite64", "ioctl", "read"):
        return registers.rdi > 2
    return True


def _begin(pid: int, action: Action, name: str, registers: Registers) -> None:
    """Do what an action asks for at the beginning of a call."""
    if isinstance(action, Kill) and not (action.half and name in COUNT_REGISTER):
        os.kill(pid, signal.SIGKILL)
    elif isinstance(action, Interrupt):
        os.kill(pid, signal.SIGINT)
    elif isinstance(action, Fail):
        registers.orig_rax = (1 << 64) - 1
        _ptrace(SETREGS, pid, ctypes.byref(registers))
    elif isinstance(action, (Shorten, Kill)) and name in COUNT_REGISTER:
        register = COUNT_REGISTER[name]
        setattr(registers, register, max(1, getattr(registers, register) // 2))
        _ptrace(SETREGS, pid, ctypes.byref(registers))
