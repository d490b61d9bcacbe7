"""Who may read a file: a new one gets no reader that what it was made from does not have.

Permission bits alone do not tell. An access list lends its mask to the bits of the group, and a
folder's default list comes, unasked, to every file that is made there.

*Source*: acl(5), "CORRESPONDENCE BETWEEN ACL ENTRIES AND FILE PERMISSION BITS"; Linux
include/uapi/linux/posix_acl_xattr.h.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from xfast.store.names import SAFE_MODE, Directory, umask

LIST = "system.posix_acl_access"
DEFAULT_LIST = "system.posix_acl_default"
HEAD = 4
ENTRY = struct.Struct("<HHI")
USER_OBJ, USER, GROUP_OBJ, NAMED_GROUP = 1, 2, 4, 8
GROUP = 0o070


class Access(NamedTuple):
    """The permissions that a file gives by its bits, and to whom.

    Parameters
    ----------
    mode : int
        Its group's bits are the group's own, whatever an access list's mask shows.
    uid, gid : int or None
        None: several files, of which it is not one user or group.
    """

    mode: int
    uid: int | None
    gid: int | None

    def and_of(self, other: Access) -> Access:
        """Return what this one and another both give."""
        uid = self.uid if self.uid == other.uid else None
        gid = self.gid if self.gid == other.gid else None
        return Access(self.mode & other.mode, uid, gid)


def access_of(fd: int) -> Access:
    """Return what an open file or folder gives to all whom no entry of a list denies it."""
    status = os.fstat(fd)
    mode = stat.S_IMODE(status.st_mode)
    with contextlib.suppress(OSError, AttributeError):  # no list, or a system without them
        for tag, bits, _ in _entries(os.getxattr(fd, LIST)):
            if tag == GROUP_OBJ:
                mode &= ~GROUP | bits << 3
            elif tag in (USER, NAMED_GROUP):
                mode &= ~0o077 | bits << 3 | bits
    return Access(mode, status.st_uid, status.st_gid)


def access_below(fd: int, names: Iterable[str] | None = None) -> Access:
    """Return what an open folder and the regular files in it (or those named) all give."""
    access = access_of(fd)
    folder = Directory(fd, "")
    for name in os.listdir(fd) if names is None else names:
        status = folder.status(name)
        if status is not None and stat.S_ISREG(status.st_mode):
            try:
                file = folder.open_file(name)
            except PermissionError:  # what is made of it can't hold its bytes either
                continue
            try:
                access = access.and_of(access_of(file))
            finally:
                os.close(file)
    return access


def restrict(fd: int, access: Access, *, safe: int = SAFE_MODE, owned: bool = True) -> None:
    """Give a new file or folder what an original gives, as far as it is safe, under the umask.

    Parameters
    ----------
    fd : int
        It, without an owner's, group's or access list's rights of its own.
    access : Access
    safe : int
        The permissions that it may have at all.
    owned : bool
        Give it the original's owner too, if we may.
    """
    drop_lists(fd)
    uid = access.uid if owned and access.uid is not None else -1
    mode = access.mode & safe & ~umask()
    if access.gid is None or not give(fd, uid, access.gid):
        mode = without_group(mode)
    os.fchmod(fd, mode)


def without_group(mode: int) -> int:
    """Return permissions whose group is not the original's: all have what both had."""
    both = mode & mode >> 3 & 0o007
    return mode & ~0o077 | both << 3 | both


def give(fd: int, uid: int, gid: int) -> bool:
    """Give a file an owner (-1: its own) and a group, if we may; tell whether it has the group."""
    for one in (uid, -1):
        status = os.fstat(fd)
        if (status.st_uid if one == -1 else one, gid) != (status.st_uid, status.st_gid):
            with contextlib.suppress(OSError):  # not ours to give, or unknown in this container
                os.fchown(fd, one, gid)
    return os.fstat(fd).st_gid == gid


def safe_list(found: bytes) -> bytes:
    """Return an access list without what nothing that is written here may give."""
    entries = [
        (tag, bits & (SAFE_MODE >> 6 if tag == USER_OBJ else SAFE_MODE & 7), who)
        for tag, bits, who in _entries(found)
    ]
    return found[:HEAD] + b"".join(ENTRY.pack(*entry) for entry in entries)


def _entries(found: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield an access list's entries: the tag, the permissions, whose they are."""
    whole = (len(found) - HEAD) // ENTRY.size * ENTRY.size
    return ENTRY.iter_unpack(found[HEAD : HEAD + max(whole, 0)])


def drop_lists(fd: int) -> None:
    """Take the access lists off a new file or folder that came with it from its folder."""
    for name in (LIST, DEFAULT_LIST):
        with contextlib.suppress(OSError, AttributeError):  # no list, or a system without them
            os.removexattr(fd, name)
