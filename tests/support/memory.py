"""How much memory a process has held."""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import resource
except ImportError:  # Windows: no peak memory there
    resource = None  # type: ignore[assignment]

_STATUS = Path("/proc/self/status")


def peak_bytes() -> int | None:
    """Returns the largest resident memory of this process so far; None where the system does not say.

    On Linux, `getrusage` begins with the memory of the process that started this one, and its own is what `/proc` says.
    """
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name == "VmHWM":
                return int(value.split()[0]) * 1024
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # macOS counts bytes, others KiB
