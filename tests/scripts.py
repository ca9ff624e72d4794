"""The scripts outside the package, as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def script(path: str) -> ModuleType:
    """The script at a path below the repository, "benchmarks/gpu.py", run as a module of its own name, beside its
    neighbours as Python runs it."""
    place = Path(__file__).parents[1] / path
    if str(place.parent) not in sys.path:
        sys.path.append(str(place.parent))
    spec = importlib.util.spec_from_file_location(place.stem, place)
    assert spec is not None and spec.loader is not None
    module = sys.modules[place.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
