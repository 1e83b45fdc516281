"""This process's share of the machine's memory, in bytes, as Linux counts it. No torch."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")
_MACHINE = Path("/proc/meminfo")
_CONTROL_GROUP = Path("/sys/fs/cgroup/memory.max")
# Writing 5 here sets a process's peak back to what it uses now; see proc(5).
_CLEAR_PEAK = Path("/proc/self/clear_refs")


def used() -> int:
    """Give what this process uses now."""
    return _field(_STATUS, "VmRSS")


def peak() -> int:
    """Give the most that this process has used since :func:`forget_peak`."""
    return _field(_STATUS, "VmHWM")


def forget_peak() -> None:
    """Begin to look for a new peak; where a container forbids it, peaks only grow."""
    with contextlib.suppress(OSError):
        _CLEAR_PEAK.write_text("5", encoding="ascii")


def total() -> int:
    """Give the most that this process may ever use."""
    limits = [_field(_MACHINE, "MemTotal"), _control_group()]
    limits.append(resource.getrlimit(resource.RLIMIT_AS)[0])
    return min(limit for limit in limits if limit > 0)


def usable() -> int:
    """Give what this process uses and could still get."""
    return min(total(), _field(_MACHINE, "MemAvailable") + used())


def _field(path: Path, name: str) -> int:
    lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _control_group() -> int:
    try:
        text = _CONTROL_GROUP.read_text(encoding="ascii").strip()
    except OSError:
        return 0
    return int(text) if text.isdigit() else 0
