"""Which of two ways to fetch rows ahead is quicker on this machine: tried out, once.

Lines that a row needs can be fetched one by one, or whole rows, holes and all. CPUs differ: on
Zen 4 and Sapphire Rapids picking wins; on Zen 3 a software prefetch costs 7 ns against 4 of linear
reading, and the hardware goes on into the next page only after one that was read to its end, so
whole rows win by a third where more than half of them is needed. The first large batch is
therefore its own measurement: slices of it run in turn this way and that, each result counts, and
whole rows stay if they win most of the pairs. They are its last slices, as its first ones find the
caches full of what was written before, which has to go to memory first: on Zen 4 that doubles the
time of picking lines, and whole rows won.

Rejected: a table of vendors and families (unknown for the next CPU, and hypervisors disguise
them), a measurement on memory of its own (64 MiB to be beyond the caches: 50 ms), and the quickest
slice each way (a single one that found its rows in a cache decided for all that followed).
"""

from posix.time cimport CLOCK_THREAD_CPUTIME_ID, clock_gettime, timespec

cdef extern from *:
    """
    static inline int xfast_exchange(int *p, int value)
    {
        return __atomic_exchange_n(p, value, __ATOMIC_ACQ_REL);
    }
    """
    int xfast_exchange(int *p, int value) nogil

cdef enum:
    UNKNOWN = -1
    SLICE = 256  # rows timed at a time: 1 MiB, so that a clock and an interruption weigh little
    SAMPLES = 16  # slices, both ways together: two a pair
    WINS = 5  # pairs that whole rows have to win

cdef struct Trial:
    int choice  # 1: whole rows, 0: the lines needed, or UNKNOWN
    int taken  # samples
    int wins  # pairs in which whole rows were quicker
    double seconds[2]  # of the pair at hand
    int busy  # a thread measures


cdef inline double now() noexcept nogil:
    """Return the seconds that this thread has run, so that what else runs counts less."""
    cdef timespec t
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t)
    return <double>t.tv_sec + 1e-9 * <double>t.tv_nsec


cdef inline bint begin(Trial *trial) noexcept nogil:
    """Whether the caller is to measure: the choice is open, and no other thread is at it."""
    return trial.choice == UNKNOWN and xfast_exchange(&trial.busy, 1) == 0


cdef inline void end(Trial *trial) noexcept nogil:
    xfast_exchange(&trial.busy, 0)


cdef inline Py_ssize_t untried(Py_ssize_t n) noexcept nogil:
    """Return how many of `n` rows come before the slices of a trial."""
    return max(n - SAMPLES * SLICE, <Py_ssize_t>0)


cdef inline bint next_way(const Trial *trial) noexcept nogil:
    """Return 0, 1, 1, 0 and so on: page faults at every other slice meet both ways."""
    return (trial.taken + 1) >> 1 & 1


cdef inline void note(Trial *trial, bint way, double seconds) noexcept nogil:
    """Take a sample of a way, and choose once there are enough; a tie goes to picking lines."""
    trial.seconds[way] = seconds
    trial.taken += 1
    if trial.taken & 1 == 0:
        trial.wins += trial.seconds[1] < 0.92 * trial.seconds[0]
    if trial.taken == SAMPLES:
        trial.choice = trial.wins >= WINS


cdef inline void force(Trial *trial, int choice) noexcept nogil:
    trial.choice = choice
    trial.taken = trial.wins = 0
