"""A child in an old sandbox: it answers the same error to all system calls newer than itself.

*Source*: seccomp(2); Linux include/uapi/linux/seccomp.h, filter.h; docker's default profile of
before 2020 answers EPERM to what it does not know.
"""

import ctypes
import os
import platform
import struct
import traceback
from collections.abc import Callable, Iterable

NEW_CALLS = {"renameat2": 316, "copy_file_range": 326, "openat2": 437, "faccessat2": 439}
"""On x86-64; those that xfast, or the C library for it, makes. Docker always knew the first two."""

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, FILTER = 38, 22, 2
LOAD_NUMBER = (0x20, 0, 0, 0)
JUMP_EQUAL, RETURN = 0x15, 0x06
ALLOW, ANSWER = 0x7FFF0000, 0x00050000

_libc = ctypes.CDLL(None, use_errno=True)


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _forbid(numbers: list[int], error: int) -> bool:
    """Let calls fail from now on; return whether the system lets us."""
    rows = [LOAD_NUMBER]
    rows += [(JUMP_EQUAL, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    rows += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ANSWER | error)]
    program = Program(len(rows), b"".join(struct.pack("<HBBI", *row) for row in rows))
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return not _libc.prctl(PR_SET_SECCOMP, FILTER, ctypes.byref(program), 0, 0)


def run(work: Callable[[], int], names: Iterable[str], error: int) -> int:
    """Run `work` in such a child; return what it returns, or -1 where there are no sandboxes."""
    if platform.machine() != "x86_64":
        return -1
    pid = os.fork()
    if not pid:
        try:
            os._exit(work() if _forbid([NEW_CALLS[name] for name in names], error) else 254)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(99)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return -1 if code == 254 else code
