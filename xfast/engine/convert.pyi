from xfast._core import U32, U64, Areas, Table

class Plans: ...

class Converter(Plans):
    def __init__(
        self,
        source: Table,
        target: Table,
        mask: int,
        *,
        xcomp_bv: int = 0,
        ragged: bool = False,
        kernel: bool = False,
        foreign_pkru: bool = False,
        mxcsr_mask: int = 0,
        software: int = 0,
    ) -> None: ...
    def convert(
        self, src: Areas, out: Areas, lost: U64 | None = None, pkru: U32 | None = None
    ) -> int: ...

class Merger(Plans):
    def __init__(
        self,
        source: Table,
        target: Table,
        mask: int,
        *,
        mxcsr: bool | None = None,
        user_xfeatures: int | None = None,
        mxcsr_mask: int = 0,
    ) -> None: ...
    def merge(self, src: Areas, into: Areas, status: U32 | None = None) -> int: ...

def swap(
    save: Merger, load: Merger, registers: Areas, leave: Areas, enter: Areas, lost: U64
) -> int: ...
