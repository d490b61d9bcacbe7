import numpy as np
from numpy.typing import NDArray

def words(areas: NDArray[np.uint8], out: NDArray[np.uint64], mxcsr_mask: int) -> None: ...
