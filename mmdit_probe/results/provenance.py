"""What a number needs beside it to be measured again: versions, machine, time, memory.

    >>> from mmdit_probe.results import environment
    >>> sorted(environment()["versions"])[:2]
    ['accelerate', 'captum']

Nothing here imports torch: versions are read from package metadata, and device memory is reported only where a
program has already set the device up.
"""

from __future__ import annotations

import platform
import resource
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from mmdit_probe import __version__

PACKAGES = (
    "torch", "diffusers", "transformers", "tokenizers", "peft", "accelerate", "safetensors", "numpy",
    "pandas", "pyarrow", "scipy", "scikit-learn", "captum", "matplotlib",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Python, platform and the versions of the packages that numbers depend on (None: not installed)."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {"mmdit-probe": __version__, **{name: _version(name) for name in PACKAGES}},
    }


def peak_memory() -> dict[str, int]:
    """Highest memory use of this process so far, in bytes: resident set, and CUDA allocations where CUDA is in use."""
    result = {"resident": _peak_resident()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        result["cuda"] = int(torch.cuda.max_memory_allocated())
    return result


def _peak_resident() -> int:
    status = Path("/proc/self/status")  # Linux
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    # Kibibytes, but bytes on macOS. On Linux a child starts with its parent's value, hence the better source above.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
