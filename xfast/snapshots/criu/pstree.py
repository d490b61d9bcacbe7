"""Which threads a checkpoint has: pstree.img names them, and a core image says if one was dead.

*Source*: CRIU images/pstree.proto, core.proto (task_core_entry); compel
include/uapi/task-state.h.
"""

from __future__ import annotations

from xfast.snapshots.criu.wire import fields, inner, varint

PID, THREADS = 1, 5
THREAD_LIMIT = 1 << 16
TC, TASK_STATE = 3, 1
DEAD = {2, 6}
"""COMPEL_TASK_DEAD and COMPEL_TASK_ZOMBIE: such a task has no registers."""


def threads_of(process: bytes) -> set[int]:
    """Return the ids of a process's threads, from its entry in pstree.img.

    Raises
    ------
    Broken
        If it is no message.
    """
    found = set()
    for number, value, _ in fields(process, THREAD_LIMIT):
        if number not in (PID, THREADS):
            continue
        if isinstance(value, int):
            found.add(value)
        else:  # packed, as proto3 writes them
            position = 0
            while position < len(value):
                tid, position = varint(value, position)
                found.add(tid)
    return found


def is_dead(core: bytes) -> bool:
    """Tell whether a core image is that of a task that had ended."""
    task = inner(fields(core), TC)
    if task is None:
        return False
    return any(number == TASK_STATE and value in DEAD for number, value, _ in fields(task))
