"""Peak resident memory of this process: since a reset, and since the process started.

Linux lets a process reset its own high-water mark, which also resets what `getrusage` says. The largest mark before a
reset is therefore remembered here. Elsewhere, and where the reset is not allowed, the mark is that since the start.
"""

import ctypes
import resource
import sys
from contextlib import suppress
from pathlib import Path

_RESET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_MAXRSS_UNITS_PER_GIB = 2**30 if sys.platform == "darwin" else 2**20
_KIB_PER_GIB = 2**20


class _Largest:
    """Largest mark that a reset has cleared; a fact of the process, like the mark itself."""

    gib = 0.0


def reset_peak() -> None:
    """Starts a new measurement, where the system allows it."""
    _Largest.gib = process_peak_gib()
    give_back()
    try:
        _RESET.write_text("5", encoding="ascii")
    except OSError:
        return


def give_back() -> None:
    """Returns freed memory to the system (glibc only).

    Else it counts for the next computation; and where blocks come and go, it grows with each of them, because what is
    freed between small things that stay is not found again.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_gib() -> float:
    """Peak resident memory since the last reset, GiB (2³⁰ bytes)."""
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / _KIB_PER_GIB
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _MAXRSS_UNITS_PER_GIB


def process_peak_gib() -> float:
    """Peak resident memory since the process started, GiB (2³⁰ bytes)."""
    return max(_Largest.gib, peak_gib())
