"""Free memory that the allocator of the C library keeps, and does not give back by itself.

A server has messages of many sizes in many threads. glibc keeps the pieces between those that are
in use, so the memory of a process that runs for days grows although nothing is held.
"""

import ctypes


def give_back() -> bool:
    """Give free memory of this process back to the system; return whether there was some.

    Only glibc can do so; with another C library nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return bool(trim and trim(0))
