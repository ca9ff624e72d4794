"""pandas, imported when one of its names is first used: help texts and checks of options need none of it.

from mmdit_probe import lazy_pandas as pd
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        return getattr(importlib.import_module("pandas"), name)
