from typing import Any

class Sections:
    def __init__(
        self, rows: Any, table: Any, runs: Any, numbers: Any, held: Any, longer: int
    ) -> None: ...
    def key(self, data: bytes, first: int, kvm: int) -> tuple[bytes | None, bool]: ...
