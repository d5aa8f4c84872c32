"""When memory runs out: how that is recognised, and how it is freed."""

from __future__ import annotations

import errno
import gc
import re
import sys

#: what allocators say that have no error of their own
SAID = re.compile(
    r"DefaultCPUAllocator|can't allocate memory|cannot allocate memory|out of memory|"
    r"CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|bad_alloc|malloc of size",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device; by name, so that torch need not be
    imported.

    Example:
        >>> from interp.support.memory import is_out_of_memory
        >>> is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 18 GB)"))
        True
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and SAID.search(str(error)) is not None


def free() -> None:
    """Give back what nothing holds any more, also on a GPU."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
