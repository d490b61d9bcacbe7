from xfast._core import Areas, Table

PEERS: tuple[str, ...]

def run(
    name: str,
    table: Table,
    src: Areas,
    out: Areas,
    *,
    mask: int,
    software: int,
    mxcsr_mask: int,
    times: int = 1,
) -> float: ...
