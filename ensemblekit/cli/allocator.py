"""Owns how the process hands freed memory back: later than C's allocator would by itself.

Input: nothing; called by commands that run models, before they do. A network frees and allocates
its activations layer by layer. glibc returns blocks of this size to the system at once, and the
system clears each page again at the next layer: half of the time of a small network on a CPU.
"""

import contextlib
import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_KEPT, _LARGEST = 1 << 30, 1 << 29  # bytes: free memory kept at most; blocks kept at all
_OLD_LARGEST = 1 << 25  # what glibc before 2.35 accepts


def keep_freed_memory() -> None:
    """Keep up to 1 GiB of freed memory for the next layer; nothing where libc is not glibc.

    Settings of the user's own (`MALLOC_*`, `GLIBC_TUNABLES`) are left alone.
    """
    own = [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]
    if own or not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(AttributeError, OSError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt
        if not mallopt(_MMAP_THRESHOLD, _LARGEST):
            mallopt(_MMAP_THRESHOLD, _OLD_LARGEST)
        mallopt(_TRIM_THRESHOLD, _KEPT)
