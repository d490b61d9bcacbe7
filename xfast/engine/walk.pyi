NEEDED: int

class Walker:
    position: int
    skip: int
    devices: int
    early: bool
    head: int
    return_path: bool
    ended: bool
    trouble: tuple[int, str, str] | None
    def __init__(self, start: int = 0) -> None: ...
    @property
    def stopped(self) -> bool: ...
    def jump(self) -> None: ...
    def feed(self, data: bytes | bytearray | memoryview) -> int: ...

def read_and_narrow(fd: int, into: bytearray | memoryview, capacity: int) -> tuple[int, bool]: ...
