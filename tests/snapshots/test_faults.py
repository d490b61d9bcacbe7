"""Reading what does not hold still: calls that fail or come short, files that shrink or vanish.

Each reader runs in a process that is stopped at its system calls (`tracing`). What it says is what
it says of the file as it is, or one error; short and interrupted calls make no difference.
"""

import errno
import os
import sys

import pytest
import tracing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snapshot_files import BUILDERS

from xfast import snapshots
from xfast.errors import XfastError

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not tracing.works(), reason="needs ptrace"
)

CALLS = frozenset({"pread64", "read", "lseek", "openat", "openat2", "newfstatat"})
MOVING = frozenset({"pread64", "read"})
SAME, REFUSED, OTHER = 0, 1, 2


def told(path):
    """Return all that a reader says of the vCPUs of a file."""
    return [
        [(vcpu.index, vcpu.area.tobytes(), vcpu.xcr0) for vcpu in snapshot.vcpus]
        for snapshot in snapshots.read(path)
    ]


def reading(path, expected):
    """Return what a child is to do: read, and say how that compares with what is expected."""

    def work():
        try:
            return SAME if told(path) == expected else OTHER
        except (XfastError, OSError):
            return REFUSED

    return work


@pytest.fixture(params=BUILDERS)
def snapshot(request, tmp_path):
    """Return a snapshot of each format, and what its reader says: the modules are loaded then."""
    files = BUILDERS[request.param]()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    path = tmp_path if len(files) > 1 else tmp_path / next(iter(files))
    return path, told(path)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    faults=st.dictionaries(
        st.integers(0, 25),
        st.sampled_from((errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOENT, errno.EINTR)).map(
            tracing.Fail
        ),
        min_size=1,
        max_size=2,
    )
)
def test_a_call_that_fails_is_an_error_or_nothing(snapshot, faults):
    path, expected = snapshot
    ended = tracing.run(reading(path, expected), lambda number, _: faults.get(number), CALLS)
    assert os.WIFEXITED(ended.status)
    assert os.WEXITSTATUS(ended.status) in (SAME, REFUSED)


@pytest.mark.parametrize("fault", [tracing.Shorten(), tracing.Fail(errno.EINTR)])
def test_short_and_interrupted_reads_make_no_difference(snapshot, fault):
    path, expected = snapshot
    for odd in (0, 1):
        script = lambda number, _: fault if number % 2 == odd else None  # noqa: B023, E731
        ended = tracing.run(reading(path, expected), script, MOVING)
        assert os.WIFEXITED(ended.status)
        assert os.WEXITSTATUS(ended.status) == SAME


@pytest.mark.parametrize("what", ["cut", "empty", "gone", "grown", "other"])
def test_a_file_that_changes_between_any_two_reads(snapshot, what):
    """What was read is the file as it was, or an error: never a mixture that nobody wrote."""
    path, expected = snapshot
    whole = {one: one.read_bytes() for one in (path.iterdir() if path.is_dir() else [path])}
    victim = sorted(whole)[-1]

    def change():
        if what == "gone":
            victim.unlink()
        elif what == "other":
            victim.unlink()
            victim.write_bytes(b"another file")
        elif what == "grown":
            with open(victim, "ab") as file:
                file.write(bytes(5000))
        else:
            os.truncate(victim, len(whole[victim]) // 2 if what == "cut" else 0)

    step = 0
    while True:
        for one, data in whole.items():
            one.write_bytes(data)
        names = []

        def script(_, name, names=names, step=step):
            if names or name == "pread64":  # before that it is another file from the start
                names.append(name)
            if len(names) <= step:
                return None
            change()
            return tracing.Release()

        ended = tracing.run(reading(path, expected), script, CALLS)
        assert os.WIFEXITED(ended.status)
        if what != "grown":
            assert os.WEXITSTATUS(ended.status) in (SAME, REFUSED), step
        if len(names) <= step:
            break
        step += 1
    assert step > 0
