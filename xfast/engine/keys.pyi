from typing import Any

def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool: ...
def alike(data: bytes, one: int, other: int, runs: bytes) -> bool: ...

class Seen:
    def __init__(self, bounds: bytes, limit: int) -> None: ...
    def find(
        self, data: bytes, start: int, size: int, owner: object, mask: int
    ) -> tuple[Any, bytes] | None: ...
    def add(
        self,
        data: bytes,
        start: int,
        size: int,
        owner: object,
        mask: int,
        by_bytes: bool,
        table: Any,
        what: Any,
    ) -> tuple[Any, bytes]: ...
    def clear(self) -> None: ...
