"""A scan: chunks of inputs led through an executor, each result kept before it counts.

What was with a worker that died is tried again alone, and halved where that kills a worker too,
until the one input is found that does: a row with that reason. Chunks are large, so that handing
them out is less than a hundredth of the work, and only a few are on the way at any time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from xfast.errors import XfastError
from xfast.fleet import inputs
from xfast.fleet.dataset import Dataset
from xfast.fleet.judging import Question, Result, fail, judge

CHUNK = 1000
"""How many inputs a worker gets at a time."""


@dataclass
class Progress:
    """How far a scan is: what is counted so far, for whoever shows it."""

    total: int | None = None
    inputs: int = 0
    resumed: int = 0
    snapshots: int = 0
    failed: int = 0
    words: dict[str, int] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def count(self, names: int, kept: dict[str, Any], *, resumed: bool) -> None:
        """Count a chunk."""
        self.inputs += names
        self.resumed += names * resumed
        self.snapshots += kept["snapshots"]
        self.failed += kept["failed"]
        for word, number in kept["words"].items():
            self.words[word] = self.words.get(word, 0) + number

    @property
    def rate(self) -> float:
        """Inputs a second, those of an earlier run not counted."""
        return (self.inputs - self.resumed) / max(time.monotonic() - self.started, 1e-9)


@dataclass
class _Chunk:
    """Inputs that are kept together: their names, and the results that have come in by start."""

    names: tuple[str, ...]
    key: str
    left: int = 0
    results: dict[int, Result] = field(default_factory=dict)


class _Part(NamedTuple):
    """The inputs of a chunk, from `start` to `stop`, that one worker gets."""

    chunk: _Chunk
    start: int
    stop: int

    @property
    def names(self) -> tuple[str, ...]:
        return self.chunk.names[self.start : self.stop]

    def halves(self) -> list[_Part]:
        middle = (self.start + self.stop) // 2
        return [_Part(self.chunk, self.start, middle), _Part(self.chunk, middle, self.stop)]


class _Pool:
    """Where chunks are judged: this process, processes of our own, or an executor that is given.

    Parameters
    ----------
    jobs : int
        Processes; 1: this one.
    executor : Executor or None
        Instead of processes of our own.
    """

    def __init__(self, jobs: int, executor: Executor | None) -> None:
        self.jobs = jobs
        self.given = executor
        self.at_once = 2 * jobs if executor is None else max(4 * jobs, 16)
        self.own: ProcessPoolExecutor | None = None

    def submit(self, names: Sequence[str], packed: bytes) -> Future[Result]:
        """Hand out a chunk."""
        if self.given is not None:
            return self.given.submit(judge, names, packed)
        if self.jobs == 1:
            future: Future[Result] = Future()
            future.set_result(judge(names, packed))
            return future
        try:
            return self._processes().submit(judge, names, packed)
        except BrokenExecutor:  # its other parts come back with this error too
            self.renew()
            return self.submit(names, packed)

    def _processes(self) -> ProcessPoolExecutor:
        """Return processes of our own; they start when they get work."""
        if self.own is None:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["xfast.fleet.judging"])
            self.own = ProcessPoolExecutor(self.jobs, context, _live_with_parent)
        return self.own

    def renew(self) -> None:
        """Start new processes, after one has died.

        Raises
        ------
        XfastError
            If the executor is not ours, or no process can start.
        """
        if self.given is not None:
            raise XfastError("scan: the executor is broken; the same command goes on from here")
        if self.own is not None:
            self.own.shutdown(wait=False, cancel_futures=True)
            self.own = None
        try:
            self._processes().submit(os.getpid).result()
        except BrokenExecutor:
            raise XfastError(
                "scan: expected worker processes to start, got some that end at once; a script "
                "that scans does so under if __name__ == '__main__'"
            ) from None

    def close(self) -> None:
        """End the processes of our own."""
        if self.own is not None:
            self.own.shutdown(cancel_futures=True)


def _live_with_parent() -> None:
    """End this worker when the process it works for ends, however; Ctrl-C ends it silently."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def end() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def scan(
    names: Sequence[str],
    hosts: Sequence[Any],
    results: str | os.PathLike[str],
    *,
    policy: Any = None,
    jobs: int | None = None,
    executor: Executor | None = None,
    chunk: int = CHUNK,
    on_progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Judge any number of inputs against hosts, into a Parquet dataset.

    Parameters
    ----------
    names : sequence of str
        Files, directories and URLs (``s3://bucket/prefix/``).
    hosts : sequence of Host
    results : path
        The folder of the dataset; see `xfast.fleet.dataset`. A scan that was stopped goes on
        where it was, and its dataset is the same; after one that was complete all is judged anew.
    policy : Policy, optional
        What to ask of the hosts.
    jobs : int, optional
        Processes; default: the CPUs that this process may use.
    executor : concurrent.futures.Executor, optional
        Who judges, instead of processes of our own: any executor, dask's included.
    chunk : int
        Inputs that are handed out at a time.
    on_progress : callable, optional
        Called with a `Progress` when chunks are finished.
    **options
        layout, size, expand_limit: as for `xfast.read`.

    Returns
    -------
    dict
        The manifest: what was asked, the parts, how many snapshots were judged and how.

    Raises
    ------
    XfastError
        If the folder is in use, holds something else, or can't be written; if an executor that
        was given breaks.
    """
    from xfast.judge.verdict import Policy

    question = Question(tuple(hosts), policy or Policy(), options)
    progress = Progress(total=inputs.count(names))
    pool = _Pool(jobs or len(os.sched_getaffinity(0)), executor)
    with Dataset(os.fspath(results), question) as dataset:
        try:
            for kept, size, resumed in _finished(names, dataset, pool, chunk):
                progress.count(size, kept, resumed=resumed)
                if on_progress:
                    on_progress(progress)
        finally:
            pool.close()
        return dataset.finish()


Kept = tuple[dict[str, Any], int, bool]
"""What is kept of a chunk, how many inputs it has, and whether an earlier run finished it."""


def _finished(names: Sequence[str], dataset: Dataset, pool: _Pool, size: int) -> Iterator[Kept]:
    """Yield each chunk when it is finished."""
    pending: dict[Future[Result], _Part] = {}
    for chunk_names in inputs.chunks(inputs.expand(names, dataset.folder), size):
        chunk = _Chunk(chunk_names, dataset.key(chunk_names), len(chunk_names))
        kept = dataset.finished(chunk.key)
        if kept is not None:
            yield kept, len(chunk_names), True
            continue
        part = _Part(chunk, 0, len(chunk_names))
        pending[pool.submit(part.names, dataset.packed)] = part
        while len(pending) >= pool.at_once:
            yield from _collect(pool, pending, dataset)
    while pending:
        yield from _collect(pool, pending, dataset)


def _collect(pool: _Pool, pending: dict[Future[Result], _Part], dataset: Dataset) -> Iterator[Kept]:
    """Wait for a part; yield the chunks that are whole then; try alone what a worker died of."""
    done, _ = wait(pending, return_when=FIRST_COMPLETED)
    suspects: list[_Part] = []
    for future in done:
        part = pending.pop(future)
        problem = future.exception()
        if problem is None:
            yield from _keep(part, future.result(), dataset)
        elif isinstance(problem, BrokenExecutor):
            suspects += [part, *pending.values()]
            pending.clear()
            pool.renew()
            break
        else:
            suspects.append(part)
    while suspects:
        part = suspects.pop()
        try:
            result = pool.submit(part.names, dataset.packed).result()
        except Exception as problem:
            if isinstance(problem, BrokenExecutor):
                pool.renew()
            if part.stop - part.start > 1:
                suspects += part.halves()
                continue
            result = Result()
            fail(part.names[0], "the worker that judged it died", result)
        yield from _keep(part, result, dataset)


def _keep(part: _Part, result: Result, dataset: Dataset) -> Iterator[Kept]:
    """Add a part's result to its chunk; yield the chunk if that was the last."""
    chunk = part.chunk
    chunk.results[part.start] = result
    chunk.left -= part.stop - part.start
    if not chunk.left:
        yield dataset.add(chunk.key, _joined(chunk)), len(chunk.names), False


def _joined(chunk: _Chunk) -> Result:
    """Return the results of a chunk as one, in the order of its names."""
    joined = Result()
    for _, result in sorted(chunk.results.items()):
        joined.rows += result.rows
        joined.classes |= result.classes
        joined.snapshots += result.snapshots
        joined.failed += result.failed
        for word, number in result.words.items():
            joined.words[word] = joined.words.get(word, 0) + number
    return joined
