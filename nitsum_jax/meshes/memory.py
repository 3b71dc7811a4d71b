"""How much memory the host still has, as far as this process is allowed to use it."""

import ctypes
import gc
import os
import pathlib
import sys

_MEMINFO = pathlib.Path("/proc/meminfo")
_CGROUPS = pathlib.Path("/sys/fs/cgroup")
_OWN_CGROUPS = pathlib.Path("/proc/self/cgroup")
# Parameters of glibc's mallopt, and the most that it takes for the second.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20
_TRIM_THRESHOLD = 1 << 30


def host_free_bytes() -> int | None:
    """Memory in bytes that this process could still take without swapping; None where the system does not tell.

    On Linux the smaller of what the machine has and what the control groups (containers) of the process leave.
    """
    answers = (_machine_free_bytes(_MEMINFO), _cgroup_free_bytes(_CGROUPS, _OWN_CGROUPS))
    return min((free for free in answers if free is not None), default=None)


def keep_freed_memory() -> bool:
    """Has the C library keep freed memory for the next allocation rather than give it back at once.

    The workspace of a step on the CPU is allocated and freed by every step.  With the usual settings most of it comes
    fresh from the operating system each time, and every page of it costs a page fault.  Blocks beyond 32 MiB still do.

    Returns:
      Whether the C library took the settings; only glibc knows them.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    settings = ((_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD), (_M_TRIM_THRESHOLD, _TRIM_THRESHOLD))
    taken = [mallopt(name, value) == 1 for name, value in settings]  # both, whether or not the first is taken
    return all(taken)


def spare_the_collector() -> None:
    """Takes what lives by now out of the garbage collector's sight, for a process that only serves from here on.

    The collector goes through all objects every so often and holds up all threads meanwhile.  Weights, programs and
    modules that live to the end are several hundred thousand: looking at them takes tenths of a second.
    """
    gc.collect()
    gc.freeze()


def _machine_free_bytes(meminfo: pathlib.Path) -> int | None:
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    if "SC_AVPHYS_PAGES" in names and "SC_PAGE_SIZE" in names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _cgroup_free_bytes(root: pathlib.Path, own: pathlib.Path) -> int | None:
    """What the tightest control group leaves: its limit less what is used and could not be reclaimed."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    free: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2: one tree for everything
            base, limit, usage, inactive = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            inactive = "total_inactive_file"
        else:
            continue
        group = pathlib.PurePosixPath(path.lstrip("/"))
        # Limits of the parents hold too.  Inside a container its own group is often mounted at the root.
        for folder in (group, *group.parents):
            value = _group_free_bytes(base / folder, limit, usage, inactive)
            if value is not None:
                free.append(value)
    return min(free, default=None)


def _group_free_bytes(folder: pathlib.Path, limit: str, usage: str, inactive: str) -> int | None:
    try:
        limit_text = (folder / limit).read_text().strip()
        if limit_text == "max":
            return None
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, int(limit_text) - used + int(stat.get(inactive, "0")))
    except (OSError, ValueError):
        return None  # no such controller here
