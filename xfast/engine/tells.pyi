from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

def words(areas: NDArray[np.uint8], out: NDArray[np.uint64], mxcsr_mask: int) -> None: ...

class Known:
    def look_up(
        self, told: NDArray[np.uint64], index: NDArray[np.int64], new: Callable[[int], int]
    ) -> None: ...
