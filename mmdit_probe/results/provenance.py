"""What a number needs beside it to be measured again: versions, machine, process, time, memory.

    >>> from mmdit_probe.results import environment
    >>> sorted(environment()["versions"])[:2]
    ['accelerate', 'captum']

Nothing here imports torch: versions are read from package metadata, and device memory is reported only where a
program has already set the device up. Everything works on Linux, macOS and Windows.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from mmdit_probe import __version__

PACKAGES = (
    "torch", "diffusers", "transformers", "tokenizers", "peft", "accelerate", "safetensors", "numpy",
    "pandas", "pyarrow", "scipy", "scikit-learn", "captum", "matplotlib", "seaborn",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Python, platform and the versions of the packages that numbers depend on (None: not installed)."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {"mmdit-probe": __version__, **{name: _version(name) for name in PACKAGES}},
    }


def this_process() -> dict[str, Any]:
    """What tells this process from every other: its number, its machine, and when it started (seconds since 1970)."""
    process = psutil.Process()
    return {"pid": process.pid, "host": platform.node(), "started": process.create_time()}


def is_running(process: Mapping[str, Any]) -> bool:
    """Whether a process of `this_process` is still there. One of another machine counts as running: nobody can tell."""
    if process["host"] != platform.node():
        return True
    try:
        found = psutil.Process(process["pid"])
        # A number is used again; the start time, which drifts with the clock by less than a second, is not.
        return found.status() != psutil.STATUS_ZOMBIE and abs(found.create_time() - process["started"]) < 2
    except (psutil.NoSuchProcess, ValueError):  # ValueError: below 0
        return False
    except psutil.AccessDenied:
        return True


def peak_memory() -> dict[str, int]:
    """Highest memory use of this process so far, in bytes: resident set, and CUDA allocations where CUDA is in use."""
    result = {"resident": _peak_resident()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        result["cuda"] = int(torch.cuda.max_memory_allocated())
    return result


def _peak_resident() -> int:
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    status = Path("/proc/self/status")  # Linux, where getrusage lets a child start with its parent's value
    for line in status.read_text(encoding="utf-8").splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kibibytes, but bytes on macOS


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
