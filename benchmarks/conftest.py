"""Areas to measure with, and the limits of the machine beside every result."""

import pytest

from xfast.bench.engine import INTEL, fill, machine
from xfast.engine import clock
from xfast.xsave import area


@pytest.fixture(params=["mixed", "full"])
def mix(request):
    return request.param


@pytest.fixture(params=[1, 64, 1024, 16384])
def n(request):
    return request.param


@pytest.fixture
def few(n):
    """Skip what takes microseconds an area where there are many."""
    if n > 1024:
        pytest.skip("area by area this takes seconds")


@pytest.fixture
def areas(n, mix):
    """Random data in present components, poison in absent ones."""
    rows = area.empty(n, 4096)
    fill(rows, INTEL, mix)
    return rows


@pytest.fixture
def out(n):
    return area.empty(n, 4096)


@pytest.fixture
def measure(benchmark, areas, n, mix):
    """Measure a call; record what copying and what reading the same bytes takes."""

    def run(call, *args, **how):
        benchmark.group = f"{n} {mix}"
        limit = area.empty(n, 4096)
        source, target = areas.reshape(-1), limit.reshape(-1)
        copies = [clock.copy(source, target, n > 2048) for _ in range(5)]
        reads = [clock.read(source) for _ in range(5)]
        benchmark.extra_info.update(
            areas=n, mix=mix, copy_ns=min(copies) / n * 1e9, read_ns=min(reads) / n * 1e9
        )
        return benchmark.pedantic(call, args, **how) if how else benchmark(call, *args)

    return run


def pytest_benchmark_update_machine_info(machine_info):
    """Keep the facts that results depend on, and no names."""
    machine_info.clear()
    machine_info.update(machine())
