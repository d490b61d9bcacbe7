"""A program that repairs a file again and again, killed at another of its steps each time.

``killing.py MODE FILE HOST``: a step is a write (half of it done), rename, link, sync, open, ...
Prints a line of JSON for each step: how the child ended, what it left, and what was there when the
repair had been run again; the last one is that of a child that came through. MODE is ``replace``,
``patch``, ``backup``, ``patch-backup`` or ``new``.
"""

import hashlib
import io
import itertools
import json
import os
import pathlib
import signal
import sys

import xfast
from xfast.repair import amend
from xfast.store import rewrite

STEPS = ("rename", "link", "unlink", "fsync", "fchmod", "utime", "copy_file_range", "open")

point = 0


def strike() -> None:
    global point
    if not point:
        os.kill(os.getpid(), signal.SIGKILL)
    point -= 1


def struck(name):
    real = getattr(os, name)

    def step(*args, **kwargs):
        strike()
        result = real(*args, **kwargs)
        strike()
        return result

    return step


real_pwrite, real_fdopen = os.pwrite, os.fdopen


def pwrite(fd, data, offset):
    half = len(data) // 2
    strike()
    real_pwrite(fd, data[:half], offset)
    strike()
    real_pwrite(fd, data[half:], offset + half)
    strike()
    return len(data)


class Raw(io.FileIO):
    def write(self, data):
        strike()
        half = bytes(data)[: max(1, len(data) // 2)]
        return super().write(half)


def fdopen(fd, mode):
    return io.BufferedRandom(Raw(fd, "r+b")) if mode == "w+b" else real_fdopen(fd, mode)


def hook() -> None:
    for name in STEPS:
        setattr(os, name, struck(name))
    os.pwrite, os.fdopen = pwrite, fdopen


def repair(path: str, mode: str, host) -> None:
    rewrite.recover(path)
    plan = xfast.plan_fix(xfast.read(path)[0], host)
    where = {"output": path + ".new"} if mode == "new" else {"in_place": True}
    plan.apply(**where, backup=mode.endswith("backup"))


def main(mode: str, path: str, host_name: str) -> None:
    global point
    folder = pathlib.Path(path).parent
    old = pathlib.Path(path).read_bytes()
    host = xfast.resolve(host_name)
    amend.PATCH_FROM = 0 if mode.startswith("patch") else amend.PATCH_FROM
    for step in itertools.count():
        for left in folder.iterdir():
            left.unlink()
        pathlib.Path(path).write_bytes(old)
        child = os.fork()
        if not child:
            point = step
            hook()
            repair(path, mode, host)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        recovered = os.path.exists(path) and rewrite.recover(path)
        left = {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in folder.iterdir()}
        if mode != "new" or not os.path.exists(path + ".new"):
            repair(path, mode, host)
        again = sorted(one.name for one in folder.iterdir())
        print(json.dumps({"status": status, "recovered": recovered, "left": left, "again": again}))
        if not status:
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
