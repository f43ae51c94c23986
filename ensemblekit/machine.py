"""Owns what can be said of this machine without importing a library.

Input: the operating system.
"""

import contextlib
import math
import os
import platform
import re
import shutil
from pathlib import Path

COMPILERS = ("c++", "g++", "clang++")
_CPU_LIMIT = "/sys/fs/cgroup/cpu.max"
_MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_QUERY = ("--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
_WAIT_S = 20.0  # for other programs


def processor() -> str:
    """The model of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return _said("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use: fewer than there are under taskset, or in a container."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # not Linux; "max" is no limit
        quota, period = Path(_CPU_LIMIT).read_text(encoding="ascii").split()
        count = min(count, math.ceil(int(quota) / int(period)))
    return max(1, count)


def busy() -> float | None:
    """Processes that wanted to run in the last minute, per usable core; None where nobody counts."""
    if not hasattr(os, "getloadavg"):
        return None
    return os.getloadavg()[0] / usable_cores()


def memory_bytes() -> int | None:
    """Memory that this process may have at most; None where the system does not say."""
    sizes = []
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in _MEMORY_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not Linux; "max"
            sizes.append(int(Path(path).read_text(encoding="ascii")))
    return min(sizes) if sizes else None


def open_files() -> tuple[int, int] | None:
    """How many files a process may have open, now and at most; -1 is any number."""
    try:
        import resource
    except ImportError:  # not Unix
        return None
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def compiler() -> str | None:
    """The C++ compiler that torch.compile needs on the CPU, or None."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def compiler_version(path: str) -> str:
    """What the compiler calls itself, without where it lies."""
    return _said(path, "--version").partition("\n")[0] or Path(path).name


def nvidia_gpus() -> list[str]:
    """The NVIDIA GPUs that the driver knows, whatever torch makes of them: name, driver, memory."""
    if shutil.which("nvidia-smi"):
        lines = [line.strip() for line in _said("nvidia-smi", *_QUERY).splitlines()]
        return [line for line in lines if line.count(",") >= 2]  # not "No devices were found"
    devices = [path.name for path in Path("/dev").glob("nvidia*")]
    count = sum(re.fullmatch(r"nvidia\d+", name) is not None for name in devices)
    return ["NVIDIA GPU"] * count


def _said(*line: str) -> str:
    """What another program prints; nothing when it fails, or takes too long."""
    import subprocess  # which takes a while, and averaging asks for the cores only

    try:
        done = subprocess.run(  # noqa: S603  # names of programs stand in this file
            line, capture_output=True, check=True, timeout=_WAIT_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace").strip()
