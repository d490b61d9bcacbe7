NEEDED: int

class Walker:
    position: int
    skip: int
    devices: int
    early: bool
    head: int
    return_path: bool
    last: bool
    ended: bool
    trouble: tuple[int, str, str] | None
    def __init__(self, start: int = 0) -> None: ...
    @property
    def stopped(self) -> bool: ...
    def jump(self) -> None: ...
    def feed(self, data: bytes | bytearray | memoryview) -> int: ...
