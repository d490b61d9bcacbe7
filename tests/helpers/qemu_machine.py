"""A real QEMU for the tests: started paused, driven over QMP, its registers read back."""

import json
import os
import subprocess

import pytest
from qemu_files import registers_of

PROGRAM = "qemu-system-x86_64"
SECONDS = 60
BARE = ("-nodefaults", "-no-user-config", "-display", "none", "-S", "-qmp", "stdio")
GUESTS = {
    "tcg": ("-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "16", "-machine", "pc"),
    "kvm": ("-accel", "kvm", "-cpu", "qemu64,-arch-capabilities", "-m", "16", "-machine", "pc"),
}


class Machine:
    """A paused QEMU, driven over QMP on its standard input and output."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [PROGRAM, *arguments, *BARE], stdin=-1, stdout=-1, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self):
        self.events()
        self.run("qmp_capabilities")
        return self

    def __exit__(self, problem, *_):
        if problem is None:
            self.run("quit")
        else:
            self.process.kill()
        self.process.communicate()

    def events(self):
        line = self.process.stdout.readline()
        if not line:
            raise EOFError(self.process.stderr.read())
        return json.loads(line)

    def run(self, command, **arguments):
        line = json.dumps({"execute": command, "arguments": arguments})
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        while "return" not in (answer := self.events()):
            assert "error" not in answer, answer
        return answer["return"]

    def monitor(self, line):
        return self.run("human-monitor-command", **{"command-line": line})

    def migrated(self):
        for _ in range(SECONDS * 100):
            status = self.run("query-migrate").get("status")
            if status in ("completed", "failed"):
                return status
            subprocess.run(["sleep", "0.01"], check=True)
        return "late"

    def save(self, path):
        self.monitor(f'migrate -d "exec:cat > {path}"')
        assert self.migrated() == "completed"

    def registers(self):
        return list(registers_of(self.monitor("info registers -a")))


def guest(accelerator):
    if accelerator == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm can't be opened")
    return GUESTS[accelerator]


def restored(arguments, path):
    """Return what the first vCPU's registers hold after a restore."""
    with Machine(*arguments, "-incoming", f"exec:cat {path}") as machine:
        assert machine.migrated() == "completed"
        return machine.registers()[0]
