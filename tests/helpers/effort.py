"""How long something takes on the machine at hand, whatever that is and whatever else it does.

CPU time of this process, in units of a fixed piece of Python that is timed every other second: a
bound holds on a slow machine as on a fast one. What takes long has the piece timed behind it as
well, since the machine may have got busier meanwhile. The garbage collector does not walk what
other tests left, which once took longer than what was measured. A second stands for a CPU that does
the piece in 10 ms.
"""

import contextlib
import gc
import time

PIECE = 0.010
AGE = 2.0
"""Seconds of CPU time after which the piece is timed anew."""

LONG = 0.2
"""Seconds of CPU time from which the piece is timed behind a block too."""

_timed = (0.0, float("-inf"))
"""What the piece took, and when that was found."""


def _piece():
    begin = time.process_time()
    number = 0
    for i in range(200_000):
        number ^= i
    return time.process_time() - begin


def _unit(age=AGE):
    """Return what the piece takes at present, the best of three."""
    global _timed
    if time.process_time() - _timed[1] > age:
        _timed = max(min(_piece() for _ in range(3)), 1e-4), time.process_time()
    return _timed[0]


class Clock:
    """Measure a block: `seconds` of a CPU that does the piece in 10 ms."""

    seconds = 0.0

    def __enter__(self):
        gc.freeze()
        self._unit = _unit()
        self._begin = time.process_time()
        return self

    def __exit__(self, *exception):
        taken = time.process_time() - self._begin
        gc.unfreeze()
        unit = max(self._unit, _unit(LONG)) if taken > LONG else self._unit
        self.seconds = taken * PIECE / unit


@contextlib.contextmanager
def at_most(seconds):
    """Fail if the block takes more than so many seconds of a CPU that does the piece in 10 ms."""
    with Clock() as clock:
        yield
    assert clock.seconds < seconds, f"took {clock.seconds:.2f} s, expected less than {seconds}"
