from collections.abc import Callable

from xfast.engine.walk import Walker

def read_and_narrow(fd: int, into: bytearray | memoryview, capacity: int) -> tuple[int, bool]: ...
def write_all(fd: int, data: bytes | bytearray | memoryview) -> None: ...
def pass_memory(
    walker: Walker,
    source: int,
    target: int,
    buffer: bytearray | memoryview,
    have: int,
    small: int,
    large: int,
    watch: Callable[[int, int], None] | None,
) -> tuple[int, bool]: ...
