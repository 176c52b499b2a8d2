"""The C library's allocator, told to keep what it has: temporaries of a training step then come without page faults."""

from __future__ import annotations

import ctypes
import platform

# malloc.h of the GNU C library: mallopt's parameters.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def tune_malloc(trim_threshold: int = 1 << 30, top_pad: int = 1 << 26) -> bool:
    r"""Keep freed memory in the process instead of giving it back to the system after every operation.

    By default glibc takes blocks above 128 KiB to 32 MiB (a bound that moves) straight from the system and returns them
    when they are freed, and returns free memory above the last block in use. A training step on the CPU then asks for
    the same temporaries over and over, and the system zeroes each of their pages anew. This function switches both off
    for the whole process, until it ends; memory that a step has used stays reserved for the next, up to the largest
    step's peak, plus ``trim_threshold`` at most.

    It is never called by the library itself: call it once, before training. What it gains depends on how large the
    temporaries are; docs/design.md has measurements. It has no effect on results, on GPU memory, or where another
    allocator (jemalloc, tcmalloc) replaces glibc's.

    Args:
        trim_threshold: bytes of free memory at the heap's end that are kept; more is given back.
        top_pad: bytes that the heap grows by at once, at least.

    Returns:
        True where glibc accepted all settings; False, and nothing was changed, with another C library.

    Raises:
        ValueError: a size that is negative or does not fit 31 bits.

    Example:
        >>> import pyflowgen
        >>> pyflowgen.tune_malloc() in (True, False)
        True
    """
    for name, value in (("trim_threshold", trim_threshold), ("top_pad", top_pad)):
        if not 0 <= value < 1 << 31:
            raise ValueError(f"tune_malloc: {name} is {value}, expected 0 to 2**31 - 1")
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, trim_threshold), (_M_TOP_PAD, top_pad))
    return all([mallopt(parameter, value) == 1 for parameter, value in settings])
